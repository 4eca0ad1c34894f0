"""docs/rules.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_rule_names_tests_that_exist():
    page = (ROOT / "docs" / "rules.md").read_text()
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in ROOT.glob("tests/**/*.py")), re.M))
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| rule")]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert not set(named) - defined
