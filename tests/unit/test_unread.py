"""Keys that nothing reads under another key's value: one table names them all, and none is accepted in silence."""

from dataclasses import replace

import pytest

from packshot.config.background import BackgroundConfig
from packshot.config.compose import compose
from packshot.config.keys import fields
from packshot.config.schema import SCRIPTS, GenerateSettings
from packshot.config.unread import NOTED_IN_SCRIPTS, RULES, SCRIPT_RULES, given_keys, script_notes, unread_notes
from packshot.errors import ConfigError
from packshot.generate import Packshot
from packshot.generate.run import generate
from packshot.runs.folder import open_run

KEYS = {name: {key for key, _, _ in fields(schema)} for name, schema in SCRIPTS.items()}


def has(script, key):
    return any(known == key or (key.endswith(".") and known.startswith(key)) for known in KEYS[script])


def test_every_rule_names_keys_that_exist():
    for rule in RULES:
        for key in (*rule.keys, *rule.by):
            assert has("generate", key), key
    for rule in (*SCRIPT_RULES, *NOTED_IN_SCRIPTS):
        for key in rule.keys:
            assert any(all(has(script, name) for name in (key, *rule.by)) for script in SCRIPTS), key


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
        (["shadow_strength=2"], "shadow_strength=2 has no effect with shadow=none"),
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
    ("script", "keys", "message"),
    [
        ("train_lora", ["tracking=none", "tracking.tags=[a]"], "tracking.tags=['a'] has no effect with tracking.kind"),
        ("build_data", ["tracking.project=p"], "tracking.project=p has no effect with tracking.kind=none"),
        ("generate", ["tracking=tensorboard", "tracking.notes=n"], "tracking.notes=n has no effect"),
        ("train_controlnet", ["plan.gpus=8"], "plan.gpus=8 has no effect with mode=train"),
        ("caption_vlm", ["plan.images=8"], "plan.images=8 has no effect with mode=run"),
        ("train_lora", ["train.lr_cycles=2"], "train.lr_cycles=2 has no effect with train.lr_schedule=cosine"),
        ("train_lora", ["optim=schedule_free", "train.lr_min_ratio=0.1"], "train.lr_min_ratio=0.1 has no effect"),
        (
            "train_ip_adapter",
            ["train.validation_steps=0", "train.validation_seeds=2"],
            "train.validation_seeds=2 has no effect with train.validation_steps=0: nothing is validated",
        ),
        ("train_lora", ["data.validation=a", "data.holdout_share=0.2"], "data.holdout_share=0.2 has no effect"),
        ("train_lora", ["data.buckets=false", "data.smallest_bucket=4"], "data.smallest_bucket=4 has no effect"),
        ("train_lora", ["objective.boundary_width=1"], "objective.boundary_width=1 has no effect"),
        ("train_lora", ["objective.logit_normal_scale=2"], "objective.logit_normal_scale=2 has no effect"),
        ("train_lora", ["method.target_modules=a", "method.targets=all_linear"], "method.targets=all_linear has no"),
        ("train_ip_adapter", ["method.reference=self", "method.peer_reference_prob=0.1"], "method.peer_reference_prob"),
        ("train_controlnet", ["method.train_extras=true"], "method.train_extras=true has no effect"),
        ("build_data", ["captioner.prompt=a"], "captioner.prompt=a has no effect with captioner.kind=none"),
        ("evaluate", ["captioner.endpoint=a"], "captioner.endpoint=a has no effect with captioner.kind=florence2"),
        (
            "caption_vlm",
            ["task=caption", "data.input=a", "captioner=endpoint", "captioner.endpoint=a", "captioner.endpoint_model=b"]
            + ["captioner.dtype=float16"],
            "captioner.dtype=float16 has no effect with captioner.kind=endpoint, whose weights are not here",
        ),
        ("caption_vlm", ["captioner.lora_rank=4"], "captioner.lora_rank=4 has no effect with captioner.tuning=full"),
        ("caption_vlm", ["data.corrections=a.csv"], "data.corrections=a.csv has no effect with task=train"),
        ("build_data", ["review.count=1"], "review.count=1 has no effect with task=build"),
        ("build_data", ["render.size=64"], "render.size=64 has no effect with dataset=product"),
        ("build_data", ["dataset=rendered", "source.path=a"], "source.path=a has no effect with dataset=rendered"),
        ("build_data", ["dataset=background", "source.masks=a"], "source.masks=a has no effect"),
        ("build_data", ["curation.detector=a.onnx"], "curation.detector=a.onnx has no effect"),
        ("build_data", ["dataset=rendered", "render.count=1", "render.seeds=[1]"], "render.count=1 has no effect"),
        ("evaluate", ["scores.clip=a"], "scores.clip=a has no effect with items=null"),
    ],
)  # fmt: skip
def test_every_script_names_keys_that_nothing_reads(script, keys, message):
    (line,) = script_notes(compose(script, keys))
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["licenses.allowed=[a]"], "licenses.allowed=['a'] has no effect with licenses.commercial=false"),
        (["method.text_rank=2"], "method.text_rank=2 has no effect with method.text_encoder=false"),
        (["objective.loss_weighting=none", "objective.min_snr_gamma=2"], "objective.min_snr_gamma=2 has no effect"),
    ],
)
def test_keys_that_can_only_be_a_mistake_are_refused(keys, message):
    with pytest.raises(ConfigError) as error:
        compose("train_lora", keys)
    assert str(error.value).startswith(message)
    assert error.value.hint


def test_a_run_says_which_of_its_keys_nothing_reads(tmp_path, capsys):
    config = compose("train_lora", ["tracking=none", "tracking.tags=[a]", f"run.dir={tmp_path / 'run'}"])
    open_run("train_lora", config)
    assert "tracking.tags=['a'] has no effect with tracking.kind=none" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_default_is_called_unread(script):
    """Whatever else is chosen: a default is nothing that a person gave."""
    assert not script_notes(compose(script, ["tracking=none"]))
    for captioner in ("none", "florence2") if script in ("build_data", "evaluate") else ():
        assert not script_notes(compose(script, [f"captioner={captioner}"]))


@pytest.mark.parametrize(
    "keys",
    [
        ["light_angle=90", "shadow=contact"],
        ["shadow_strength=2", "shadow=auto"],
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
