"""Imports point one way (the table of docs/design: who may know whom)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "packshot"
ALLOWED = {
    "scene": set(),
    "config": set(),
    "core": {"scene", "config"},
    "pipeline": {"scene", "config", "core"},
    "render": {"scene", "config", "core", "pipeline"},
    "models": {"scene", "config", "core", "diffusion", "render"},
    "models/mini": {
        "scene",
        "config",
        "core",
        "diffusion",
        "render",
        "data",
        "caption",
    },  # a program: nothing imports it
    "diffusion": set(),
    "data": {"scene", "config", "core", "pipeline", "models", "render"},
    "methods": {"scene", "config", "core", "models", "diffusion", "data"},
    "train": {"scene", "config", "core", "models", "diffusion", "data", "methods"},
    "caption": {"scene", "config", "core", "pipeline", "data", "models", "train"},
    "infer": {"scene", "config", "core", "data", "models", "diffusion"},
    "evaluate": {"scene", "config", "core", "data", "models", "infer", "caption"},
    "serve": {"scene", "config", "core", "infer"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_package_imports_only_what_it_may(package):
    for path in (SRC / package).rglob("*.py"):
        if any(path.is_relative_to(SRC / own) for own in ALLOWED if own.startswith(f"{package}/")):
            continue
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in SCRIPTS, f"{path} imports the script {name}"
            if parts[0] == "packshot" and len(parts) > 1 and parts[1] != package.partition("/")[0]:
                assert parts[1] in ALLOWED[package], f"{path} imports {name}"


def test_every_package_has_its_row():
    assert {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(ALLOWED)


def test_lab_has_one_conversion():
    named = [path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if "rgb2lab" in path.read_text().lower()]
    assert named == ["data/colour.py"]
