"""The notebook's code runs as it stands."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-render" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="no Blender here: make render-env")
def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "notebooks" / "01_rendered_scenes.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # smaller and fewer pictures, in a folder of the test
    last = code[-1].replace('"outputs/notebook", size=160, samples=16', f'"{tmp_path}", size=64, samples=2')
    assert last != code[-1]
    names: dict = {}
    for cell in [*code[:-1], last]:
        exec(compile(cell, "notebook", "exec"), names)
    assert len(names["rows"]) == 5
    assert all(len(row) == 5 for row in names["rows"])
    for row, words in zip(names["rows"], names["labels"], strict=True):
        values = {word.removeprefix("drawn: ") for word in words}
        assert len(values) >= 4
        assert len({picture.tobytes() for picture in row}) == len(values)  # another value, another picture
