"""What an installation offers: every package, the configs, and the console script, from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from packshot.cli import STAGES

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_ALL = """
import packshot
from packshot.cli import STAGES
from packshot.config.compose import compose
for stage in STAGES:
    compose(stage, ["model=sdxl"])
print(packshot.__file__)
"""


def output(command, folder):
    """What a command prints when it runs in ``folder``, without this process's import paths."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_installation(binaries, folder):
    """The console script and the package work in ``folder``; returns the file that ``packshot`` is imported from."""
    script = binaries / "packshot"
    assert "train.learning_rate=0.0001" in output([script, "train_lora", "--help"], folder)
    assert "base: stabilityai/" in output([script, "train_lora", "model=sdxl", "--cfg"], folder)
    assert output([script, "--help"], folder).count("\n  ") == len(STAGES)
    return Path(output([binaries / "python", "-c", COMPOSE_ALL], folder).strip())


def test_every_package_is_listed():
    """A package that pyproject.toml does not list is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    names = {
        f"packshot.{path.parent.relative_to(ROOT / 'src/packshot')}" for path in ROOT.glob("src/packshot/*/**/*.py")
    }
    names |= {f"packshot.{path.parent.relative_to(ROOT)}" for path in ROOT.glob("conf/**/*.yaml")}
    names.add("packshot.clip_tokenizer")  # the mini family's folder, for bases in one file
    assert sorted(listed) == sorted({"packshot", *(name.replace("/", ".") for name in names)})


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_script(stage):
    assert f'run_stage("{stage}")' in (ROOT / f"{stage}.py").read_text()


def test_an_editable_installation_works_from_any_folder(tmp_path):
    assert check_installation(Path(sys.executable).parent, tmp_path) == ROOT / "src/packshot/__init__.py"


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path):
    source = tmp_path / "source"  # a copy, because setuptools adds what earlier builds left in build/
    source.mkdir()
    for name in ("src", "conf", "data/models/sdxl/tokenizer"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    output([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], tmp_path)
    output([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], tmp_path)
    # The dependencies come from this environment. A .pth inside a folder that a .pth adds is not read, so its editable
    # installation of this checkout is not found.
    [site] = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    [wheel] = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    assert shipped == {f"packshot/{path.relative_to(ROOT)}" for path in ROOT.glob("conf/**/*.yaml")}
    output([*pip, "--python", tmp_path / "fresh/bin/python", "install", "--no-deps", "--no-index", wheel], tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert check_installation(tmp_path / "fresh/bin", tmp_path / "elsewhere") == site / "packshot/__init__.py"
