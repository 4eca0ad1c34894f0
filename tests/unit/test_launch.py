"""``conf/launch``: accelerate reads its files, and the Slurm script asks for a checkpoint, requeues and resumes."""

import os
import signal
import subprocess
import time

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from packshot.config.compose import CONF, compose, groups
from packshot.engine.sharding import refuse_settings
from packshot.errors import ConfigError

LAUNCH = CONF / "launch"


@pytest.mark.parametrize(("name", "processes"), [("multi_gpu", 8), ("multi_node", 16)])
def test_accelerate_reads_its_files(name, processes):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert config.num_processes == processes
    assert config.distributed_type == "MULTI_GPU"
    assert config.mixed_precision == "bf16"


def test_accelerate_reads_the_file_for_sharded_training():
    config = load_config_from_file(str(LAUNCH / "fsdp.yaml"))
    assert config.distributed_type == "FSDP"
    settings = {name.upper(): str(value) for name, value in config.fsdp_config.items()}
    refuse_settings(settings)


def test_launch_files_are_no_options_of_a_script():
    assert "launch" not in groups()
    with pytest.raises(ConfigError, match="There is no key 'launch'"):
        compose("train_lora", ["launch=multi_gpu"])


TOOLS = {
    # torchrun under srun: it notes its arguments, waits for SIGTERM and leaves as a run does
    "srun": """echo "$@" > srun.txt; trap 'echo saved > saved.txt; exit 143' TERM; while :; do sleep 0.1; done""",
    "scontrol": """case $1 in show) echo first-node;; *) echo "$@" > requeued.txt;; esac""",
    "scancel": "exit 1",
}


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for Slurm's commands, and the environment of a job."""
    for name, body in TOOLS.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/usr/bin/env bash\n{body}\n")
        tool.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}


def start(folder, environment, *arguments):
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(file):
    for _ in range(600):
        if file.exists() and file.read_text():
            return file.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{file} was not written")


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_is_requeued_after_a_checkpoint(slurm, tmp_path, begun):
    run = tmp_path / "run"
    if begun:
        run.mkdir()
        (run / "config.yaml").write_text("")
    job = start(tmp_path, slurm, "train_lora.py", f"run.dir={run}", "data.train=set")
    started = wait_for(tmp_path / "srun.txt")
    assert f"train_lora.py run.dir={run} data.train=set run.resume={str(begun).lower()}" in started
    assert "--nnodes 2 --nproc_per_node 8" in started
    assert "--rdzv_endpoint first-node:29500" in started
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "saved.txt").read_text() == "saved\n"
    assert (tmp_path / "requeued.txt").read_text() == "requeue 7\n"


def test_a_job_without_a_run_folder_is_refused(slurm, tmp_path):
    job = start(tmp_path, slurm, "train_lora.py")
    assert "name a run.dir" in job.communicate()[1]
    assert job.returncode != 0
