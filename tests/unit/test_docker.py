"""The Dockerfile, as far as it can be tested without a container engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from packshot.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(name):
    return re.findall(rf"^{name} (.+)$", TEXT, re.MULTILINE)


def test_what_is_copied_exists():
    for line in instructions("COPY"):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line


def test_the_entry_point_is_a_valid_command():
    [line] = instructions("ENTRYPOINT")
    program, stage, *overrides = [part.strip('" ') for part in line.strip("[]").split(",")]
    assert program == "packshot"
    assert compose(stage, overrides).serve.host == "0.0.0.0"


@pytest.mark.slow
def test_the_run_lines_work_in_a_fresh_environment(tmp_path):
    """In a virtual environment that sees this one's dependencies: the install lines find them, and build the rest."""
    folder = tmp_path / "packshot"
    folder.mkdir()
    for line in instructions("COPY"):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                )
            else:
                shutil.copy(ROOT / source, folder / target)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    [site] = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path}/fresh/bin:{environment['PATH']}"
    for line in instructions("RUN"):
        command = line.replace("/runs", str(tmp_path / "runs"))
        done = subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    where = [str(tmp_path / "fresh/bin/python"), "-c", "import packshot; print(packshot.__file__)"]
    imported = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert imported.startswith(str(tmp_path / "fresh"))
