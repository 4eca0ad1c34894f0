"""How much longer a request to the service takes than the same picture by generate.py, with a loaded model each.

    python -m benchmarks.serving_overhead --rounds 30

Both draw the same picture in turns: the server's worker process, and this process with what generate.py calls for a
product, the picture's file and its certificate included. Prints medians of wall time and of CPU time, and the median of
the differences between neighbours, which an unquiet machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from packshot import Packshot
from packshot.config.schema import GenerateSettings, MatteConfig
from packshot.generate.product import prepare
from packshot.generate.run import write

KEY = "overhead"
PHOTO = Path("data/products/coffee.png")
PROMPT = "an object on a white podium"


@dataclass
class Times:
    """Seconds of one picture."""

    wall: float
    cpu: float


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and its children."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        used = one.cpu_times()
        total += used.user + used.system
    return total


def timed(process: psutil.Process, action: Callable[[], object]) -> Times:
    """What an action takes. process: where the CPU time is spent."""
    cpu = cpu_seconds(process)
    started = time.perf_counter()
    action()
    return Times(time.perf_counter() - started, cpu_seconds(process) - cpu)


def start_server(folder: Path, steps: int) -> tuple[subprocess.Popen[str], str]:
    """A server's process and its address, once its model is loaded."""
    keys = [f"run.dir={folder}", "serve.port=0", f"serve.api_key={KEY}", "serve.requests_per_minute=100000"]
    keys.append(f"generate.num_inference_steps={steps}")
    process = subprocess.Popen([sys.executable, "serve.py", *keys], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if "listening on" in line)
    url = line.split("listening on ")[1].split(",")[0]
    while httpx.get(f"{url}/health", timeout=60).status_code != 200:
        time.sleep(0.2)
    return process, url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2, help="few, so that the denoising hides nothing")
    args = parser.parse_args()
    settings = GenerateSettings(num_inference_steps=args.steps)
    tool = Packshot.load()
    writers = ThreadPoolExecutor(4)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        server, url = start_server(folder / "run", args.steps)
        client = httpx.Client(base_url=url, timeout=600, headers={"Authorization": f"Bearer {KEY}"})

        def by_script() -> None:
            product = prepare(PHOTO, None, matte=MatteConfig(), networks={})
            [result] = tool.with_product(product).stream(PROMPT, 1, 0, settings=settings, with_layers=False)
            write(folder / "pictures", "coffee-0", result, writers)

        def by_server() -> None:
            form = {"prompt": PROMPT, "seed": "0"}
            files = {"product_file": PHOTO.read_bytes()}
            answer = client.post("/generate", data=form, files=files, headers={"Accept": "image/png"})
            assert answer.status_code == 200, answer.text

        ways = [(psutil.Process(), by_script), (psutil.Process(server.pid), by_server)]
        rounds: list[list[Times]] = []
        try:
            for number in range(args.rounds + 2):
                times = [timed(process, action) for process, action in ways]
                if number >= 2:  # the first ones warm both up
                    rounds.append(times)
        finally:
            server.kill()

    for kind in ("wall", "cpu"):
        script = [1000 * getattr(times[0], kind) for times in rounds]
        service = [1000 * getattr(times[1], kind) for times in rounds]
        between = [after - before for before, after in zip(script, service, strict=True)]
        print(
            f"{kind}: generate.py {statistics.median(script):.0f} ms, service {statistics.median(service):.0f} ms,"
            f" difference {statistics.median(between):+.0f} ms (quartiles"
            f" {', '.join(f'{value:+.0f}' for value in statistics.quantiles(between, n=4))})"
        )


if __name__ == "__main__":
    main()
