"""``task=review_masks``: the doubtful masks of a dataset as a page, worst first, and as files to edit."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import BuildData
from packshot.dataset.rows import Rows, load_rows
from packshot.errors import ConfigError
from packshot.imaging.data_url import data_url
from packshot.imaging.mask_doubt import REMEDIES
from packshot.lists import in_words
from packshot.make_dataset.pictures import png
from packshot.make_dataset.sources.reviewed import WRITTEN
from packshot.pipeline.step import Sample
from packshot.runs.files import replacing_file, sha256
from packshot.runs.folder import answer, open_run
from packshot.runs.progress import progress

THUMBNAIL = 420  # px, longer side
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Masks to review</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0; }}
img {{ width: 320px; height: 320px; object-fit: contain; background: #eee; }}
code {{ overflow-wrap: anywhere; }} .doubt {{ color: #a00000; }}
footer {{ position: sticky; bottom: 0; background: #fff; border-top: 1px solid #ccc; padding: .6rem 0; }}
button {{ font: inherit; padding: .3rem .8rem; }}
</style>
<h1>{count} masks to review</h1>
<p>{counts}. The worst are first. The product is bright, the outline of its mask is magenta.</p>
<ol><li>Edit the wrong masks in the folder <code>masks</code> (white = product); save each under its own name.</li>
<li>Tick those that are right as they are, and save the list into the folder <code>masks</code>.</li>
<li>Build again with the command that built the dataset and, added to it, <code>{added}</code>. Only the rows of
these masks are made again. Masks that are neither edited nor ticked stay in doubt.</li></ol>
{articles}
<footer><button type="button" id="save">Save the list of right masks</button> <span id="ticked">0</span> ticked</footer>
<script>
const boxes = () => [...document.querySelectorAll("input:checked")].map(box => box.value);
document.addEventListener("change", () => document.getElementById("ticked").textContent = boxes().length);
document.getElementById("save").onclick = () => {{
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([boxes().join("\\n") + "\\n"], {{type: "text/plain"}}));
  link.download = "approved.txt";
  link.click();
}};
</script>
</html>
"""


def review_masks(config: BuildData) -> None:
    """Write the doubtful masks of the dataset ``source.path``, up to ``review.count``, into the run folder.

    Raises:
        ConfigError: not a dataset of products, or none of its masks is in doubt.
    """
    rows = load_rows("source.path", config.source.path, captions=False, pictures=("image", "mask"))
    doubtful = worst_first(rows)
    if not doubtful:
        raise ConfigError(
            f"source.path={config.source.path}: none of its {len(rows)} masks is in doubt.",
            "There is nothing to review.",
        )
    run = open_run("build_data", config)
    masks = run.path / "masks"
    counts: Counter[str] = Counter()
    written = {}
    articles = []
    chosen = doubtful[: config.review.count]
    with progress("masks to review", total=len(chosen)) as advance:
        for row in read_all(rows, chosen):
            name = mask_name(row["source"])
            content = png(row["mask"])["bytes"]
            save_unless_edited(masks / name, content)
            written[name] = sha256(content)
            counts.update(row["reasons"])
            articles.append(article(row, name))
            advance()
    with replacing_file(masks / WRITTEN) as temporary:
        temporary.write_text(json.dumps(written, indent=1, sort_keys=True))
    added = f"run.resume=true source.masks={masks} source.without_mask=find"
    page = PAGE.format(
        count=len(chosen),
        counts=in_words(dict(counts.most_common())),
        added=html.escape(added),
        articles="\n".join(articles),
    )
    with replacing_file(run.path / "review.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    answer.info("%d of %d masks are in doubt; %d of them are in %s", len(doubtful), len(rows), len(chosen), run.path)
    if len(chosen) < len(doubtful):
        answer.info("review.count=%d leaves out %d", config.review.count, len(doubtful) - len(chosen))


def worst_first(rows: Rows) -> list[int]:
    """Positions of the rows whose mask is in doubt: most reasons first, then the least confident."""
    found: list[tuple[int, float, int]] = []
    for index in range(len(rows)):
        row = rows.read(index, ())
        reasons = row.get("reasons") or []
        if row.get("status") == "needs_review":
            found.append((-len(reasons), row.get("mask_confidence") or 0.0, index))
    return [index for _, _, index in sorted(found)]


def read_all(rows: Rows, positions: list[int]) -> Iterator[Sample]:
    """The rows with picture and mask, one at a time."""
    for position in positions:
        yield rows.read(position, ("image", "mask"))


def mask_name(source: str) -> str:
    """The file of a picture's mask under ``source.masks``; ``source`` begins with the name of the source's folder."""
    return str(PurePosixPath(source.partition("/")[2] or source).with_suffix(".png"))


def save_unless_edited(path: Path, content: bytes) -> None:
    """Write a mask; one that is there was edited, or is the same."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            temporary.write_bytes(content)


def article(row: Sample, name: str) -> str:
    """One mask of the page."""
    doubts = "".join(f"<li><b>{html.escape(code)}</b>: {html.escape(REMEDIES[code])}</li>" for code in row["reasons"])
    safe = html.escape(name, quote=True)
    return (
        f'<article><img alt="" loading="lazy" src="{data_url(row["image"], THUMBNAIL)}">'
        f'<img alt="mask of {safe}" loading="lazy" src="{data_url(shown(row["image"], row["mask"]), THUMBNAIL)}">'
        f'<div><code>{safe}</code><ul class="doubt">{doubts}</ul>'
        f'<label><input type="checkbox" value="{safe}"> right as it is</label></div></article>'
    )


def shown(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The product bright, the rest dimmed, the outline of the mask in magenta."""
    size = photo.copy()
    size.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    rgb_HW3 = np.asarray(size.convert("RGB"), np.float32)
    mask_HW = np.asarray(mask.convert("L").resize(size.size, Image.Resampling.BOX), np.float32) / 255
    picture = rgb_HW3 * (0.3 + 0.7 * mask_HW[..., None])
    solid = (mask_HW >= 0.5).astype(np.uint8)
    outline = cv2.morphologyEx(solid, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    picture[outline] = (255, 0, 200)
    return Image.fromarray(picture.astype(np.uint8))
