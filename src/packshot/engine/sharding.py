"""Sharded training: torch's FSDP2, set up by the FSDP settings of ``accelerate launch``.

accelerate itself takes FSDP for GPUs alone. So its settings are only read here, and gloo on CPUs and NCCL on GPUs run
the same code. Every process holds its share of all weights, gradients, averages and optimizer states; the weights of a
block are gathered while it computes. Checkpoints and exports hold whole tensors: their files do not tell how many
processes wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from packshot.config.optimizers import OPTIMIZERS
from packshot.config.schema import CaptionVLM, MixedPrecision, Quantization
from packshot.engine.task import TrainingConfig
from packshot.errors import ConfigError
from packshot.lists import map_values
from packshot.runs.folder import log

if TYPE_CHECKING:  # imported where something is sharded: it costs a second
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

SWITCH = "ACCELERATE_USE_FSDP"
# Settings under which accelerate would do what is not done here, with the value that switches them off.
OFF = {
    "FSDP_OFFLOAD_PARAMS": ("false", "Set fsdp_offload_params: false, and optim=adafactor or fewer trained layers."),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "Set fsdp_activation_checkpointing: false; train.gradient_checkpointing=true does the same.",
    ),
    "FSDP_IGNORED_MODULES": ("", "Leave fsdp_ignored_modules out: everything is sharded."),
}
# Settings of accelerate that decide nothing here. Most of them are always there.
UNUSED = (
    "FSDP_SHARDING_STRATEGY", "FSDP_BACKWARD_PREFETCH", "FSDP_FORWARD_PREFETCH", "FSDP_STATE_DICT_TYPE",
    "FSDP_USE_ORIG_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES", "FSDP_MIN_NUM_PARAMS",
)  # fmt: skip
POLICIES = ("TRANSFORMER_BASED_WRAP", "NO_WRAP")


@dataclass(frozen=True)
class Sharding:
    """How a training is sharded.

    reshard: free a block's gathered weights after its forward pass and gather them again for the backward pass.
    whole: shard everything as one block.
    blocks: names of the classes whose modules are gathered one at a time; empty: those that the networks declare
        (``_no_split_modules``).
    unused: settings of the launcher that decide nothing here.
    """

    reshard: bool = True
    whole: bool = False
    blocks: tuple[str, ...] = ()
    unused: tuple[str, ...] = field(default=(), compare=False)

    def words(self) -> str:
        """One line for the log."""
        blocks = "in one block" if self.whole else "block by block"
        after = "gathered again for the backward pass" if self.reshard else "kept until the backward pass"
        line = f"weights, gradients and optimizer state are sharded (FSDP2) {blocks}, weights {after}"
        return f"{line}; without effect here: {', '.join(self.unused)}" if self.unused else line


def is_on(variable: str, default: str = "false") -> bool:
    """Whether a variable of the environment is switched on."""
    return os.environ.get(variable, default).lower() in ("1", "true")


def read_sharding(config: TrainingConfig) -> Sharding | None:
    """The launcher's FSDP settings, None without any.

    The switch is taken out of the environment, because accelerate and transformers would act on it themselves.

    Raises:
        ConfigError: they ask for FSDP1 or for something that is not done here, or do not go with the config.
    """
    if not is_on(SWITCH):
        return None
    refuse_settings(os.environ)
    refuse_config(config)
    os.environ.pop(SWITCH)
    classes = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return Sharding(
        reshard=is_on("FSDP_RESHARD_AFTER_FORWARD", "true"),
        whole=os.environ.get("FSDP_AUTO_WRAP_POLICY") == "NO_WRAP",
        blocks=tuple(filter(None, map(str.strip, classes))),
        unused=tuple(filter(os.environ.__contains__, UNUSED)),
    )


def refuse_settings(environment: Mapping[str, str]) -> None:
    """Refuse settings of the launcher that are not followed here.

    Raises:
        ConfigError: names the setting.
    """
    found = environment.get("FSDP_VERSION", "1")
    if found != "2":
        raise ConfigError(
            f"The launcher asks for version {found} of FSDP (FSDP_VERSION); packshot shards with version 2.",
            "Set fsdp_version: 2, as in conf/launch/fsdp.yaml.",
        )
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", POLICIES[0])
    if policy not in POLICIES:
        raise ConfigError(
            f"The launcher's FSDP_AUTO_WRAP_POLICY={policy} is not known; packshot has {' and '.join(POLICIES)}.",
            f"Set fsdp_auto_wrap_policy: {POLICIES[0]}.",
        )
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise ConfigError(
            f"The launcher's FSDP_RESHARD_AFTER_FORWARD={reshard} is not known; packshot has true and false.",
            "Set fsdp_reshard_after_forward: true, or false to trade memory for speed.",
        )
    for variable, (off, hint) in OFF.items():
        value = environment.get(variable, off)
        if value.lower() not in (off, "none", ""):
            raise ConfigError(f"The launcher's {variable}={value} is not supported by packshot.", hint)


def refuse_config(config: TrainingConfig) -> None:
    """Refuse settings of a training that shards cannot have.

    Raises:
        ConfigError: names the first of them.
    """
    train = config.train
    where = "captioner" if isinstance(config, CaptionVLM) else "model"
    quantization = getattr(config, where).quantization
    rows = list(filter(lambda row: row.elementwise, OPTIMIZERS.values()))
    elementwise = [row.name for row in rows]
    encodes = not isinstance(config, CaptionVLM) and not config.data.cache
    refused = {
        f"{where}.quantization={quantization}": (quantization is not Quantization.none, f"{where}.quantization=none"),
        "train.mixed_precision=fp16": (train.mixed_precision is MixedPrecision.fp16, "train.mixed_precision=bf16"),
        "train.compile=true": (train.compile, "train.compile=false"),
        "data.cache=false": (encodes, "data.cache=true"),
        f"optim={config.optim.kind}": (
            config.optim.kind.name not in elementwise, f"optim={' or optim='.join(elementwise)}"
        ),
    }  # fmt: skip
    for setting, (present, remedy) in refused.items():
        if present:
            raise ConfigError(
                f"{setting} does not go with sharded training ({SWITCH}).",
                f"Set {remedy}, or launch data-parallel training (conf/launch/multi_gpu.yaml).",
            )


# ---- shards of a module ----


def shard(module: nn.Module, sharding: Sharding, device: torch.device, processes: int) -> None:
    """Replace all parameters of a module, on every process, by this process's shards; its names stay.

    Frozen ones are sharded too. The values must be the same on every process.

    Raises:
        ConfigError: the launcher names a class of which the module has no part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    # inner blocks first, as torch wants it
    for block in reversed(blocks_of(module, sharding)):
        fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard)
    # Modules that are reached in two ways, such as the processors of an IP-Adapter, belong to the block they work in.
    taken = set(filter(is_shard, module.parameters()))
    root = fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=taken)
    # Otherwise the first part that is called would be taken for the root, and validation calls parts.
    root._get_fsdp_state()._lazy_init()


