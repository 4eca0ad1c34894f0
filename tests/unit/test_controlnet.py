"""ControlNets: where they start, what they work along with, and what they are shown of masks, depth and light."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from PIL import Image

from packshot.base.controlnets import read_control
from packshot.base.load import load_parts
from packshot.base.shapes import meta_parts
from packshot.config.compose import compose
from packshot.config.schema import AdaptersConfig, Condition, ControlNetMethod, GenerateSettings, ModelConfig
from packshot.dataset.rows import load_rows
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError, PackshotError
from packshot.generate.adapters import check_adapters
from packshot.imaging.control_maps import Control
from packshot.imaging.light_direction import light_direction
from packshot.methods import METHODS
from packshot.train.examples import framed
from packshot.train.plan import make_plan

KEY = SampleKey(0, 0, "sample")


def build(parts, **settings):
    return METHODS[ControlNetMethod](parts, ControlNetMethod(**settings))


def wake(net, seed=1):
    """Values for what starts at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))


def inputs(parts, method, row):
    g = torch.Generator().manual_seed(0)
    batch = {
        "prompt_embeds": torch.randn(1, 77, parts.unet.config.cross_attention_dim, generator=g),
        "pooled_prompt_embeds": torch.randn(1, parts.text_encoder_2.config.projection_dim, generator=g),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
    }
    batch |= {name: tensor[None] for name, tensor in method.condition(row, {}, KEY).items()}
    return torch.randn(1, 4, 16, 16, generator=g), torch.tensor([500]), batch


def predict(parts, method, row):
    with torch.no_grad():
        return method.predict(*inputs(parts, method, row))


@pytest.fixture(scope="module")
def row(rows):
    return framed(rows.read(0, ("image", "mask", "depth", "shadow")), (128, 128))


@pytest.fixture
def exports(parts, tmp_path):
    """Export folders of an inpaint and a depth ControlNet that do something."""
    folders = []
    for number, condition in enumerate((Condition.inpaint, Condition.depth)):
        method = build(parts, condition=condition, mask_grow=-1.0)
        wake(method.controlnet, number)
        folders.append(tmp_path / condition.name)
        method.export(folders[-1])
    return folders


@pytest.mark.parametrize("condition", list(Condition), ids=str)
def test_every_condition_is_drawn_from_a_rendered_sample(condition, parts, row):
    method = build(parts, condition=condition)
    control = method.condition(row, {}, KEY)["control_0"]
    assert control.shape == (3, 128, 128)
    assert -1 <= control.min() < control.max() <= 1
    assert ("depth" in method.pictures) == (condition is Condition.depth)
    assert ("shadow" in method.pictures) == (condition is Condition.light)


@pytest.mark.parametrize(("condition", "column"), [(Condition.depth, "depth"), (Condition.light, "shadow")], ids=str)
def test_a_sample_without_what_a_map_is_drawn_from_is_named(condition, column, parts, row):
    method = build(parts, condition=condition)
    for missing in (column, "mask"):
        with pytest.raises(PackshotError, match=f"{row['id']} has no {missing}"):
            method.condition({**row, missing: None}, {}, KEY)


def test_light_is_read_off_the_shadows_of_rendered_scenes(rows):
    """Against the words that each scene was rendered from, which are never read here."""
    sides = {"left": [], "right": []}
    for index in range(len(rows)):
        lighting = rows.read(index, ())["scene"].lighting or ""
        side = next((side for side in sides if f"from the {side} side" in lighting), None)
        if side:
            pictures = rows.read(index, ("mask", "shadow"))
            shadow_HW, mask_HW = (np.asarray(pictures[name], np.float32) / 255 for name in ("shadow", "mask"))
            sides[side].append(light_direction(shadow_HW, mask_HW))
    left, right = (np.array(sides[side]) for side in ("left", "right"))
    assert min(len(left), len(right)) > 20
    towards = np.concatenate([-left[:, 0], right[:, 0]])
    assert np.mean(towards > 0) > 0.95
    assert np.mean(towards > 0.5) > 0.85
    assert np.mean(towards < -0.3) < 0.02


