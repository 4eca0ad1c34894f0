"""Composition, refusals and help (a typo is refused everywhere, before a model is loaded)."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given
from hypothesis.strategies import text

from packshot.cli import COMMANDS, STAGES, Stage, help_text, run_command, run_stage
from packshot.config import compose as composing
from packshot.config.compose import QUOTED, compose, quoted, to_plain, to_yaml
from packshot.config.keys import fields
from packshot.config.renamed import RENAMED, translate
from packshot.config.schema import SCRIPTS, Mode
from packshot.errors import ConfigError
from packshot.multirun import expand, jobs
from packshot.runs.folder import open_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_composes_validates_and_round_trips(script):
    config = compose(script, [])
    assert isinstance(config, SCRIPTS[script])
    assert to_yaml(config)
    assert to_plain(config)["run"]["seed"] == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learnign_rate=1", "train.learning_rate"),
        ("train.lerning_rate=abc", "train.learning_rate"),
        ("train.learning_rate=abc", "number from 0 to 1"),
        ("train.learning_rate=5", "out of range"),
        ("train.learning_rate=nan", "out of range"),
        ("method.alpha=0", "number >= 0.001"),  # an update that counts nothing never learns
        ("method.conv_alpha=0", ">= 0.001"),
        ("model=sdlx", "model=sdxl"),
        ("mode=trian", "Allowed are train, plan, check"),
        ("train.lr=1e-4", "train.learning_rate"),
        ("train=5", "a group of keys"),
        ("learning_rate=1e-4", "train.learning_rate"),
        ("train.max_steps=1.5", "integer"),
        ("train.max_steps=[1", "cannot be read"),
        ("nonsense", "key=value"),
        ("train.warmup_steps=1000", "warm-up"),
    ],
)
def test_a_wrong_override_is_refused_with_the_way_out(override, says):
    with pytest.raises(ConfigError) as caught:
        compose("train_lora", [override])
    assert says in str(caught.value)


def test_a_typo_inside_an_experiment_file_is_refused(tmp_path, monkeypatch):
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(composing.CONF, conf)
    (conf / "experiment").mkdir(exist_ok=True)
    (conf / "experiment" / "typo.yaml").write_text("# @package _global_\ntrain:\n  learnign_rate: 1\n")
    monkeypatch.setattr(composing, "CONF", conf)
    with pytest.raises(ConfigError, match="learnign_rate"):
        compose("train_lora", ["experiment=typo"])


@pytest.mark.parametrize("value", ["5", "-1", "2.0"])
def test_a_number_is_neither_true_nor_false(value):
    with pytest.raises(ConfigError, match=f"run.resume={value} has a value of the wrong type"):
        compose("train_lora", [f"run.resume={value}"])
    assert compose("train_lora", ["run.resume=1"]).run.resume is True


def test_an_experiment_of_another_script_is_refused():
    with pytest.raises(ConfigError, match=r"is for train_controlnet\.py, not for train_lora\.py"):
        compose("train_lora", ["experiment=controlnet_sdxl"])


def test_each_shipped_experiment_is_for_one_known_script():
    starts = (*composing.EXPERIMENTS, "ablation_")
    assert all(name.startswith(starts) for name in composing.options("experiment"))


def test_help_shows_what_the_chosen_files_set():
    for script, shown in (("train_lora", "tracking.kind=wandb"), ("generate", "tracking.kind=none")):
        assert f"  {shown}\n" in help_text(script, "")


def test_right_overrides_arrive_typed():
    config = compose("train_lora", ["mode=check", "method.rank=4", "tracking=none", "train.batch_size=2"])
    assert config.mode is Mode.check
    assert (config.method.rank, config.train.batch_size, str(config.tracking.kind)) == (4, 2, "none")


@pytest.mark.parametrize(
    ("script", "overrides", "says"),
    [
        ("generate", ["prompt=a table", "scene.surface=a table"], "both"),
        ("generate", ["reference=x.png"], "adapters.ip_adapter"),
        ("generate", ["references=[x.png,y.png]"], "adapters.ip_adapter"),
        ("generate", ["reference=x.png", "references=[y.png]", "adapters.ip_adapter=a"], "both"),
        ("generate", ["references=[x,y]", "reference_weights=[1]", "adapters.ip_adapter=a"], "1 values for 2"),
        ("generate", ["references=[x,y]", "reference_weights=[1,0]", "adapters.ip_adapter=a"], "whole numbers"),
        ("generate", ["references=[x,y]", "reference_weights=[1,64]", "adapters.ip_adapter=a"], "at most 64"),
        ("generate", ["reference_weights=[1]"], "has no effect with reference=null"),
        ("generate", ["placement=center"], "size"),
        ("generate", ["adapters.controlnet_scales=[1,2]"], "controlnet_scales"),
        ("serve", ["generate.placement=center"], "size"),
        ("train_lora", ["tracking.tags=[" + "x" * 65 + "]"], "64"),
    ],
)
def test_values_that_contradict_each_other_are_refused(script, overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose(script, overrides)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_key_without_heavy_imports(script):
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path(r'{ROOT / (script + '.py')}', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'cv2', 'hydra', 'wandb', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "run.dir=null" in done.stdout


@pytest.mark.parametrize("arguments", [["generate", "--help"], ["bench", "--help"], ["--help"], ["generate", "--cfg"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    """``packshot generate --help | head -1``."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "packshot", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_words_beyond_the_terminal_s_encoding_are_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "generate.py", "scene.surface=a marble table, weiß", "--cfg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "surface: a marble table, wei\\xdf" in done.stdout


