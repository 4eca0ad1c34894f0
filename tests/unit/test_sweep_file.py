"""``conf/launch/wandb_sweep.yaml``: the commands that W&B's agent makes of it are valid, and two of them run."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from packshot.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
SWEEP = yaml.safe_load((ROOT / "conf" / "launch" / "wandb_sweep.yaml").read_text())


def grid():
    """The values of every run, as the agent's grid search visits them."""
    names = list(SWEEP["parameters"])
    lists = [SWEEP["parameters"][name]["values"] for name in names]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]


def command(values):
    """The words of one run, by the rules of the agent's macros."""
    words = []
    for word in SWEEP["command"]:
        if word == "${args_no_hyphens}":
            words += [f"{name}={value}" for name, value in values.items()]
        elif word != "${env}":
            words.append(word.replace("${program}", SWEEP["program"]))
    return words


def test_every_command_of_the_grid_is_valid():
    commands = [command(values) for values in grid()]
    assert len(commands) == 6
    for python, program, *overrides in commands:
        assert python == "python"
        config = compose(Path(program).stem, overrides)
        assert f"train.learning_rate={config.train.learning_rate}" in overrides


def test_the_metric_is_one_that_is_logged():
    from packshot.runs.tracking import tracked_name

    assert SWEEP["metric"]["name"] == tracked_name("validation_loss", "val")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 5])
def test_two_commands_of_the_grid_run(number, tmp_path):
    _, program, *overrides = command(grid()[number])
    quick = [
        "tracking=none",
        "train.max_steps=1",
        "train.warmup_steps=0",
        "train.validation_steps=0",
        f"run.dir={tmp_path}/run",
    ]
    kept = [override for override in overrides if not override.startswith("tracking=")]
    done = subprocess.run([sys.executable, program, *kept, *quick], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").exists()
