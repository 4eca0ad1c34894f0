"""A dataset format and a captioner family, each added by one row and one module (see CONTRIBUTING.md)."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image


def png(seed):
    """A picture of coloured blocks, sharp enough for the quality check."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((320, 320), Image.Resampling.NEAREST).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def album(tmp_path):
    """Two pictures in the dummy format, one of them without a caption."""
    path = tmp_path / "trip.album"
    path.write_text(json.dumps([{"png": png(0), "text": "a sunny beach"}, {"png": png(1), "text": ""}]))
    return path


def run_stage(*arguments):
    program = Path(__file__).with_name("dummy_rows.py")
    return subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, check=False)


def test_a_format_and_a_captioner_are_a_row_and_a_module(album, tmp_path):
    """The source brings pictures and captions; the captioner fills the caption that is missing."""
    done = run_stage(
        "build_data", "dataset=background", f"source.path={album}", "source.license=CC0-1.0", "captioner.kind=echo",
        "tracking=none", f"run.dir={tmp_path / 'set'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = pq.read_table(tmp_path / "set" / "part-00000.parquet").to_pylist()
    texts = {row["source"].rpartition("#")[2]: row["text"] for row in rows}
    assert texts == {"0": "a sunny beach", "1": "Professional photo of an object on 320 stones"}


def test_new_rows_reach_help_and_messages(tmp_path):
    """The help names the family, and the error for an unreadable source names the format."""
    assert "echo" in run_stage("build_data", "--help").stdout
    (tmp_path / "notes.doc").write_text("no pictures")
    refused = run_stage(
        "build_data", f"source.path={tmp_path}", "tracking=none", f"run.dir={tmp_path.parent / 'other'}"
    )
    assert refused.returncode == 2
    assert "an .album file" in refused.stderr
