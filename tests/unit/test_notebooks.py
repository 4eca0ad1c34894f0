"""Every notebook but the rendered one (tests/blender) runs from top to bottom, with fewer steps, without Jupyter."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if not path.name.startswith("01"))


def code_of(path, folder):
    """The cells with code; a count of steps or items at the head of a line is lowered, and files go to ``folder``."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = []
    for text in code:
        quick = re.sub(r"^((?:ADAPTER_)?STEPS|ITEMS) = \d+$", r"\1 = 2", text, flags=re.MULTILINE)
        found.append(re.sub(r'Path\("outputs/notebooks/\w+"\)', f'Path("{folder}")', quick))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for number, cell in enumerate(code_of(path, tmp_path / "out")):
        exec(compile(cell, f"{path.name}, code cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_words_before_code_and_no_results(path):
    """Results would be of one machine and one day, and large."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    assert all(not cell.get("outputs") for cell in cells)