def test_a_shell_that_is_not_in_utf8_is_refused():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    for command in (["generate.py", "tracking=none"], ["-m", "packshot", "show", "sets/größe"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 2, done.stderr
        assert "read names and words as ascii, not as UTF-8.\n  Start with PYTHONUTF8=1" in done.stderr
    help_text = [sys.executable, "generate.py", "--help"]
    assert subprocess.run(help_text, capture_output=True, cwd=ROOT, env=environment).returncode == 0


def test_exit_code_of_a_wrong_key():
    done = subprocess.run(
        [sys.executable, "train_lora.py", "train.learnign_rate=1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "train.learnign_rate" in done.stderr
    assert "train.learning_rate" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective.min_snr_gamma=4"], "no effect with objective.loss_weighting=none"),
        (["objective.loss_weighting=debiased", "objective.min_snr_gamma=4"], "no effect"),
        (
            [
                "objective.zero_terminal_snr=true",
                "objective.prediction_type=epsilon",
                "objective.loss_weighting=min_snr",
            ],
            "divide by zero",
        ),
        (
            [
                "objective.zero_terminal_snr=true",
                "objective.prediction_type=epsilon",
                "objective.loss_weighting=debiased",
            ],
            "divide by zero",
        ),
        (["objective.zero_terminal_snr=true", "objective.prediction_type=epsilon"], "input is the answer"),
        (["objective.logit_normal_scale=0"], "out of range"),
        (["objective.min_timestep=-1"], "out of range"),
        (["objective.min_snr_gamma=0"], "out of range"),
        (["objective.input_perturbation=2"], "out of range"),
        (["objective.timestep_sampling=cubix"], "Allowed are uniform, logit_normal, cubic"),
        (["objective.min_timestep=500", "objective.max_timestep=500"], "not above"),
    ],
)
def test_objectives_without_meaning_are_refused(overrides, says):
    """They are refused before a model loads."""
    with pytest.raises(ConfigError, match=says):
        compose("train_lora", overrides)


@pytest.mark.parametrize(
    ("script", "overrides", "says"),
    [
        ("merge", ["model.loras=[a]", "model.lora_scales=[nan]"], r"model.lora_scales=\[nan\] is out of range"),
        ("train_lora", ["model.loras=[a]", "model.lora_scales=[1e30]"], "list of number from -10 to 10"),
        (
            "generate",
            ["adapters.controlnets=[x]", "adapters.controlnet_scales=[inf]"],
            "controlnet_scales=.* out of range",
        ),
        ("merge", ["model.loras=[a,b,a]"], "model.loras names a more than once"),
    ],
)
def test_numbers_in_lists_are_checked_too(script, overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose(script, overrides)


def test_timesteps_beyond_the_schedule_of_the_base_are_refused():
    from packshot.config.train import ObjectiveConfig, check_objective

    for objective in (ObjectiveConfig(min_timestep=1000), ObjectiveConfig(max_timestep=1000)):
        check_objective(objective, "epsilon")
        with pytest.raises(ConfigError, match="last step is 999"):
            check_objective(objective, "epsilon", 1000)
    check_objective(ObjectiveConfig(min_timestep=998, max_timestep=999), "epsilon", 1000)


def test_a_base_whose_prediction_has_no_target_is_refused():
    from packshot.config.train import ObjectiveConfig, check_objective

    with pytest.raises(ConfigError, match="'sample'"):
        check_objective(ObjectiveConfig(), "sample")


def test_a_base_that_predicts_epsilon_refuses_zero_terminal_snr():
    from packshot.config.train import ObjectiveConfig, check_objective

    with pytest.raises(ConfigError, match="v_prediction"):
        check_objective(ObjectiveConfig(zero_terminal_snr=True), "epsilon")
    check_objective(ObjectiveConfig(zero_terminal_snr=True), "v_prediction")


@given(text().filter(lambda t: t != "null" and "${" not in t))
def test_the_value_of_a_text_key_arrives_as_it_was_typed(value):
    assume(not QUOTED.fullmatch(value))
    [parsed] = OverridesParser.create().parse_overrides([quoted(f"prompt={value}", {"prompt"})])
    assert parsed.value() == value


@pytest.mark.parametrize(
    "value",
    ["a marble table, palm leaves", "don't", "фото (1).png", "~/a #1.png", "007", "true", "'80s style", "a\\", "[x]"],
)
def test_prompts_and_file_names_need_no_quoting(value):
    config = compose("generate", [f"prompt={value}", f"product={value}", "run.dir=null"])
    assert (config.prompt, config.product, config.run.dir) == (value, value, None)


def test_quotes_and_interpolations_are_left_to_hydra():
    config = compose("generate", ["prompt='a, b'", 'product="c"', "run.dir=${prompt}"])
    assert (config.prompt, config.product, config.run.dir) == ("a, b", "c", "a, b")


def test_a_list_with_odd_characters_says_how_to_quote():
    with pytest.raises(ConfigError, match="quotes"):
        compose("generate", ["scene.surroundings=[café]"])
    assert compose("generate", ["scene.surroundings=['café, closed']"]).scene.surroundings == ["café, closed"]


@pytest.mark.parametrize("slot", ["scene.mood=calm", "scene.style=[85mm]"])
def test_no_slot_of_a_scene_is_dropped_for_a_prompt(slot):
    with pytest.raises(ConfigError, match="both given"):
        compose("generate", ["product=a.png", "prompt=a table", slot])


def test_a_seed_that_generators_cannot_take_is_refused():
    with pytest.raises(ConfigError, match=r"run\.seed=.* is out of range"):
        compose("train_lora", [f"run.seed={2**64}"])


@pytest.mark.parametrize("override", ["tracking.project=a/b", "tracking.project=", "tracking.tags=['']"])
def test_what_wandb_would_not_take_is_refused(override):
    with pytest.raises(ConfigError, match=r"tracking\.(project|tags)"):
        compose("train_lora", [override])


def renamed_keys():
    """(script, row) for every renamed key and every script that has its new name."""
    keys = {script: {key for key, _, _ in fields(schema)} for script, schema in SCRIPTS.items()}
    return [(script, row) for row in RENAMED for script in SCRIPTS if row.new in keys[script]]


@pytest.mark.parametrize(("script", "row"), renamed_keys())
def test_an_override_with_a_renamed_key_names_the_new_one(script, row):
    with pytest.raises(ConfigError, match=f"{row.old} is now called {row.new}") as caught:
        compose(script, [f"{row.old}=1"])
    assert row.new.partition(".")[0] in caught.value.hint


@pytest.mark.parametrize(("script", "row"), renamed_keys())
def test_a_yaml_file_with_a_renamed_key_names_the_new_one(script, row, tmp_path, monkeypatch):
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(composing.CONF, conf)
    group, name = row.old.split(".")
    experiments = script.startswith(("train", "caption"))
    file = conf / "experiment" / "old.yaml" if experiments else conf / f"{script}.yaml"
    head = "# @package _global_\n" if experiments else file.read_text()
    file.write_text(f"{head}{group}:\n  {name}: 1\n")
    monkeypatch.setattr(composing, "CONF", conf)
    with pytest.raises(ConfigError, match=f"{row.old} is now called {row.new}"):
        compose(script, ["experiment=old"] if experiments else [])


def test_old_keys_of_masks_become_the_one_of_today():
    for old, new in (
        ({"onnx": None, "network": None}, "grabcut"),
        ({"onnx": None, "network": "data/models/matting"}, "mini"),
        ({"onnx": "isnet.onnx", "network": None}, "isnet.onnx"),
    ):
        assert translate({"matte": old}) == {"matte": {"model": new}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"snr_gamma": None, "debiased": False}, {"loss_weighting": "none", "min_snr_gamma": 5.0}),
        ({"snr_gamma": None, "debiased": True}, {"loss_weighting": "debiased", "min_snr_gamma": 5.0}),
        ({"snr_gamma": 3.0, "debiased": False}, {"loss_weighting": "min_snr", "min_snr_gamma": 3.0}),
    ],
)
def test_a_finished_config_of_an_older_version_is_translated(old, new):
    config = {"objective": {**old, "noise_offset": 0.1}, "run": {"seed": 0}}
    assert translate(config) == {"objective": {**new, "noise_offset": 0.1}, "run": {"seed": 0}}
    assert set(config["objective"]) == {*old, "noise_offset"}


