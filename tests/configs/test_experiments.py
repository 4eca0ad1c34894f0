"""Every YAML of conf/ composes; every experiment says how to run it, and runs (committed configs are executed)."""

import json
import re
import subprocess
import sys

import pytest

from packshot.config.compose import CONF, compose, groups, options
from packshot.config.gpus import GPUS
from packshot.config.schema import SCRIPTS
from packshot.train.plan import make_plan

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
    return re.search(r"(\w+)\.py experiment=" + path.stem, path.read_text()).group(1)


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


PLANNED = [path for path in EXPERIMENTS if "planned memory:" in path.read_text()]


def test_sdxl_has_presets_for_one_gpu_a_small_one_and_eight():
    expected = {
        f"{method}_sdxl{size}" for method in ("lora", "controlnet", "ip_adapter") for size in ("", "_24gb", "_8gpu")
    }
    assert {path.stem for path in PLANNED} == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_presets_header_states_its_planned_memory(path):
    """The plan that the header names, to .1 GiB; it fits the GPU that the header names."""
    script, overrides = re.search(r"# plan: python (\w+)\.py (.+)", path.read_text()).groups()
    config = compose(script, overrides.split())
    result = make_plan(config, config.plan.images, config.plan.gpus)
    needed = max(result.total_gib, result.encoding_gib)
    assert f"# planned memory: {needed:.1f} GiB a process" in path.read_text()
    assert needed < 0.9 * GPUS[config.plan.gpu.name].memory_gib


@pytest.mark.parametrize("script", ["train_lora", "train_controlnet", "train_ip_adapter"])
def test_choosing_sdxl_changes_the_defaults_of_training(script):
    mini, sdxl = compose(script, []), compose(script, ["model=sdxl"])
    for key in ("mixed_precision", "gradient_checkpointing", "max_steps", "checkpointing_steps", "validation_steps"):
        assert getattr(sdxl.train, key) != getattr(mini.train, key), key
    assert sdxl.data.num_workers > mini.data.num_workers
    assert compose(script, ["model=sdxl", "train.max_steps=7"]).train.max_steps == 7


def two_step_runs():
    """Every experiment; those that vary another one's batch or processes are slow tests."""
    for path in EXPERIMENTS:
        variant = path.stem.endswith(("_24gb", "_8gpu"))
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if variant else [])


@pytest.mark.parametrize("path", two_step_runs())
def test_every_experiment_runs_two_steps(path, tmp_path):
    script = script_of(path)
    heldout = "data/rendered/heldout"
    command = [
        sys.executable, f"{script}.py", f"experiment={path.stem}", f"run.dir={tmp_path / 'run'}", "tracking=none",
        "model=mini", f"data.train={heldout}", "train.max_steps=2", "train.warmup_steps=0", "train.batch_size=2",
        "train.validation_steps=2", "train.validation_samples=1", "train.log_steps=1", "data.num_workers=0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "run" / "export" / "README.md").exists()
