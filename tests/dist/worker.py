"""Run by torchrun from test_world_size.py: trains a method on the mini SDXL, writes its weights and first gradient."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from packshot.cli import exiting
from packshot.config.compose import compose
from packshot.dataset.rows import load_rows
from packshot.base.load import load_parts
from packshot.engine.loop import fit
from packshot.train.run import build_task
from packshot.engine.processes import start
from packshot.engine.checkpoints import trainable
from packshot.runs.start import start_process

HELDOUT = "data/rendered/heldout"


def main(script: str, folder: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    common = [f"data.train={HELDOUT}", f"data.validation={HELDOUT}", "tracking=none", f"run.dir={folder}"]
    config = compose(script, [*common, *overrides])
    rows = load_rows("data.train", config.data.train[0])
    parts = load_parts(config.model)
    session = start(script, config, config.train)
    config.data.cache_dir = str(Path(folder).parent / "cache")
    task, examples = build_task(config, parts, rows, rows, session.accelerator)
    for part in (examples, task.validator):
        part.fill(session.accelerator)
    gradients: dict[str, torch.Tensor] = {}
    clip = session.accelerator.clip_grad_norm_

    def remember(parameters, norm):
        if not gradients:
            gradients.update({n: p.grad.detach().clone() for n, p in trainable(task).items()})
        return clip(parameters, norm)

    session.accelerator.clip_grad_norm_ = remember
    fit(task, examples, config, session)
    if session.run:
        save_file(gradients, Path(folder) / "gradients.safetensors")
        save_file({n: p.detach().clone() for n, p in trainable(task).items()}, Path(folder) / "weights.safetensors")


if __name__ == "__main__":
    start_process()
    with exiting():
        main(*sys.argv[1:])