def test_a_config_with_today_s_keys_is_left_alone():
    today = to_plain(compose("train_lora", ["objective.loss_weighting=min_snr", "objective.min_snr_gamma=4"]))
    assert translate(today) == today


# ---- config files from anywhere, and sweeps ----


def experiment_file(path, steps):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\ntrain:\n  max_steps: {steps}\n")
    return path


def test_an_experiment_file_may_lie_anywhere(tmp_path):
    file = experiment_file(tmp_path / "mine.yaml", 7)
    assert compose("train_lora", [f"experiment={file}"]).train.max_steps == 7
    with pytest.raises(ConfigError, match="no such file"):
        compose("train_lora", [f"experiment={tmp_path}/gone.yaml"])


def test_a_config_folder_adds_options_to_the_shipped_ones(tmp_path):
    experiment_file(tmp_path / "experiment" / "mine.yaml", 7)
    config = compose("train_lora", ["experiment=mine", "model=sdxl", "train.warmup_steps=1"], tmp_path)
    assert (config.train.max_steps, config.model.resolution) == (7, 1024)
    with pytest.raises(ConfigError, match=r"experiment takes .*mine"):
        compose("train_lora", ["experiment=other"], tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        compose("train_lora", [], tmp_path / "gone")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a=1,2", "b=x"], [["a=1", "b=x"], ["a=2", "b=x"]]),
        (["a=1,2", "b=range(0,2)"], [["a=1", "b=0"], ["a=1", "b=1"], ["a=2", "b=0"], ["a=2", "b=1"]]),
        (["a=choice(x,y)"], [["a=x"], ["a=y"]]),
        (["a=[1,2]", "b='x, y'"], [["a=[1,2]", "b='x, y'"]]),
    ],
)
def test_a_sweep_expands_in_hydras_grammar(overrides, expected):
    assert expand("train_lora", overrides) == expected


