"""Imports point one way: the table of which package may import which. CONTRIBUTING.md shows it as a picture."""

import ast
from pathlib import Path

import pytest

from tools.draw_rooms import PICTURE, draw

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "packshot"
# Each package, in an order in which it only imports packages above it. All may import packshot.errors and .lists.
ALLOWED = {
    "scene": set(),
    "config": {"scene"},
    "diffusion": set(),
    "runs": {"config"},
    "pipeline": {"config", "runs"},
    "imaging": {"config", "runs"},
    "dataset": {"scene", "config", "runs", "imaging"},
    "base": {"config", "runs", "imaging", "diffusion"},
    "engine": {"config", "runs"},
    "methods": {"config", "runs", "imaging", "diffusion", "base", "engine"},
    "train": {"scene", "config", "runs", "imaging", "dataset", "diffusion", "base", "engine", "methods"},
    "caption": {"scene", "config", "runs", "imaging", "dataset", "base", "engine"},
    "render": {"scene", "config", "runs", "pipeline"},
    "make_dataset": {"scene", "config", "runs", "pipeline", "imaging", "dataset", "caption", "render"},
    "generate": {"scene", "config", "runs", "imaging", "dataset", "diffusion", "base"},
    "evaluate": {"scene", "config", "runs", "imaging", "dataset", "base", "caption", "generate"},
    "serve": {"scene", "config", "runs", "generate"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package):
    for path in (SRC / package).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in SCRIPTS, f"{path} imports the script {name}"
            assert parts[0] not in ("tools", "tests", "benchmarks"), f"{path} imports {name}"
            if parts[0] == "packshot" and len(parts) > 1 and parts[1] not in (package, "errors", "lists"):
                assert parts[1] in ALLOWED[package], f"{path} imports {name}"


def test_no_arrow_points_back_up():
    """A package may only import packages that stand above it in the table, so there are no cycles."""
    above = set()
    for package, allowed in ALLOWED.items():
        assert allowed <= above, f"{package} may import {allowed - above}, which stand below it"
        above.add(package)


def test_the_picture_of_the_rooms_is_current():
    current = PICTURE.read_text() == draw()
    assert current, "run `python -m tools.draw_rooms`, look at docs/images/rooms.svg, and commit it"


def test_every_package_has_its_row():
    assert {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ALLOWED)


def test_lab_has_one_conversion():
    named = [path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if "rgb2lab" in path.read_text().lower()]
    assert named == ["imaging/color.py"]