def blocks_of(module: nn.Module, sharding: Sharding) -> list[nn.Module]:
    """The parts of a module whose weights are gathered one at a time, outer ones first.

    Raises:
        ConfigError: no part is of a class that the launcher names.
    """
    if sharding.whole:
        return []
    names = set(sharding.blocks)
    classes: set[str] = set()
    for part in module.modules():
        classes.add(type(part).__name__)
        if not sharding.blocks:
            names |= set(getattr(part, "_no_split_modules", None) or ())
    unknown = sorted(set(sharding.blocks) - classes)
    if unknown:
        raise ConfigError(
            f"The launcher's FSDP_TRANSFORMER_CLS_TO_WRAP names {', '.join(unknown)}, of which this training has none.",
            "Leave fsdp_transformer_layer_cls_to_wrap out: the networks name their blocks.",
        )
    return list(filter(lambda part: type(part).__name__ in names and part is not module, module.modules()))


def is_shard(tensor: object) -> bool:
    """Whether a tensor is this process's shard of a whole one."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """The whole tensor of a shard, in main memory; other tensors as they are. Every process has to call it.

    keep: whether this process wants the result; otherwise it is empty.
    """
    if not is_shard(tensor):
        return tensor
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered.cpu() if keep else gathered.new_empty(0)


def whole_state(state: Any, keep: bool = True) -> Any:
    """A state dict of an optimizer with whole tensors. Every process has to call it."""
    if isinstance(state, Tensor):
        return whole(state, keep)
    if isinstance(state, dict):
        return map_values(lambda value: whole_state(value, keep), state)
    if isinstance(state, list):
        return [whole_state(value, keep) for value in state]
    return state


def shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """This process's shard of a whole tensor that all of them have, placed as ``example`` is, which may be no shard."""
    if not is_shard(example) or tensor.shape != example.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: DTensor = example  # type: ignore[assignment]
    moved = tensor.to(example.device, example.dtype)
    return distribute_tensor(moved, placed.device_mesh, placed.placements, src_data_rank=None)


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """The parts of a sharded module that are gathered one at a time, and the module itself; empty if not sharded."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def gathered(module: nn.Module, sharding: Sharding | None) -> Iterator[None]:
    """A context in which every process has all weights, so that a forward pass needs no other process.

    Validation draws pictures on each process, in any number. It costs the memory of the whole weights.
    """
    parts = fsdp_modules(module) if sharding else []
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(bool(sharding and sharding.reshard and part is not module), recurse=False)


def make_whole(module: nn.Module, keep: bool) -> None:
    """Replace the shards of a module by whole tensors in main memory, for good: no forward pass may follow.

    Every process has to call it. keep: whether this process wants them; otherwise its shards stay.
    """
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not is_shard(parameter):
                continue
            if id(parameter) not in found:  # tied weights stay tied
                found[id(parameter)] = nn.Parameter(whole(parameter, keep), parameter.requires_grad)
            if keep:
                setattr(part, name, found[id(parameter)])
    log.debug("gathered %d sharded parameters", len(found))