def test_light_is_open_without_a_shadow_on_one_side():
    mask = np.zeros((64, 64), np.float32)
    mask[20:40, 28:36] = 1
    down, across = np.indices(mask.shape) + 0.5
    around = np.hypot(down - 40, across - 32) < 12
    for shadow in (np.ones_like(mask), np.where(around, 0.5, 1)):
        assert np.hypot(*light_direction(shadow, mask)) < 0.4  # behind the product a shadow is not seen
    right, up = light_direction(np.where(around & (across > 34) & (down > 40), 0.5, 1), mask)
    assert right < -0.5 < 0.5 < up  # thrown to the right and towards the camera: from the left, behind
    assert light_direction(shadow, np.zeros_like(mask)) == (0, 0)


def test_image_mask_and_depth_go_through_one_geometry(rows):
    sample = rows.read(0, ("image", "mask", "depth"))
    wide = {name: sample[name].resize((192, 128)) for name in ("image", "mask", "depth")}
    same = framed({**sample, **wide, "depth": wide["mask"]}, (128, 128))
    assert np.array_equal(np.asarray(same["depth"]), np.asarray(same["mask"]))  # nothing is letterboxed here
    with pytest.raises(PackshotError, match="its depth 192x128"):
        framed({**sample, "depth": wide["depth"]}, (128, 128))


# ---- where a ControlNet starts ----


def test_training_starts_from_a_controlnet_that_is_named(exports, row):
    parts = load_parts(ModelConfig())
    method = build(parts, init=str(exports[0]))
    plain = build(load_parts(ModelConfig()))
    before = ControlNetModel.from_pretrained(exports[0]).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in method.controlnet.state_dict().items())
    assert all(p.requires_grad for p in method.controlnet.parameters())
    assert not torch.equal(predict(parts, method, row), predict(parts, plain, row))


def test_a_controlnet_of_another_base_is_refused(exports, tmp_path, parts):
    file = exports[0] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cross_attention_dim": 2048}))
    for key, settings in (
        ("method.init", {"init": str(exports[0])}),
        ("method.extra_controlnets", {"extra_controlnets": [str(exports[0])]}),
    ):
        with pytest.raises(ConfigError, match=rf"{key}=.*cross_attention_dim 128 and not 2048"):
            build(parts, **settings)
    with pytest.raises(ConfigError, match=r"method\.init=.*(cannot be loaded|no such file)"):
        build(parts, init=str(tmp_path / "nothing"))


