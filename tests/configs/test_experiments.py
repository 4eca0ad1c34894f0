"""Every YAML of conf/ composes; every experiment says how to run it, and runs (committed configs are executed)."""

import json
import re
import subprocess
import sys

import pytest

from packshot.config.compose import CONF, compose, groups, options
from packshot.config.schema import SCRIPTS

EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
GROUPS = {group: options(group) for group in groups() if group != "experiment"}

# Keys that an option cannot do without, by script.
ENDPOINT = ["captioner.endpoint=http://127.0.0.1:1/v1", "captioner.endpoint_model=any"]
NEEDED = {
    ("build_data", "endpoint"): ENDPOINT,
    ("evaluate", "endpoint"): ENDPOINT,
    ("caption_vlm", "none"): ["task=review", "data.input=data/rendered/heldout"],
    ("caption_vlm", "endpoint"): [*ENDPOINT, "task=caption", "data.input=data/rendered/heldout"],
}


def script_of(path):
    return re.search(r"python (\w+)\.py experiment=" + path.stem, path.read_text()).group(1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_group_option_composes(script):
    node = compose(script, [])
    for group, names in GROUPS.items():
        if hasattr(node, group):
            for name in names:
                compose(script, [f"{group}={name}", *NEEDED.get((script, name), [])])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_states_command_and_hardware(path):
    assert "hardware:" in path.read_text()
    compose(script_of(path), [f"experiment={path.stem}"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs_two_steps(path, tmp_path):
    script = script_of(path)
    heldout = "data/rendered/heldout"
    command = [
        sys.executable, f"{script}.py", f"experiment={path.stem}", f"run.dir={tmp_path / 'run'}", "tracking=none",
        "model=mini", f"data.train={heldout}", "train.max_steps=2", "train.warmup_steps=0", "train.batch_size=2",
        "train.validation_steps=2", "train.validation_samples=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "run" / "export" / "README.md").exists()
