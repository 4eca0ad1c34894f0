"""How many of the allowed requests a captioning run keeps under way, at a server whose answers take unevenly long.

    python -m benchmarks.endpoint_window --allowed 64 --pictures 1000 --shard 100 --seconds 1.0

The server waits for a time from a log-normal distribution (median ``--seconds``) before each answer. Prints the mean
number of requests under way between the first request and the moment when fewer pictures are left than may be under
way.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from packshot.caption.models.endpoint import connect
from packshot.caption.stream import caption_shards
from packshot.config.schema import CaptionerConfig, CaptionerKind, Constraint

ANSWER = "Professional photo of an object on a white table, calm mood"


class Server(ThreadingHTTPServer):
    """Answers late; ``events`` are (time, requests under way)."""

    request_queue_size = 512

    def __init__(self, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seconds = seconds
        self.random = random.Random(0)
        self.lock = threading.Lock()
        self.under_way = 0
        self.events: list[tuple[float, int]] = []

    def count(self, change: int) -> float:
        """Note that a request has come or is answered; returns how long it should take."""
        with self.lock:
            self.under_way += change
            self.events.append((time.monotonic(), self.under_way))
            return self.seconds * self.random.lognormvariate(0, 0.8)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        """Answer a question about a picture."""
        seconds = self.server.count(1)
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(seconds)
        message = {"role": "assistant", "content": ANSWER}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        content = json.dumps(answer).encode()
        self.server.count(-1)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def write_shards(folder: Path, pictures: int, shard: int, side: int) -> list[Path]:
    """Shards of one JPEG, over and over."""
    noise = np.random.default_rng(0).integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).resize((side, side)).save(buffer, "JPEG")
    files = []
    for first in range(0, pictures, shard):
        cells = [{"bytes": buffer.getvalue(), "path": None}] * min(shard, pictures - first)
        file = folder / f"part-{first // shard:05d}.parquet"
        schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
        pq.write_table(pa.table({"image": cells}, schema), file)
        files.append(file)
    return files


def mean_under_way(events: list[tuple[float, int]], last: int) -> float:
    """Mean over time, from the first event to the one with this number."""
    total = 0.0
    for (begin, count), (end, _) in pairwise(events[: last + 1]):
        total += count * (end - begin)
    return total / (events[last][0] - events[0][0])


def main() -> None:
    """Caption the shards and print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allowed", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--shard", type=int, default=100)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    server = Server(args.seconds)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = CaptionerConfig(
        kind=CaptionerKind.endpoint,
        endpoint=f"http://127.0.0.1:{server.server_port}/v1",
        endpoint_model="m",
        endpoint_requests=args.allowed,
        constraint=Constraint.scene,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_shards(folder, args.pictures, args.shard, args.side)
        (folder / "out").mkdir()
        started = time.monotonic()
        caption_shards([(file, folder / "out" / file.name) for file in files], connect(config), "benchmark")
        elapsed = time.monotonic() - started
    # a request is two events; in the last ones there are not enough pictures left to have all under way
    mean = mean_under_way(server.events, len(server.events) - 2 * args.allowed)
    print(f"{mean:.1f} of {args.allowed} requests under way on average ({mean / args.allowed:.2f})")
    print(f"{args.pictures / elapsed:.1f} pictures/s")


if __name__ == "__main__":
    main()
