"""One row for each captioner family and one for each task of caption_vlm.py.

Enums, config keys, help texts, checks and loading derive from them. To add a family, write its row and its module in
``caption/models``, and a YAML file in ``conf/captioner``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from packshot.lists import by_name


@dataclass(frozen=True)
class Preset:
    """What one value of ``captioner.tuning`` trains: one of two regular expressions over whole names.

    parameters: the weights that are trained themselves. modules: the linear layers that get a LoRA;
    ``CROSS_LAYERS`` in it stands for the numbers of a model's cross-attention layers.
    """

    about: str
    parameters: str = ""
    modules: str = ""


@dataclass(frozen=True)
class CaptionerFamily:
    """What one captioner family is.

    name: the value of ``captioner.kind``. title: its name in sentences.
    weights: default of ``model.<name>``, the config key of the family's weights; "" if none are loaded here.
    needs: the keys of ``captioner`` that have to be set.
    adapter: "module:function" from (ModelConfig, CaptionerConfig, trainable) to an Adapter.
    connect: "module:function" from a CaptionerConfig to a Captioner, for families whose model runs elsewhere.
    shapes: "module:function" from (folder or hub id) to a MetaCaptioner, which plans are made from.
    has_locations: its tokenizer has words for places, which ``captioner.product=box`` writes.
    presets: what can be trained of it, by the value of ``captioner.tuning``.
    """

    name: str
    title: str
    weights: str = ""
    needs: tuple[str, ...] = ()
    adapter: str = ""
    connect: str = ""
    shapes: str = ""
    has_locations: bool = False
    presets: dict[str, Preset] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether the family writes captions at all."""
        return bool(self.adapter or self.connect)


FULL = Preset("every weight", parameters=r".*")
_LLAMA_PROJECTIONS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_CROSS_ATTENTION = rf".*language_model\.layers\.(CROSS_LAYERS)\.{_LLAMA_PROJECTIONS}"
_LLAMA_VISION = r".*vision_model\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)|.*multi_modal_projector"
FAMILIES = (
    CaptionerFamily("none", "no captioner"),
    CaptionerFamily(
        "florence2",
        "Florence-2",
        weights="data/models/florence2",
        adapter="packshot.caption.models.florence2:load",
        shapes="packshot.caption.models.shapes:florence2",
        has_locations=True,
        presets={
            "full": FULL,
            "frozen_vision": Preset("all but the vision tower", parameters=r"(?!.*vision_tower\.).*"),
            # Names alone would also reach the vision tower (fc1, fc2). The output head is tied to the embedding, so a
            # LoRA on it would change both when it is merged.
            "language_lora": Preset(
                "a LoRA on the language model",
                modules=r".*language_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
            ),
        },
    ),
    CaptionerFamily(
        "llama32_vision",
        "Llama 3.2 Vision",
        weights="data/models/mllama",
        adapter="packshot.caption.models.mllama:load",
        shapes="packshot.caption.models.shapes:mllama",
        presets={
            "full": FULL,
            # Plain names would also reach the layers of the vision encoder.
            "language_lora": Preset("a LoRA on the language model", modules=rf".*language_model\.{_LLAMA_PROJECTIONS}"),
            # These layers carry into the text what is seen.
            "cross_attention_lora": Preset("a LoRA on the cross-attention layers", modules=_CROSS_ATTENTION),
            "vision_adapter": Preset(
                "a LoRA on vision encoder, projector and cross-attention layers",
                modules=rf"{_CROSS_ATTENTION}|{_LLAMA_VISION}",
            ),
        },
    ),
    CaptionerFamily(
        "endpoint",
        "a server",
        needs=("endpoint", "endpoint_model"),
        connect="packshot.caption.models.endpoint:connect",
    ),
)
CAPTIONERS = by_name(FAMILIES)


def presets() -> dict[str, list[tuple[str, Preset]]]:
    """For every value of ``captioner.tuning``, the titles of the families that take it, with their presets."""
    found: dict[str, list[tuple[str, Preset]]] = {}
    for family in FAMILIES:
        for name, preset in family.presets.items():
            found.setdefault(name, []).append((family.title, preset))
    return found


def presets_help() -> str:
    """The values of ``captioner.tuning`` with what they train, and of which families."""
    lines = []
    for name, owners in presets().items():
        titles = " and ".join(title for title, _ in owners)
        lines.append(f"{name} ({titles}: {owners[0][1].about})")
    return "; ".join(lines)


@dataclass(frozen=True)
class CaptionTaskRow:
    """One task of caption_vlm.py.

    run: "module:function" that is called with the config. needs: the keys of ``data`` that have to be set.
    trains: whether it trains the captioner. writes: whether the captioner writes captions.
    """

    name: str
    about: str
    run: str
    needs: tuple[str, ...] = ()
    trains: bool = False
    writes: bool = False


TASKS = (
    CaptionTaskRow("train", "fine-tune the captioner", "packshot.caption.train:train", trains=True),
    CaptionTaskRow("evaluate", "score it (scores.json)", "packshot.caption.evaluate:evaluate", writes=True),
    CaptionTaskRow("caption", "caption a dataset", "packshot.caption.write:caption", ("input",), writes=True),
    CaptionTaskRow(
        "review", "show a dataset's doubtful captions, as a page and a table to edit", "packshot.caption.review:review",
        ("input",),
    ),
    CaptionTaskRow(
        "correct", "take the edited table", "packshot.caption.correct:correct", ("input", "corrections")
    ),
)  # fmt: skip
CAPTION_TASKS = by_name(TASKS)
