"""``task=correct``: apply the captions that a person wrote into the table of ``task=review``."""

from __future__ import annotations

import csv
from pathlib import Path

from packshot.caption.data import PICTURES, shard_files
from packshot.config.schema import CaptionVLM
from packshot.dataset import corrections
from packshot.dataset.rows import load_rows
from packshot.dataset.text_files import EncodingError, csv_rows, decode_text
from packshot.errors import ConfigError
from packshot.runs.files import readable
from packshot.runs.folder import answer, log
from packshot.scene import Scene
from packshot.scene.scores import product_words


def correct(config: CaptionVLM) -> None:
    """Write the corrections of ``data.corrections`` into the dataset ``data.input``."""
    assert config.data.input is not None  # the task's row needs both
    assert config.data.corrections is not None
    folder = shard_files("data.input", config.data.input)[0].parent
    table = readable("data.corrections", config.data.corrections)
    rows = load_rows("data.input", config.data.input, captions=False, pictures=PICTURES)
    found = read_corrections(table, set(rows.ids))
    answer.info("%d corrections taken over, %d in %s", len(found), corrections.add(folder, found), folder)


def read_corrections(path: Path, known: set[str]) -> dict[str, str]:
    """The corrections of an edited ``review.csv``, rendered in the caption grammar, by sample id.

    Raises:
        ConfigError: the file is not such a table, or a correction names an unknown sample, describes no scene or names
            a product. All of them are listed, and nothing is applied.
    """
    try:
        text, encoding = decode_text(path.read_bytes())
        lines = csv_rows(text, ["corrected"])
    except (OSError, EncodingError, csv.Error) as error:
        raise ConfigError(
            f"data.corrections={path} cannot be read ({error}).", "Save it as CSV UTF-8; task=review writes it."
        ) from error
    if encoding == "windows-1252":
        log.warning("data.corrections=%s is not UTF-8: read as %s; save it as CSV UTF-8", path, encoding)
    if not lines or not {"id", "corrected"} <= set(lines[0]):
        raise ConfigError(f"data.corrections={path} has no columns id and corrected.", "task=review writes it.")
    found: dict[str, str] = {}
    mistakes: list[str] = []
    for number, line in enumerate(lines, 2):
        text = (line["corrected"] or "").strip()
        if not text:
            continue
        mistake = find_mistake(text, line["id"], known)
        if mistake:
            mistakes.append(f"line {number} {mistake}")
        found[line["id"]] = Scene.parse(text).scene.render()
    if mistakes:
        raise ConfigError(
            f"data.corrections={path}: {'; '.join(mistakes)}.", "Correct these lines; nothing was taken over."
        )
    return found


def find_mistake(text: str, sample: str, known: set[str]) -> str | None:
    """Why a correction cannot be applied, or None."""
    if sample not in known:
        return f"corrects {sample}, but the dataset has no sample {sample}"
    words = product_words(text)
    if words:
        return f"names the product ({', '.join(words)})"
    if Scene.parse(text).scene == Scene():
        return f"describes no scene: {text}"
    return None
