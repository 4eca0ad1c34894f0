"""Run by test_controlnet.py: stages with a ControlNet condition and an input of it that only this file knows.

It needs a process of its own, because rows must be registered before the schema is imported.
"""

import sys

import numpy as np

from packshot.config.conditions import CONDITIONS, INPUTS, ConditionRow, InputRow, Setting


def mean_height(height_HW, mask_HW):
    """What training reads off the dataset's column ``relief``."""
    return float(height_HW.mean())


def horizon(view):
    """A bright half above the height that is asked for."""
    rows = np.arange(view.mask_HW.shape[0])[:, None, None] / view.mask_HW.shape[0]
    return np.broadcast_to(rows < view.inputs["height"], (*view.mask_HW.shape, 3)).astype(np.float32)


INPUTS["height"] = InputRow(
    column="relief",
    read="dummy_condition:mean_height",
    where="Only this test has it.",
    setting=Setting(
        key="camera_height",
        help="share of the picture above the horizon",
        min=0,
        max=1,
        default=lambda scene: 0.25,
        value=lambda height: height,
        label="camera height",
        unit="of the picture",
        instead="Load a ControlNet that reads it.",
    ),
)
CONDITIONS["horizon"] = ConditionRow("where the horizon lies", "dummy_condition:horizon", inputs=("height",))

if __name__ == "__main__":
    sys.modules["dummy_condition"] = sys.modules["__main__"]
    from packshot import cli
    from packshot.serve.schemas import GenerateForm

    assert "camera_height" in GenerateForm.model_fields
    for line in sys.argv[1:]:  # a script and its overrides
        script, *overrides = line.split()
        try:
            cli.run_stage(script, overrides)
        except SystemExit as ended:  # every stage ends so; go on after those that went well
            if ended.code:
                raise
