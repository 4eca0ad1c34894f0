"""The run folder's log: nothing that comes from outside can write an entry."""

import pytest

from packshot.config.compose import compose
from packshot.core.run import log, open_run, printable


def test_names_and_tracebacks_cannot_pass_for_entries(tmp_path):
    run = open_run("evaluate", compose("evaluate", [f"run.dir={tmp_path}/run"]))
    name = "a.png\n2026-01-01 00:00:00,000 INFO all is well\x1b[2J\r\u2028x"
    log.warning("%s failed", name)
    try:
        raise ValueError(name)
    except ValueError:
        log.exception("failed")
    text = (run.path / "log.txt").read_text()
    entries = [line for line in text.splitlines() if not line.startswith("    ")]
    assert [line.split(" ", 2)[2] for line in entries] == [
        f"INFO running in {run.path}",
        "WARNING a.png",
        "ERROR failed",
    ]
    assert r"all is well\x1b[2J\r\u2028x failed" in text
    assert "    ValueError: a.png" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("Äpfel 10 € 文", "Äpfel 10 € 文"), ("a\nb\tc\x00", r"a\nb\tc\x00"), ("\udc80\u202e", r"\udc80\u202e")],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown
