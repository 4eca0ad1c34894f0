"""List every error message of ``src/packshot`` with its way out: ``python -m tools.list_errors`` writes the table.

docs/troubleshooting.md has a part that a person wrote, and below its last heading the table. A test compares the table
with the code.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "packshot"
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = "## Every message"
ERRORS = ("ConfigError", "PackshotError")
# What the rooms do, as a reader of a message knows them.
ROOMS = {
    "config": "Keys and values",
    "make_dataset": "Building datasets",
    "dataset": "Reading datasets",
    "imaging": "Pictures and masks",
    "pipeline": "Steps and workers",
    "render": "Rendering",
    "base": "Weights",
    "methods": "Methods",
    "engine": "Training loop and checkpoints",
    "train": "Training",
    "caption": "Captioning",
    "generate": "Generation",
    "evaluate": "Evaluation",
    "serve": "Service",
    "runs": "Run folders, licences, tracking",
    "scene": "Scenes",
    "diffusion": "Sampling",
    "": "Commands",
}


@dataclass(frozen=True, order=True)
class Message:
    """What an error says, and the way out of it; values that differ each time stand in ‹›."""

    text: str
    hint: str


@cache
def constants() -> dict[str, str]:
    """The texts that modules of the package have as constants, by name."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
                continue
            name, value = node.targets[0], node.value.value
            if isinstance(name, ast.Name) and isinstance(value, str):
                found[name.id] = value
    return found


def template(node: ast.expr) -> str | None:
    """A text with its values as ‹expression›, or None where it is not written down here."""
    if isinstance(node, ast.Name):
        return constants().get(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts.append(str(part.value))
            elif isinstance(part, ast.FormattedValue):
                parts.append(f"‹{name_of(part.value)}›")
        return "".join(parts)
    return None


def name_of(node: ast.expr) -> str:
    """A short name for a value: the last name in its expression, or in what a function is called with."""
    if isinstance(node, ast.Call) and node.args:
        return name_of(node.args[-1])
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute):
            return inner.attr
        if isinstance(inner, ast.Name):
            return inner.id
    return "value"


def messages(file: Path) -> set[Message]:
    """The errors that a module makes."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            texts = [template(argument) for argument in node.args[:2]]
            if texts[0] and len(texts) == 2 and texts[1]:
                found.add(Message(texts[0], texts[1]))
    return found


def by_room() -> dict[str, set[Message]]:
    """The errors of each package."""
    found: dict[str, set[Message]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).parts
        found.setdefault(parts[0] if len(parts) > 1 else "", set()).update(messages(file))
    return found


def cell(text: str) -> str:
    """A text as the cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def table() -> str:
    """The part of the page that is made from the code."""
    lines = [HEADING, "", "Values that differ each time stand in ‹›. Search for a word of your message."]
    found = by_room()
    for room, title in ROOMS.items():
        if found.get(room):
            lines += ["", f"### {title}", "", "| message | way out |", "|---|---|"]
            lines += [f"| {cell(message.text)} | {cell(message.hint)} |" for message in sorted(found[room])]
    return "\n".join(lines) + "\n"


def main() -> None:
    written, _, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    PAGE.write_text(written + table(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