def test_jobs_of_a_sweep_share_a_group():
    """Each job has a folder of its own."""
    found = jobs("train_lora", ["run.dir=outputs/rates", "train.learning_rate=1e-4,2e-4"])
    assert found == [
        [f"train.learning_rate={rate}", "tracking.group=rates", f"run.dir=outputs/rates/{index}"]
        for index, rate in enumerate(("0.0001", "0.0002"))
    ]


def test_multirun_prints_its_commands_or_starts_them(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("subprocess.run", lambda command: started.append(command) or SimpleNamespace(returncode=0))
    arguments = ["--multirun", "method.rank=4,8", f"run.dir={tmp_path}/sweep"]
    with pytest.raises(SystemExit) as ended:
        run_stage("train_lora", [*arguments, "--multirun.dry=true"])
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert (ended.value.code, started) == (0, [])
    with pytest.raises(SystemExit):
        run_stage("train_lora", arguments)
    assert [command[1:3] for command in started] == [["-m", "packshot"]] * 2
    assert [command[3:] for command in started] == [command[1:] for command in printed]


def test_a_sweep_ends_with_its_losses_the_best_one_first(tmp_path, monkeypatch, capsys):
    def train(command):
        folder = Path(command[-1].removeprefix("run.dir="))
        folder.mkdir(parents=True)
        loss = {"0": 0.5, "1": 0.25, "2": 0.75}[folder.name]
        lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": loss}, {"step": 2, "validation_loss": loss / 2}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return SimpleNamespace(returncode=int(folder.name == "2"))

    monkeypatch.setattr("subprocess.run", train)
    with pytest.raises(SystemExit):
        run_stage("train_lora", ["-m", "method.rank=4,8,16", "train.max_steps=2", f"run.dir={tmp_path}/sweep"])
    printed = capsys.readouterr()
    said = printed.out.splitlines()
    head = said.index("| method.rank | last loss | validation_loss | run.dir |")
    assert said[head + 2 : head + 4] == [
        f"| 8 | 0.25000 | 0.12500 | {tmp_path}/sweep/1 |",
        f"| 4 | 0.50000 | 0.25000 | {tmp_path}/sweep/0 |",
    ]
    assert "1 of 3 jobs failed" in printed.err


def test_a_sweep_with_one_refused_job_starts_none(monkeypatch, capsys):
    monkeypatch.setattr("subprocess.run", lambda command: pytest.fail("started"))
    with pytest.raises(SystemExit) as ended:
        run_stage("train_lora", ["-m", "method.rank=4,0"])
    assert ended.value.code == 2
    assert "method.rank=0 is out of range" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--cfg"], ["--cfg", "job"], ["-c", "job"]])
def test_the_config_of_the_job_is_printed(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        run_stage("evaluate", ["suite=scene", *flags])
    assert ended.value.code == 0
    assert "suite: scene" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--cfg", "all"], ["--foo"], ["--multirun.dry=maybe"], ["--config-dir"]])
def test_a_flag_that_is_not_known_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        run_stage("evaluate", flags)
    assert ended.value.code == 2


WRONG = [(name, ["--nothing"]) for name in COMMANDS]
WRONG += [
    ("verify", []),
    ("verify", ["a.png"]),
    ("verify", ["a"] * 4),
    ("verify", ["--mask"]),
    ("verify", ["a", "b", "--matte", "grabcat"]),
    ("bench", []),
    ("show", []),
]


@pytest.mark.parametrize(("name", "arguments"), WRONG)
def test_commands_refuse_arguments_as_stages_do(name, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(name, arguments)
    message, *hints = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert message.startswith("error: ")
    assert hints
    assert all(hint.startswith("  ") for hint in hints)


def test_a_refused_config_leaves_no_run_folder(tmp_path, monkeypatch, capsys):
    """The rule: unless the folder was resumed, or holds work."""

    def refuse(config):
        run = open_run("evaluate", config)
        if config.suite.name == "scene":
            run.metrics({"step": 0})
        raise ConfigError("It does not fit.")

    monkeypatch.setitem(sys.modules, "work", SimpleNamespace(refuse=refuse))
    monkeypatch.setitem(STAGES, "evaluate", Stage("", "work:refuse"))
    for suite, stays in (("full", False), ("scene", True)):
        with pytest.raises(SystemExit) as ended:
            run_stage("evaluate", [f"run.dir={tmp_path}/{suite}", f"suite={suite}"])
        assert ended.value.code == 2
        assert (tmp_path / suite).exists() is stays
