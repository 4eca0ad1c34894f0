"""Networks from files, loaded whole: all their tensors come from the files, and all tensors of the files have a place.

The libraries fill what a file lacks with random numbers, and leave out what they do not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from packshot.runs.folder import log

# A network of diffusers or transformers: its attributes are set at run time, which a type checker cannot follow
Network: TypeAlias = Any
SHOWN = 3  # names in an error
# What a file may hold besides one of CLIP's encoders: the other half of the model.
CLIP_REST = ("text_model.", "vision_model.", "text_projection.", "visual_projection.", "logit_scale")


def load_whole(
    cls: type[Network], folder: Path | str | None, rest: tuple[str, ...] = (), **arguments: object
) -> Network:
    """``cls.from_pretrained(folder, **arguments)``, if every tensor fits.

    rest: the first parts of names that the files may hold besides; how many there are is logged.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the network; names some.
    """
    if cls.__module__.startswith("transformers"):  # names the shapes afterwards, instead of an error without names
        arguments["ignore_mismatched_sizes"] = True
    network, found = cls.from_pretrained(folder, output_loading_info=True, **arguments)
    unknown = []
    unused = []
    for name in sorted(found["unexpected_keys"]):
        if name.startswith(rest):
            unused.append(name)
        elif not name.endswith("position_ids"):  # 0, 1, 2, ... in older files
            unknown.append(name)
    refuse_partial(found["missing_keys"], unknown, [str(entry[0]) for entry in found["mismatched_keys"]])
    if unused:
        log.info("%s: %d tensors are not used, such as %s", folder, len(unused), unused[0])
    return network


def load_peft(network: Network, folder: Path | str, device: str | None = None) -> Network:
    """``PeftModel.from_pretrained(network, folder)``, if every tensor fits. device: for the adapter's weights.

    Raises:
        ValueError: a tensor of the adapter is missing, or has no place in the network; names some.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    with warnings.catch_warnings():  # of the same tensors, with all their names
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(network, str(folder), torch_device=device)
    expected = set(get_peft_model_state_dict(adapted))
    found = set(load_peft_weights(str(folder), device="cpu"))
    refuse_partial(expected - found, found - expected)
    return adapted


def refuse_partial(missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str] = ()) -> None:
    """Raises ValueError, which counts the tensors of each kind and names some, unless there are none."""
    kinds = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    reasons = []
    for kind, several in kinds.items():
        names = sorted(several)
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            are = "tensor is" if len(names) == 1 else "tensors are"
            reasons.append(f"{len(names)} {are} {kind}: {', '.join(names[:SHOWN])}{more}")
    if reasons:
        raise ValueError("; ".join(reasons))
