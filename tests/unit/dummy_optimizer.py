"""Run by test_optimizer.py: train_lora.py with an optimizer that only this file knows.

It needs a process of its own, because rows must be registered before the schema is imported.
"""

import sys
from pathlib import Path

import torch

from packshot.config.optimizers import OptimizerRow, register

register(
    OptimizerRow(
        "momentum",
        lambda groups, config: torch.optim.SGD(groups, momentum=config.beta1),
        reads=("beta1",),
        state_bytes=4,
        usual_rates=(1e-3, 1.0),
    )
)

if __name__ == "__main__":
    from accelerate.state import AcceleratorState, GradientState

    from packshot import cli
    from packshot.config import compose

    compose.CONF = Path(sys.argv[1])
    for line in sys.argv[2:]:  # the overrides of one run each
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        try:
            cli.run_stage("train_lora", line.split())
        except SystemExit as ended:  # every stage ends so; go on after those that went well
            if ended.code:
                raise