def test_controlnet_at_sdxl_size_has_the_published_shapes():
    """The layout of diffusers' SDXL ControlNets, of which EcomXL's is one, written down by hand."""
    parts = meta_parts(ModelConfig(base="stabilityai/stable-diffusion-xl-base-1.0", resolution=1024))
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in build(parts).controlnet.state_dict().items()}
    embedding = {
        "conv_in": (16, 3), "blocks.0": (16, 16), "blocks.1": (32, 16), "blocks.2": (32, 32), "blocks.3": (96, 32),
        "blocks.4": (96, 96), "blocks.5": (256, 96), "conv_out": (320, 256),
    }  # fmt: skip
    for name, channels in embedding.items():
        assert state[f"controlnet_cond_embedding.{name}.weight"] == (*channels, 3, 3)
    widths = (320, 320, 320, 320, 640, 640, 640, 1280, 1280)
    for number, width in enumerate(widths):
        assert state[f"controlnet_down_blocks.{number}.weight"] == (width, width, 1, 1)
    assert f"controlnet_down_blocks.{len(widths)}.weight" not in state
    assert state["controlnet_mid_block.weight"] == (1280, 1280, 1, 1)
    assert state["conv_in.weight"] == (320, 4, 3, 3)
    assert state["add_embedding.linear_1.weight"] == (1280, 2816)
    assert state["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
    assert sum(np.prod(shape) for shape in state.values()) == 1_251_014_160


def test_a_plan_needs_no_values_of_the_controlnets_it_names(exports):
    alone = make_plan(compose("train_controlnet", []), samples=10)
    named = compose("train_controlnet", [f"method.init={exports[0]}", f"method.extra_controlnets=[{exports[1]}]"])
    plan = make_plan(named, samples=10)
    assert plan.trained_parameters == alone.trained_parameters
    assert plan.frozen_parameters == alone.frozen_parameters + alone.trained_parameters
    named.method.train_extras = True
    assert make_plan(named, samples=10).trained_parameters == 2 * alone.trained_parameters


# ---- several ----


def test_those_beside_add_their_residuals_and_stay_as_they_are(exports, row):
    parts = load_parts(ModelConfig())
    alone = predict(parts, build(parts, init=str(exports[1]), condition=Condition.depth, mask_grow=-1), row)
    beside = build(parts, extra_controlnets=[str(exports[1])])
    # a new ControlNet adds nothing yet
    torch.testing.assert_close(predict(parts, beside, row), alone, rtol=1e-5, atol=1e-6)
    assert beside.controls == [Control("inpaint"), Control("depth", -1.0)]
    assert beside.pictures == ("image", "mask", "depth")
    assert not any(p.requires_grad for p in beside.beside.parameters())
    assert not beside.beside.training
    assert beside.pipeline().controlnet.nets[1] is beside.beside[0]
    assert len(beside.pipeline_inputs(row, {})["image"]) == 2


def test_training_sees_what_stock_controlnets_do_at_full_weight(exports, row):
    """As generate.py draws with them by default; a weight of training's own would not travel with the export."""
    parts = load_parts(ModelConfig())
    method = build(parts, init=str(exports[0]), extra_controlnets=[str(exports[1])], mask_grow=-1)
    noisy, timesteps, batch = inputs(parts, method, row)
    given = {
        "encoder_hidden_states": batch["prompt_embeds"],
        "added_cond_kwargs": {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]},
    }
    stock = MultiControlNetModel([ControlNetModel.from_pretrained(folder) for folder in exports])
    maps = [batch["control_0"], batch["control_1"]]
    with torch.no_grad():
        downs, middle = stock(
            noisy, timesteps, controlnet_cond=maps, conditioning_scale=[1.0, 1.0], return_dict=False, **given
        )
        residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": middle}
        expected = parts.unet(noisy, timesteps, **given, **residuals).sample
    torch.testing.assert_close(predict(parts, method, row), expected, rtol=1e-5, atol=1e-5)


def test_only_joint_training_trains_and_exports_all_of_them(exports, row, tmp_path):
    parts = load_parts(ModelConfig())
    for joint in (False, True):
        method = build(parts, extra_controlnets=[str(exports[1])], train_extras=joint)
        loss = method.predict(*inputs(parts, method, row)).square().mean()
        loss.backward()
        assert any(p.grad is not None for p in method.beside.parameters()) == joint
        folder = tmp_path / str(joint)
        method.export(folder)
        assert read_control("export", folder) == Control("inpaint")
        assert (folder / "beside-1").exists() == joint
    assert read_control("export", folder / "beside-1") == Control("depth", -1.0)
    ControlNetModel.from_pretrained(folder / "beside-1")


# ---- masks ----


def test_the_outline_jitters_in_training_only(parts, row):
    exact, jittered = build(parts), build(parts, mask_jitter=4.0)

    def known(method, epoch):
        return int((method.condition(row, {}, SampleKey(0, epoch, row["id"]))["control_0"] >= 0).all(0).sum())

    true = known(exact, 0)
    areas = [known(jittered, epoch) for epoch in range(24)]
    assert len({known(exact, epoch) for epoch in range(3)}) == 1
    assert min(areas) < true < max(areas)
    assert areas == [known(jittered, epoch) for epoch in range(24)]
    drawn, seen = jittered.pipeline_inputs(row, {})["image"][0], exact.condition(row, {}, KEY)["control_0"]
    assert torch.equal(drawn[0], seen)


