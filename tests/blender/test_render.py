"""The real Blender: a build that is killed ends with the same bytes, layers are true, failures say what to do."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.dataset.rows import load_rows
from packshot.render.sample import sample_job

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-render" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no Blender here: make render-env")
SET = ["dataset=rendered", "tracking=none", "render.size=96", "render.samples=4", "shard_size=3"]


def start(out, *overrides, count=7):
    command = [sys.executable, "build_data.py", *SET, f"render.count={count}", f"run.dir={out}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def blender(job, out, *options):
    """Render one job by the command that the farm uses; returns its answer."""
    command = [str(PYTHON), "-m", "packshot.render.blender", "--out", str(out), "--size", "96", "--samples", "4"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, *options],
        input=json.dumps(job) + "\n",
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "set"
    finish(start(out))
    return out


def contents(folder):
    """Every file that holds data, by name. Config, log and times differ between runs."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    keep = [path for path in files if path.name not in ("config.yaml", "log.txt", "metrics.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in keep}


def pixels(cell):
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])), np.float64)


def test_a_killed_build_ends_with_the_same_bytes(unbroken, tmp_path, monkeypatch):
    """The build is killed at random moments and resumed; what Blender kept in temporary files is gone, too."""
    out, rng, kills = tmp_path / "set", random.Random(1), 0
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for _ in range(3):
        process = start(out, "executor.workers=2", "run.resume=true")
        time.sleep(rng.uniform(4, 9))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    finish(start(out, "executor.workers=2", "run.resume=true"))
    assert kills
    assert contents(out) == contents(unbroken)
    assert not [*temporary.glob("*blender*"), *temporary.glob("packshot-*")]


def test_a_finished_build_does_nothing(unbroken):
    """It renders nothing again and leaves no scene folders."""
    before = contents(unbroken)
    assert "everything was done already" in finish(start(unbroken, "run.resume=true"))
    assert contents(unbroken) == before
    assert not (unbroken / "renders").exists()
    assert (unbroken / "contact_sheet.png").exists()


def test_scenes_in_a_shared_folder_are_not_rendered_twice(unbroken, tmp_path):
    shared = tmp_path / "renders"
    finish(start(tmp_path / "a", f"render.folder={shared}", count=2))
    stamps = {path: path.stat().st_mtime_ns for path in shared.rglob("image.png")}
    finish(start(tmp_path / "b", f"render.folder={shared}", "render.quality=90", count=2))
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("image.png")} == stamps
    assert len(stamps) == 2


def test_layers_put_together_are_the_photograph(unbroken):
    """Plate, darkened by the shadow layer, under the cut-out: what the image shows, within the noise of 4 samples."""
    for file in sorted(unbroken.glob("part-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            image, plate, cutout, shadow = (pixels(row[name]) for name in ("image", "plate", "cutout", "shadow"))
            alpha = cutout[..., 3:] / 255
            together = plate * shadow[..., None] / 255 * (1 - alpha) + cutout[..., :3] * alpha
            assert np.abs(together - image).mean() < 4
            inside = alpha[..., 0] == 1
            np.testing.assert_array_equal(cutout[inside][:, :3], image[inside])
            np.testing.assert_array_equal(pixels(row["mask"]), cutout[..., 3])


def test_the_mask_is_the_alpha_of_the_product(unbroken, tmp_path):
    """Against an independent render with a transparent film; nothing stands before these products."""
    for seed in (1, 3):
        row = next(
            row
            for file in unbroken.glob("part-*.parquet")
            for row in pq.read_table(file).to_pylist()
            if row["source"] == f"rendered, seed {seed}"
        )
        out = tmp_path / f"{seed}.png"
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        command = [str(PYTHON), str(Path(__file__).with_name("alpha.py")), str(out)]
        subprocess.run(command, input=json.dumps(sample_job(seed)), env=env, cwd=ROOT, text=True, check=True)
        alpha, mask = np.asarray(Image.open(out))[..., 3].astype(float), pixels(row["mask"])
        a, b = alpha > 127, mask > 127
        assert (a & b).sum() / (a | b).sum() > 0.99  # a pixel of the outline is 1 % at 96 px
        assert np.abs(alpha - mask).mean() < 1


def test_depth_and_normals_are_of_the_scene(unbroken):
    row = pq.read_table(unbroken / "part-00000.parquet").to_pylist()[1]
    depth, normals, mask = (pixels(row[name]) for name in ("depth", "normals", "mask"))
    product = mask == 255
    assert 0.42 < np.median(depth[product]) / 255 < 0.62  # at 0.5, a little nearer to the camera than its axis
    assert depth[product].mean() > depth[:8].mean()  # the wall is behind
    vectors = normals / 127.5 - 1
    length = np.linalg.norm(vectors, axis=-1)
    assert np.abs(length[product] - 1).mean() < 0.05
    assert vectors[product][:, 2].mean() > 0.3  # what one sees of a product faces the camera


def test_the_set_is_read_by_the_trainers(unbroken):
    row = load_rows("data.train", str(unbroken))[0]
    assert row["image"].size == (96, 96)


def test_a_product_outside_the_frame_is_refused(tmp_path):
    job = sample_job(1)
    job["camera"]["offset"] = [0.6, 0.0]
    assert "leaves the frame" in blender({**job, "name": "out"}, tmp_path)["error"]
    assert not list(tmp_path.iterdir())


def test_the_number_of_threads_changes_no_pixel(tmp_path):
    for threads in ("1", "2"):
        assert blender({**sample_job(2), "name": "a"}, tmp_path / threads, "--threads", threads)["error"] is None
    for layer in ("image", "plate", "cutout", "shadow", "depth", "normals"):
        one, two = (np.asarray(Image.open(tmp_path / threads / "a" / f"{layer}.png")) for threads in "12")
        np.testing.assert_array_equal(one, two)


def test_a_blender_that_dies_is_named_with_the_way_on(tmp_path):
    process = start(tmp_path / "set")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "set" / "renders").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if "packshot.render.blender" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Blender stopped while rendering seed" in said
    assert "run.resume=true" in said
    finish(start(tmp_path / "set", "run.resume=true"))
