"""Keys that nothing reads under another key's value: one table names them all, and none is accepted in silence."""

from dataclasses import replace

import pytest

from packshot.config.background import BackgroundConfig
from packshot.config.compose import compose
from packshot.config.keys import fields
from packshot.config.schema import Generate, GenerateSettings
from packshot.config.unread import RULES, given_keys, unread_notes
from packshot.errors import ConfigError
from packshot.generate import Packshot
from packshot.generate.run import generate

KEYS = {key for key, _, _ in fields(Generate)}


def test_every_rule_names_keys_that_exist():
    for rule in RULES:
        for key in (*rule.keys, *rule.by):
            assert any(known == key or (key.endswith(".") and known.startswith(key)) for known in KEYS), key


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["background.refine_strength=0.5"], "background.refine_strength=0.5 has no effect with background.refine"),
        (["background.sharpen=0"], "background.sharpen=0 has no effect with background.refine=none"),
        (
            ["background.refine=upscale", "background.upscaler=a.onnx", "background.refine_strength=0.5"],
            "background.refine_strength=0.5 has no effect with background.refine=upscale",
        ),
        (
            ["adapters.lora_scale=0.5"],
            "adapters.lora_scale=0.5 has no effect with adapters.lora=null and adapters.loras=[]",
        ),
        (["adapters.lora_end=0.5"], "adapters.lora_end=0.5 has no effect"),
        (
            ["adapters.ip_adapter_layers=style"],
            "adapters.ip_adapter_layers=style has no effect with adapters.ip_adapter=null",
        ),
        (["reference=a.png"], "reference=a.png has no effect with adapters.ip_adapter=null"),
        (["depth.onnx=a.onnx"], "depth.onnx=a.onnx has no effect with adapters.controlnets=[]"),
        (["light_angle=90"], "light_angle=90 has no effect with shadow=none and adapters.controlnets=[]"),
        (["light_angle=90", "background.color=[1,2,3]"], "light_angle=90 has no effect with shadow=none"),
        (["plan.gpu=h100"], "plan.gpu=h100 has no effect with mode=generate"),
        (["verify.control=0.5", "adapters.controlnets=[a]"], "verify.control=0.5 has no effect with verify.retries=0"),
    ],
)
def test_keys_that_nothing_reads_are_refused(keys, message):
    with pytest.raises(ConfigError) as error:
        compose("generate", keys)
    assert str(error.value).startswith(message)
    assert error.value.hint


@pytest.mark.parametrize(
    "keys",
    [
        ["light_angle=90", "shadow=contact"],
        ["plan.gpu=h100", "mode=plan"],
        ["background.refine=tiled", "background.refine_strength=0.5", "background.sharpen=0"],
        ["adapters.lora_scale=0.5", "adapters.lora=a"],
        ["placement=center", "size=[64,64]", "margin=0.1"],
    ],
)
def test_the_same_keys_are_accepted_where_they_are_read(keys):
    compose("generate", keys)


def test_the_python_interface_refuses_them_too():
    settings = GenerateSettings(background=BackgroundConfig(refine_strength=0.5))
    with pytest.raises(ConfigError, match=r"background\.refine_strength=0\.5 has no effect"):
        Packshot(None).make_ready("a table", settings)


def test_a_server_refuses_them_by_its_own_keys():
    with pytest.raises(ConfigError, match=r"generate\.light_angle=90 has no effect with generate\.shadow=none"):
        compose("serve", ["generate.light_angle=90"])
    compose("serve", ["generate.margin=0.1"])  # waits for requests that choose a place


def test_a_row_may_complete_what_the_command_line_begins(tmp_path):
    table = tmp_path / "jobs.csv"
    table.write_text("product,background.refine\na.png,tiled\n")
    compose("generate", [f"campaign={table}", "background.refine_strength=0.5"])


def test_noted_keys_are_counted_on_the_screen(tmp_path):
    keys = ["background.color=[9,9,9]", "num_inference_steps=9", "adapters.lora=a", "tracking=none"]
    config = compose("generate", [*keys, "num_images=1", f"run.dir={tmp_path / 'run'}"])
    noted = unread_notes([config, replace(config, num_images=2)])
    assert (
        noted[0] == "num_inference_steps=9 has no effect with background.color=[9, 9, 9]: nothing is drawn (2 products)"
    )
    assert [line.split("=")[0] for line in noted] == ["num_inference_steps", "adapters.lora"]
    generate(replace(config, adapters=type(config.adapters)()))
    assert "num_inference_steps=9 has no effect" in (tmp_path / "run" / "log.txt").read_text()


def test_given_keys_are_those_off_their_defaults():
    assert given_keys(compose("generate", ["margin=0", "tracking.kind=wandb"])) == {}
