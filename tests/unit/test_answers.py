"""What a command found or made is on standard output; what happens while it works is on standard error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from packshot.base.load import load_parts
from packshot.cli import COMMANDS, STAGES, run_command, run_stage
from packshot.config.schema import LoraMethod, ModelConfig
from packshot.methods import METHODS

PLAN = ["mode=plan", "plan.images=8"]
# By command: its arguments, and the start of a line that only its answer has. {made} is the folder of `made`.
ANSWERS = {
    "build_data": (["source.path={made}/photos", "captioner=none"], "2 of 2 images accepted"),
    "caption_vlm": ([*PLAN, "task=caption"], "frozen_parameters"),
    "train_lora": (PLAN, "tflop_per_step"),
    "train_ip_adapter": (PLAN, "tflop_per_step"),
    "train_controlnet": (PLAN, "tflop_per_step"),
    "merge": (["model.loras=[{made}/lora]"], "merged 1 LoRAs into"),
    "generate": (
        ["product={made}/photos/a.png", "mask={made}/mask.png", "background.color=[255,255,255]"],
        "1 pictures; report:",
    ),
    "evaluate": (["runs=[{made}/drawn]", "suite=scene", "captioner=none"], "report:"),
    "verify": (["{made}/drawn/a-0.png", "{made}/drawn/a-0.json"], "ok"),
    "bench": (["--export", "{run}"], "76 items:"),
    "show": (["data/rendered/heldout", "show.out={run}"], "row 0 of"),
    "plan": (["generate", "plan.images=8"], "tflop_per_picture"),
}


def run(name: str, arguments: list[str], folder: Path) -> None:
    """A command as it is typed, in a new run folder if it has one."""
    start = run_command if name in COMMANDS else run_stage
    if name in STAGES or name == "plan":
        arguments = [*arguments, f"run.dir={folder}", "tracking=none"]
    with pytest.raises(SystemExit) as ended:
        start(name, arguments)
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: two photographs, a mask, a LoRA and a run of generate.py."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for name, colour in (("a", (200, 40, 40)), ("b", (40, 40, 200))):
        Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(folder / "photos" / f"{name}.png")
        photo = Image.open(folder / "photos" / f"{name}.png")
        photo.paste(colour, (40, 40, 90, 100))
        photo.save(folder / "photos" / f"{name}.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 90, 100))
    mask.save(folder / "mask.png")
    METHODS[LoraMethod](load_parts(ModelConfig()), LoraMethod(rank=2)).export(folder / "lora")
    arguments, _ = ANSWERS["generate"]
    run("generate", [argument.format(made=folder) for argument in arguments], folder / "drawn")
    return folder


def test_every_command_that_ends_is_in_the_table():
    assert set(ANSWERS) == {*STAGES, *COMMANDS} - {"serve"}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_on_standard_output(name, made, tmp_path, capsys):
    arguments, answer = ANSWERS[name]
    folder = tmp_path / "run"
    run(name, [argument.format(made=made, run=folder) for argument in arguments], folder)
    printed = capsys.readouterr()
    assert any(line.startswith(answer) for line in printed.out.splitlines()), printed
    assert not any(line.startswith(answer) for line in printed.err.splitlines()), printed
    assert not any(line.startswith("running in") for line in printed.out.splitlines()), printed
    log = folder / "log.txt"
    assert not log.exists() or answer in log.read_text()


def test_a_reader_that_leaves_an_answer_is_no_error(tmp_path):
    """``packshot plan generate | head -1``."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "packshot", "plan", "generate", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0
    assert "error" not in done.stderr.lower()
