"""The pages: commands that are valid, keys that exist, messages that are current, and a site without broken links."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from packshot.cli import COMMANDS, FLAGS
from packshot.config.compose import compose
from packshot.config.keys import fields
from packshot.config.schema import SCRIPTS
from packshot.multirun import expand
from tools import list_errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGE = re.compile(r"(?:python (?P<script>\w+)\.py|packshot (?P<stage>\w+))\b(?P<rest>[^`\n#&|;>)]*)")


def command_lines(page):
    """The commands of a page, those over several lines in one."""
    return page.read_text(encoding="utf-8").replace("\\\n", " ")


def commands():
    """(page, stage, overrides) of every command that a page shows."""
    for page in PAGES:
        for found in STAGE.finditer(command_lines(page)):
            stage = found["script"] or found["stage"]
            if stage in SCRIPTS:
                yield pytest.param(stage, found["rest"], id=f"{page.name}: {found[0][:60]}")


def overrides_of(text):
    """The overrides of a command, and whether it can be composed here: ``...`` stands for anything."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = shlex.split(text.replace("'", ""))
    taken = []
    for word in words:
        if "=" not in word or word.startswith("-"):
            continue
        taken.append(word.rstrip(",.:"))
    return taken


@pytest.mark.parametrize(("stage", "rest"), commands())
def test_every_command_in_the_pages_is_valid(stage, rest):
    """Its keys exist and its values have the right kind; files that only an example has are not looked for."""
    overrides = overrides_of(rest)
    if any(set("<{$") & set(override) or "..." in override for override in overrides):
        known = {key for key, *_ in fields(SCRIPTS[stage])}
        for override in overrides:
            key = override.partition("=")[0]
            assert key in known or not key.count("."), override
        return
    for job in expand(stage, overrides) if "--multirun" in rest else [overrides]:
        compose(stage, job)


def test_keys_in_the_table_for_other_trainers_exist():
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    known = {key for schema in SCRIPTS.values() for key, *_ in fields(schema)}
    roots = {key.partition(".")[0] for key in known}
    named = re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?=[=`,\s)])", text)
    unknown = [key for key in named if key.partition(".")[0] in roots and key not in known]
    assert len(named) > 20
    assert unknown == []


def test_the_table_of_messages_is_current():
    written = list_errors.PAGE.read_text(encoding="utf-8")
    assert written.endswith(list_errors.table()), "python -m tools.list_errors writes it"


def test_the_site_is_built_without_broken_links(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "troubleshooting" / "index.html").exists()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_commands_are_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"packshot {name}" not in text and f"mode={name}" not in text]
    assert missing == []
    assert FLAGS


BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_starts_by_the_command_it_names(path):
    """A script in a folder does not see the other folders of the checkout; a module does."""
    name = f"benchmarks.{path.stem}"
    module = importlib.import_module(name)
    if hasattr(module, "main"):
        assert f"python -m {name}" in module.__doc__


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_answers_help(path, monkeypatch, capsys):
    main = getattr(importlib.import_module(f"benchmarks.{path.stem}"), "main", None)
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    if main is not None:
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        assert "usage:" in capsys.readouterr().out
