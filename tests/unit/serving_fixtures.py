"""What tests of the service share: requests, a model that draws nothing, and servers in a process of their own.

    python tests/unit/serving_fixtures.py STEP_SECONDS [key=value ...]

serves like serve.py, but with a model that sleeps instead of denoising.
"""

import io
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
from PIL import Image, ImageDraw

from packshot.config.compose import compose
from packshot.serve import app as serve_app
from packshot.serve import server
from packshot.serve.devices import LocalDevice

ROOT = Path(__file__).resolve().parents[2]
KEY = "correct horse battery staple"
BEARER = {"Authorization": f"Bearer {KEY}"}
STEPS = ["generate.num_inference_steps=2", "generate.guidance_scale=1"]


def config(*overrides):
    return compose("serve", [*STEPS, f"serve.api_key={KEY}", *overrides])


def file(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def product_pair(width=96, height=128):
    """A noisy product (so that no smooth model could reproduce it by luck) and its mask."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((30, 40, 65, 99), fill=255)
    return Image.fromarray(noise), mask


def upload(**fields):
    product, mask = product_pair()
    files = {"product_file": file(product), "mask_file": file(mask)}
    return {"files": files, "data": {"surface": "a white podium", **fields}, "headers": BEARER}


def eventually(condition, seconds=60.0):
    """Whether a condition comes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


class FakePackshot:
    """Draws nothing: for tests of what surrounds the drawing. calls: the arguments of every request; steps: taken."""

    models = SimpleNamespace(controls=())

    def __init__(self, step_seconds=0.0):
        self.step_seconds = step_seconds
        self.calls = []
        self.steps = 0

    product = SimpleNamespace(rgb_HW3=np.zeros((8, 8, 3), np.uint8), alpha_HW=np.zeros((8, 8), np.uint8))

    def set_product(self, image, mask):
        return self

    def set_group(self, images, masks, names, most_pixels):
        return self

    def stream(self, scene, num_images, seed, reference, settings, on_step):
        self.calls.append((scene, reference, seed))
        for k in range(num_images):
            for _ in range(settings.num_inference_steps):
                time.sleep(self.step_seconds)
                self.steps += 1
                on_step()
            picture = Image.new("RGB", (8, 8), (seed % 256, k, 0))
            certificate = {"request": {"prompt": "", "seed": seed + k}, "core": {"max_abs_diff": 0}}
            yield SimpleNamespace(png=file(picture), certificate=certificate, layers={"background": picture})


def create_app(*arguments):
    """An app whose model is loaded, also for clients that do not run its lifespan."""
    app = serve_app.create_app(*arguments)
    app.state.service.start()
    assert eventually(lambda: app.state.service.loaded)
    return app


@contextmanager
def served(command, prepare=None):
    """A server's process and address, once it answers that its model is loaded. It is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    try:
        line = next(line for line in process.stderr if "listening on" in line)
        url = line.split("listening on ")[1].split(",")[0]
        while httpx.get(f"{url}/health", timeout=60).status_code == 503:
            assert process.poll() is None
            time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def fake_server(folder, *overrides, step_seconds=0.0):
    """The command of a server with a model that sleeps, in the run folder ``folder``."""
    keys = [f"run.dir={folder}", "run.resume=true", "serve.port=0", f"serve.api_key={KEY}", *STEPS, *overrides]
    return [str(Path(__file__)), str(step_seconds), *keys]


def main():
    step_seconds, *overrides = sys.argv[1:]
    server.process_devices = lambda config: [LocalDevice(FakePackshot(float(step_seconds)))]
    server.serve(compose("serve", overrides))


if __name__ == "__main__":
    main()
