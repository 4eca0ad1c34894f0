"""The model card beside an export, as the hub and a person read it."""

import re
import shlex

import pytest
from huggingface_hub import ModelCard

from packshot.config.compose import compose
from packshot.dataset.rows import load_rows
from packshot.methods import method_class
from packshot.train.card import write_card

USED_AS = {
    "train_lora": lambda adapters: [adapters.lora],
    "train_ip_adapter": lambda adapters: [adapters.ip_adapter],
    "train_controlnet": lambda adapters: adapters.controlnets,
}


@pytest.mark.parametrize("script", list(USED_AS))
@pytest.mark.parametrize(("base", "published"), [("data/models/sdxl", None), ("some-one/a-base", "some-one/a-base")])
def test_the_hub_reads_a_cards_head_and_its_command_is_one(script, base, published, tmp_path):
    config = compose(script, [f"model.base={base}", "data.train=data/rendered/heldout", "tracking=none"])
    export = tmp_path / "export"
    export.mkdir()
    rows = load_rows("data.train", config.data.train[0])
    write_card(export, tmp_path, rows, config, method_class(config).used_as)
    card = ModelCard.load(export / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.base_model == published
    assert card.data.license is None
    assert script.removeprefix("train_").replace("_", "-") in card.data.tags
    (command,) = re.findall(r"^ {4}python (.+)$", card.text, flags=re.MULTILINE)
    name, *keys = shlex.split(command.replace("FOLDER", str(export)))
    assert USED_AS[script](compose(name.removesuffix(".py"), keys).adapters) == [str(export)]