def test_growth_and_feather_are_written_down_for_inference(parts, row, tmp_path):
    method = build(parts, mask_grow=-2.0, mask_feather=4.0)
    method.export(tmp_path)
    control = read_control("export", tmp_path)
    assert asdict(control) == {"condition": "inpaint", "mask_grow": -2.0, "mask_feather": 4.0}
    values = method.condition(row, {}, KEY)["control_0"]
    between = (values > -1).any(0) & (values < 0).any(0)
    assert between.any()
    assert (values >= 0).all(0).sum() < (np.asarray(row["mask"]) >= 128).sum()


def test_letterbox_bars_have_the_depth_of_the_rim():
    near = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (128, 1)))
    sample = {"id": "x", "image": near.convert("RGB"), "mask": Image.new("L", near.size, 255), "depth": near}
    seen = framed(sample, (128, 128))
    assert np.asarray(seen["mask"])[0, 0] == 0
    assert np.asarray(seen["depth"])[0, -1] == 63


def test_a_set_without_a_needed_picture_is_refused_first(tmp_path):
    table = pq.read_table("data/rendered/heldout/part-00000.parquet").drop_columns("shadow")
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "part-00000.parquet")
    rows = load_rows("data.train", str(tmp_path / "set"))
    rows.refuse_without("data.train", ("image", "mask", "depth"))
    with pytest.raises(ConfigError, match=r"data\.train=.* has no column shadow"):
        rows.refuse_without("data.train", ("image", "mask", "shadow"))


# ---- a row of one's own ----


@pytest.fixture
def measured_set(tmp_path):
    """Eight rendered samples whose depth also stands in a column that only the dummy condition reads."""
    table = pq.read_table("data/rendered/heldout/part-00000.parquet").slice(0, 8)
    table = table.append_column("relief", table.column("depth"))
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "part-00000.parquet")
    return tmp_path / "set"


def test_a_new_condition_with_a_new_input_works_from_end_to_end(measured_set, tmp_path):
    """One row each: training reads the column, the export names the map, generation takes key, field and default."""
    train = (
        f"train_controlnet tracking=none method.condition=horizon data.train={measured_set} "
        f"data.validation={measured_set} train.max_steps=2 train.warmup_steps=1 train.batch_size=2 "
        f"train.validation_steps=2 train.validation_samples=1 train.validation_prompts=[] "
        f"data.cache=false run.dir={tmp_path / 'run'}"
    )
    draw = (
        "generate tracking=none product=data/products/serum.png num_images=1 num_inference_steps=2 guidance_scale=1 "
        f"scene.surface=table adapters.controlnets=[{tmp_path / 'run' / 'export'}]"
    )
    runs = [train, f"{draw} run.dir={tmp_path / 'asked'} camera_height=0.75", f"{draw} run.dir={tmp_path / 'left'}"]
    program = Path(__file__).with_name("dummy_condition.py")
    done = subprocess.run([sys.executable, str(program), *runs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "export" / "packshot.json").read_text())["condition"] == "horizon"
    for name, height in (("asked", 0.75), ("left", 0.25)):
        certificate = json.loads((tmp_path / name / "serum-0.json").read_text())
        assert certificate["request"]["camera_height"] == height
        assert certificate["model"]["adapters"][0]["condition"] == "horizon"
    assert "0.75 of the picture" in (tmp_path / "asked" / "report.html").read_text()


def test_a_setting_that_no_controlnet_reads_is_refused():
    with pytest.raises(ConfigError, match=r"light_angle=90 has no effect: no ControlNet reads light"):
        check_adapters(AdaptersConfig(), {}, GenerateSettings(**{"light_angle": 90.0}))
