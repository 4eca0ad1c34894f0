"""Draw the rooms of ``src/packshot`` and their imports: ``python -m tools.draw_rooms`` writes docs/images/rooms.svg.

A room is a package. It stands above every room that it imports, and an arrow leads to each of them, except where the
arrows over another room already lead there.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "packshot"
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
WIDTH = 1000
BOX = (216, 84)  # px
ROW = 130  # px from one level to the next
LETTERS = 38  # of a line in a box
LINES = 4
LANE = 36  # px, of an arrow between boxes
STROKE = 'fill="none" stroke="#667" stroke-width="1.3" marker-end="url(#tip)"'


def imported_rooms(room: str) -> set[str]:
    """The rooms that the modules of a room import, also inside functions and for type checks."""
    found: set[str] = set()
    for path in sorted((SOURCE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {room}
    return {name.split(".")[1] for name in found if name.startswith("packshot.")} & rooms


def without_detours(rooms: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same imports without those that follow from others."""

    def reachable(room: str) -> set[str]:
        found = set(rooms[room])
        for other in rooms[room]:
            found |= reachable(other)
        return found

    kept: dict[str, set[str]] = {}
    for room, imports in rooms.items():
        implied: set[str] = set()
        for other in imports:
            implied |= reachable(other)
        kept[room] = imports - implied
    return kept


def level(room: str, rooms: dict[str, set[str]]) -> int:
    """0 for a room that imports none; otherwise one more than the highest of those that it imports."""
    return max((level(other, rooms) + 1 for other in rooms[room]), default=0)


def lanes(arrows: dict[str, set[str]]) -> dict[str, list[str]]:
    """What each room and each lane leads to, by name.

    An arrow that passes levels gets a lane in each of them, so that it runs between the boxes and not behind them.
    """
    below: dict[str, list[str]] = {room: [] for room in arrows}
    for room in sorted(arrows):
        for other in sorted(arrows[room]):
            start = room
            for height in range(level(room, arrows) - 1, level(other, arrows), -1):
                lane = f"{room}>{other}@{height}"
                below[start].append(lane)
                below[lane] = []
                start = lane
            below[start].append(other)
    return below


def places(below: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Centre of each room and lane, px. Within a level they stand in the order of what they lead to."""
    imports = {name: set(others) for name, others in below.items()}
    levels: dict[int, list[str]] = {}
    for name in sorted(below):
        levels.setdefault(level(name, imports), []).append(name)
    centres: dict[str, tuple[float, float]] = {}
    for height, members in sorted(levels.items()):
        wanted = dict.fromkeys(members, 0.0)
        for name in members:
            for other in below[name]:
                wanted[name] += centres[other][0] / len(below[name])
        members.sort(key=wanted.__getitem__)
        widths = [LANE if "@" in name else BOX[0] + LANE for name in members]
        x = (WIDTH - sum(widths)) / 2
        for name, width in zip(members, widths, strict=True):
            centres[name] = (x + width / 2, ROW * (max(levels) - height) + BOX[1])
            x += width
    return centres


def curve(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A line that leaves and arrives upright."""
    bend = (end[1] - start[1]) / 2
    return f"C{start[0]:.0f},{start[1] + bend:.0f} {end[0]:.0f},{end[1] - bend:.0f} {end[0]:.0f},{end[1]:.0f}"


def arrow(room: str, below: dict[str, list[str]], centres: dict[str, tuple[float, float]], start: str) -> str:
    """The line from a room over its lanes to another room. start: the first of them below ``room``."""
    half = BOX[1] / 2
    x, y = centres[room]
    point = (x, y + half)
    path = f"M{point[0]:.0f},{point[1]:.0f}"
    name = start
    while "@" in name:
        x, y = centres[name]
        path += f" {curve(point, (x, y - half))} L{x:.0f},{y + half:.0f}"
        point = (x, y + half)
        [name] = below[name]
    x, y = centres[name]
    return f'<path d="{path} {curve(point, (x, y - half))}" {STROKE}/>'


def purpose(room: str) -> list[str]:
    """What a room is for, in lines: the first sentence of its docstring."""
    text = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text())) or ""
    sentence = text.partition("\n\n")[0].replace("``", "").replace("\n", " ").partition(". ")[0]
    return textwrap.wrap(sentence.rstrip("."), LETTERS, max_lines=LINES, placeholder=" …")


def draw() -> str:
    """The picture as SVG."""
    rooms = {path.parent.name: imported_rooms(path.parent.name) for path in SOURCE.glob("*/__init__.py")}
    below = lanes(without_detours(rooms))
    centres = places(below)
    width, height = BOX
    total = max(y for _, y in centres.values()) + height
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total:.0f}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{total:.0f}" fill="white"/>',
    ]
    for room in sorted(rooms):
        lines += [arrow(room, below, centres, start) for start in below[room]]
    for room in sorted(rooms):
        x, y = centres[room]
        lines.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width}" height="{height}" rx="6"'
            ' fill="#eef3fa" stroke="#456"/>'
            f'<text x="{x:.0f}" y="{y - 24:.0f}" font-size="15" font-weight="bold" text-anchor="middle">{room}</text>'
        )
        for index, text in enumerate(purpose(room)):
            line = y - 8 + 13 * index
            lines.append(f'<text x="{x:.0f}" y="{line:.0f}" font-size="11" text-anchor="middle">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw())
    print(f"wrote {PICTURE}")
