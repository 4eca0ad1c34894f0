"""Run by test_dummy_rows.py: stages with a dataset format and a captioner family that only this file knows.

It needs a process of its own, because rows must be registered before the schema is imported.
"""

import base64
import json
import sys
from pathlib import Path

from packshot.config.captioners import CAPTIONERS, CaptionerFamily
from packshot.config.sources import SOURCES, SourceKind

others = dict(SOURCES)
SOURCES.clear()
SOURCES["album"] = SourceKind("an .album file: a JSON list of pictures (png in base64, text)", __name__)
SOURCES.update(others)  # "files" comes last: it takes any file that is named alone
CAPTIONERS["echo"] = CaptionerFamily("echo", "an echo", connect=f"{__name__}:connect")


# ---- the module of a source ----


def pictures(place):
    return json.loads(Path(place).read_text())


def claims(listing):
    return [path for path in listing.paths if path.endswith(".album")]


def list_items(listing, paths, source):
    items = []
    for path in paths:
        place = listing.place(path)
        for index in range(len(pictures(place))):
            items.append({"name": f"{listing.named(path)}#{index}", "place": place, "row": index})
    return items


def read_item(item):
    from packshot.make_dataset.sources.base import Raw

    picture = pictures(item["place"])[item["row"]]
    return Raw(item["name"], base64.b64decode(picture["png"]), picture["text"])


# ---- the module of a captioner family ----


def connect(captioner):
    from packshot.caption.models.captioner import Captioner

    return Captioner(write_batch, captioner.batch_size, captioner.constraint)


def write_batch(images, masks, constraint):
    from packshot.caption.models.adapter import Caption

    return [Caption(f"Professional photo of an object on {image.width} stones", truncated=False) for image in images]


if __name__ == "__main__":
    from packshot import cli

    stage, *overrides = sys.argv[1:]
    cli.run_stage(stage, overrides)
