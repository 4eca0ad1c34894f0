"""docs/rules.md names tests that exist, and pytest finds all of them."""

import re
from fnmatch import fnmatch
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


def test_pytest_looks_into_every_folder_of_tests(pytestconfig):
    """Its own list of folders to leave out has "dist", and hid the tests of several processes."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("tests/**/test_*.py")}
    assert Path("tests/dist") in folders
    for folder in folders:
        hidden = [name for name in folder.parts for pattern in left_out if fnmatch(name, pattern)]
        assert not hidden, folder
