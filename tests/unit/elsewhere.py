"""A device that is not the CPU, for machines without one: computed on the CPU, but a stranger to its tensors.

``python tests/unit/elsewhere.py generate|train|caption`` runs real code on it, in a process of its own, since a device
stays registered. An operation on tensors of both places fails as it would on a GPU: that is what is looked for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

torch.inference_mode = torch.no_grad  # subclasses have no views there; code is decorated with it on import


class Module(backend_registration._DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("elsewhere", backend_module=Module())
DEVICE = torch.device("elsewhere:0")
# Operations that a GPU, too, does with tensors of the CPU: copies, and indexing by them.
INDEXING = ("index", "index_put_", "_index_put_impl_")
MIXING = ("_to_copy", "copy_", *INDEXING)


class Elsewhere(torch.Tensor):
    """A tensor on the device: ``held`` on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, data, requires_grad=False):
        data = data.held if isinstance(data, Elsewhere) else data
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def __repr__(self, **_):
        return f"Elsewhere({self.held!r})"


def held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    if away and here and name not in MIXING:
        raise RuntimeError(f"{name}: {[*away[0].shape]} is on {DEVICE}, {[*here[0].shape]} on the CPU")
    if away and name in INDEXING and not isinstance(args[0], Elsewhere):
        raise RuntimeError(f"{name}: a tensor on the CPU is indexed by, or given, what is on {DEVICE}")
    device = kwargs.get("device")
    lands = bool(away) if device is None else torch.device(device).type == DEVICE.type
    if name in MIXING[1:]:
        lands = isinstance(args[0], Elsewhere)
    if device is not None and lands:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(held, args), **tree_map(held, kwargs))
    if name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, result) if lands else result


class Mode(TorchDispatchMode):
    """Takes what is made on the device, and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def copy_from(source, target, non_blocking=False):
    held(target).copy_(held(source))
    return target


KERNELS = torch.library.Library("aten", "IMPL")  # what torch's own code calls past every mode, as in x[[0, 1]]
KERNELS.impl("_copy_from", copy_from, "PrivateUse1")
KERNELS.impl("empty_strided", lambda size, stride, dtype=None, **_: Elsewhere(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1")  # fmt: skip  # noqa: E501
KERNELS.impl("empty.memory_format", lambda size, dtype=None, **_: Elsewhere(torch.empty(size, dtype=dtype)), "PrivateUse1")  # fmt: skip  # noqa: E501


# ---- what runs there ----


def place(task: Any, parts: Any, accelerator: Any, train: Any) -> None:
    """Stands for ``train.run.place``, whose way of moving a parameter in place no subclass can go."""
    from packshot.base.sdxl import NETWORKS

    moved: dict[int, Any] = {}
    for root in (task, *(getattr(parts, name) for name in NETWORKS & parts.loaded())):
        for module in root.modules():
            for name, p in module._parameters.items():
                if p is not None and not isinstance(p, Elsewhere):
                    key = id(p)
                    moved.setdefault(key, (torch.nn.Parameter(Elsewhere(p.data.clone()), p.requires_grad), p))
                    module._parameters[name] = moved[key][0]
            for name, b in module._buffers.items():
                module._buffers[name] = b if b is None or isinstance(b, Elsewhere) else Elsewhere(b.clone())
    parts._place = (DEVICE, torch.float32)


def settle_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    Accelerator.device = property(lambda self: DEVICE)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def short(folder: Path, run: str) -> list[str]:
    """Two steps, a validation and a checkpoint."""
    return [
        "tracking=none", "data.train=data/rendered/showcase", "train.max_steps=2", "train.batch_size=2",
        "train.checkpointing_steps=2", "train.validation_steps=2", "train.validation_samples=1",
        "train.log_steps=1", f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / run}",
    ]  # fmt: skip


def train(folder: Path) -> None:
    from packshot.config.compose import compose
    from packshot.train import run

    run.place = place
    run.export = lambda *_: None  # files are written from memory, which such tensors have none of
    save = torch.save
    torch.save = lambda state, file: save(tree_map(held, state), file)
    settings = {
        "train_lora": ["objective.product_conditioning=channels", "method.text_encoder=true", "train.ema_decay=0.9"],
        "train_controlnet": ["method.condition=light", "method.mask_jitter=2"],
        "train_ip_adapter": ["method.variant=plus", "method.num_tokens=4"],
    }
    for script, keys in settings.items():
        settle_accelerate()
        with Mode():
            run.train(compose(script, [*short(folder, script), *keys]))


def caption(folder: Path) -> None:
    from packshot.caption import run, train
    from packshot.config.compose import compose

    train.export = lambda *_: None
    save = torch.save
    torch.save = lambda state, file: save(tree_map(held, state), file)
    for kind in ("florence2", "llama32_vision"):
        settle_accelerate()
        with Mode():
            run.run(compose("caption_vlm", [*short(folder, kind), f"captioner={kind}"]))


def generate(folder: Path) -> None:
    from PIL import Image

    from packshot.base.load import load_parts
    from packshot.config.schema import (
        Condition,
        ControlNetMethod,
        GenerateSettings,
        IPAdapterMethod,
        LoraMethod,
        ModelConfig,
    )
    from packshot.generate import Packshot, load
    from packshot.methods import METHODS

    load.pick_device = lambda *_: (DEVICE, torch.float32)
    methods = (LoraMethod(rank=4), ControlNetMethod(condition=Condition.light), IPAdapterMethod())
    for method in methods:
        (folder / type(method).__name__).mkdir()
        METHODS[type(method)](load_parts(ModelConfig()), method).export(folder / type(method).__name__)
    lora, controlnet, ip_adapter = (str(folder / type(method).__name__) for method in methods)
    look = Image.new("RGB", (64, 64), "orange")
    with Mode():
        tool = Packshot.load(lora=lora, controlnets=[controlnet], ip_adapter=ip_adapter)
        [made] = tool.set_product("data/products/coffee.png").generate(
            "a table", 1, reference=look, settings=GenerateSettings(num_inference_steps=2)
        )
    assert made.certificate["model"]["device"] == "elsewhere"
    assert made.certificate["core"]["max_abs_diff"] == 0


if __name__ == "__main__":
    with Mode():
        try:
            torch.ones(2, device=DEVICE) + torch.ones(2)
        except RuntimeError:
            pass
        else:
            raise SystemExit("tensors of both places meet unseen")
    with TemporaryDirectory() as name:
        {"generate": generate, "train": train, "caption": caption}[sys.argv[1]](Path(name))
