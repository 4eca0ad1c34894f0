"""The schema of ``conf/``: one dataclass per script, built from one dataclass per group.

The modules that it sums up are the only place where a key, its type, its default, its range and its help text are
written down; the rules that one range cannot express stand in the ``check`` of the class that they rule. Hydra merges
YAML and overrides into these classes (so a misspelt key cannot pass), ``--help`` is printed from them, and below the
scripts only they travel, never a DictConfig.
"""

from packshot.config.background import *  # noqa: F403
from packshot.config.caption import *  # noqa: F403
from packshot.config.caption import CaptionVLM
from packshot.config.common import *  # noqa: F403
from packshot.config.generate import *  # noqa: F403
from packshot.config.generate import Evaluate, Generate, Serve
from packshot.config.make_dataset import *  # noqa: F403
from packshot.config.make_dataset import BuildData
from packshot.config.merge import Merge
from packshot.config.methods import *  # noqa: F403
from packshot.config.methods import TrainControlNet, TrainIPAdapter, TrainLora
from packshot.config.output import *  # noqa: F403
from packshot.config.plan import *  # noqa: F403
from packshot.config.train import *  # noqa: F403
from packshot.config.verify import *  # noqa: F403

SCRIPTS: dict[str, type] = {
    "build_data": BuildData,
    "caption_vlm": CaptionVLM,
    "train_lora": TrainLora,
    "train_ip_adapter": TrainIPAdapter,
    "train_controlnet": TrainControlNet,
    "merge": Merge,
    "generate": Generate,
    "evaluate": Evaluate,
    "serve": Serve,
}


def script_of(config: object) -> str:
    """The name of the script that a config is for."""
    return next(name for name, schema in SCRIPTS.items() if schema is type(config))
