"""What an installation offers: every package, the configs, and the console script, from any folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from pkgutil import resolve_name

import pytest

import packshot
from packshot.cli import COMMANDS, STAGES, run_command
from packshot.errors import ConfigError
from packshot.runs.files import resolve

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPOSE_ALL = """
import packshot
from packshot.cli import STAGES
from packshot.config.compose import compose
for stage in STAGES:
    compose(stage, ["model=sdxl"])
print(packshot.__file__)
"""


def output(command, folder, **variables):
    """What a command prints when it runs in ``folder``, without this process's import paths."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_installation(binaries, folder):
    """The console script and the package work in ``folder``; returns the file that ``packshot`` is imported from."""
    script = binaries / "packshot"
    assert "train.learning_rate=0.0001" in output([script, "train_lora", "--help"], folder)
    assert "base: stabilityai/" in output([script, "train_lora", "model=sdxl", "--cfg"], folder)
    assert output([script, "--help"], folder).count("\n  ") == len(STAGES) + len(COMMANDS)
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


def copy_of_sources(folder):
    """A copy of what a distribution is built from, because setuptools adds what earlier builds left in build/."""
    source = folder / "source"
    source.mkdir()
    for name in ("src", "conf", "data/models/sdxl/tokenizer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path):
    source = copy_of_sources(tmp_path)
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
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert check_installation(tmp_path / "fresh/bin", elsewhere) == site / "packshot/__init__.py"
    script = tmp_path / "fresh/bin/packshot"
    assert output([script, "--version"], elsewhere).strip() == VERSION
    keys = ["num_images=1", "num_inference_steps=1", "run.dir=made"]
    refused = subprocess.run([script, "generate", *keys], cwd=elsewhere, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "PACKSHOT_DATA" in refused.stderr
    output([script, "generate", *keys], elsewhere, PACKSHOT_DATA=str(ROOT / "data"))
    made = [elsewhere / f"made/coffee-0{suffix}" for suffix in (".png", ".json")]
    photo = ROOT / "data/products/coffee.png"
    checked = output([script, "verify", *made, photo], elsewhere, PACKSHOT_DATA=str(ROOT / "data"))
    assert checked.count("ok ") == 5
    assert (site / "packshot/py.typed").exists()


@pytest.mark.slow
def test_the_source_distribution_is_small(tmp_path):
    """It holds the package, its configs and CLIP's tokenizer; all other data stays in the repository."""
    build = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    name = output([sys.executable, "-c", build], copy_of_sources(tmp_path)).split()[-1]
    assert (tmp_path / name).stat().st_size < 2_000_000
    with tarfile.open(tmp_path / name) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"src/packshot/cli.py", "conf/train_lora.yaml", "CHANGELOG.md"} <= names
    others = [name for name in names if name.startswith(("data/", "tests/", "docs/"))]
    tokenizer = "data/models/sdxl/tokenizer"
    assert sorted(others) == [f"{tokenizer}/{name}" for name in ("merges.txt", "tokenizer_config.json", "vocab.json")]


def test_the_version_has_its_entry_in_the_changelog():
    assert f"## {VERSION} " in (ROOT / "CHANGELOG.md").read_text()


def test_packshot_data_comes_before_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped/models/sdxl").mkdir(parents=True)
    monkeypatch.setenv("PACKSHOT_DATA", str(tmp_path / "shipped"))
    assert resolve("data/models/sdxl") == tmp_path / "shipped/models/sdxl"
    monkeypatch.setenv("PACKSHOT_DATA", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"PACKSHOT_DATA=.*none: there is no such folder"):
        resolve("data/models/sdxl")


def test_every_public_name_can_be_imported():
    for name in packshot.__all__:
        assert getattr(packshot, name).__name__ == name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function_and_help(command, capsys):
    assert callable(resolve_name(COMMANDS[command].target))
    with pytest.raises(SystemExit) as ended:
        run_command(command, ["--help"])
    assert ended.value.code == 0
    assert COMMANDS[command].usage in capsys.readouterr().out
