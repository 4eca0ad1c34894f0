"""Loads a running server with more requests than it can draw, and watches its memory, its answers and /health.

    python serve.py serve.port=8000 serve.api_key=key serve.requests_per_minute=1000000 run.dir=outputs/load
    python -m benchmarks.load http://127.0.0.1:8000 key --pid <its process id> --minutes 10

The clients send as fast as they are answered; refused ones (429) come back after half a second. With twice as many
clients as may be in the server, it works at twice its capacity. Prints a line a minute and a summary.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import httpx


def family_of(pid: int) -> list[int]:
    """A process and its children, the worker processes."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").iterdir():  # a child belongs to the thread that started it
        for child in (thread / "children").read_text().split():
            found += family_of(int(child))
    return found


def resident_mib(pid: int) -> float:
    """Memory of a server with its worker processes."""
    total = 0
    for one in family_of(pid):
        for line in Path(f"/proc/{one}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total / 1024


class Load:
    """Clients that send requests until ``until``, with counts of the answers by status."""

    def __init__(self, url: str, key: str, photo: bytes, until: float) -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {key}"}
        self.photo = photo
        self.until = until
        self.answers: Counter[int] = Counter()
        self.health: list[float] = []
        self.lock = threading.Lock()

    def send(self) -> None:
        """One client."""
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=900) as client:
            while time.monotonic() < self.until:
                files = {"product_file": self.photo}
                answer = client.post("/generate", files=files, data={"surface": "a white podium"})
                with self.lock:
                    self.answers[answer.status_code] += 1
                if answer.status_code != 200:
                    time.sleep(0.5)

    def watch(self) -> None:
        """The client that asks for /health twice a second."""
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.until:
                started = time.monotonic()
                client.get("/health")
                self.health.append(time.monotonic() - started)
                time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("key")
    parser.add_argument("--pid", type=int, required=True, help="process id of the server")
    parser.add_argument("--clients", type=int, default=18, help="twice 1 + serve.queue_size")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--photo", type=Path, default=Path("data/products/coffee.png"))
    args = parser.parse_args()
    load = Load(args.url, args.key, args.photo.read_bytes(), time.monotonic() + args.minutes * 60)
    threads = [threading.Thread(target=load.send, daemon=True) for _ in range(args.clients)]
    threads.append(threading.Thread(target=load.watch, daemon=True))
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < load.until:
        time.sleep(min(60.0, max(0.0, load.until - time.monotonic())))
        memory.append(resident_mib(args.pid))
        print(f"minute {len(memory)}: {memory[-1]:.0f} MiB, answers {dict(load.answers)}", flush=True)
    for thread in threads:
        thread.join(900)
    growth = 100 * (max(memory) - memory[0]) / memory[0]
    slowest = max(load.health)
    print(f"\nmemory after the first minute: {memory[0]:.0f} MiB, at most {growth:+.1f} % later")
    print(f"/health: median {1000 * statistics.median(load.health):.0f} ms, slowest {1000 * slowest:.0f} ms")
    print(f"answers by status: {dict(load.answers)}")


if __name__ == "__main__":
    main()
