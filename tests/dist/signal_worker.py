"""Run by torchrun from test_signals.py: a small task on two processes, one of which receives a signal."""

import os
import signal
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from test_loop import ROWS, Regression, Samples

from packshot.cli import exiting
from packshot.config.schema import CaptionVLM, LRSchedule, TrainConfig
from packshot.engine.loop import fit
from packshot.engine.processes import start
from packshot.errors import Interrupted
from packshot.runs.start import start_process


class Signalled(Regression):
    """The second process receives SIGTERM during the third step."""

    calls = count(1)

    def forward(self, batch):
        if next(self.calls) == 3 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(batch)


def main(folder: str, signalled: str, resume: str) -> None:
    config = CaptionVLM()
    config.run.dir = folder
    config.run.resume = resume == "true"
    config.tracking.kind = type(config.tracking.kind)["none"]
    config.train = TrainConfig(
        max_steps=8, batch_size=2, checkpointing_steps=100, validation_steps=0, lr_schedule=LRSchedule.constant
    )
    session = start("caption_vlm", config, config.train, resumable=False)
    try:
        fit(Signalled() if signalled == "true" else Regression(), Samples(ROWS), config, session)
    except Interrupted as error:
        Path(folder, f"interrupted-{session.accelerator.process_index}").write_text(str(error))


if __name__ == "__main__":
    start_process()
    with exiting():
        main(*sys.argv[1:])
