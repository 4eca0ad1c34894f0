"""The family's folders: staging, records, replacing a part only by a better one, publishing whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "mini.json"


@dataclass(frozen=True)
class Record:
    """What is known of one trained part.

    score: on held-out renders, higher is better; its unit stands in ``measures``, which holds all numbers.
    inputs: fingerprint of the parts it was trained on; a part whose inputs are gone is worth nothing.
    """

    score: float
    measures: dict[str, float]
    steps: int
    minutes: float
    scenes: int
    parameters: int
    inputs: str = ""


@dataclass(frozen=True)
class Family:
    """A staging folder where parts are put together, and the folder it is published to."""

    staging: Path
    out: Path

    @classmethod
    def open(cls, work: Path, out: Path, name: str) -> Family:
        """Stage ``out/name`` under ``work/staging/name``, starting from what is published there."""
        staging, published = work / "staging" / name, out / name
        if not staging.exists() and published.exists():
            shutil.copytree(published, staging)
        staging.mkdir(parents=True, exist_ok=True)
        return cls(staging, published)

    @property
    def records(self) -> dict[str, Record]:
        """The staged parts' records, read afresh: another process may be training another part."""
        path = self.staging / RECORD
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {stage: Record(**values) for stage, values in known.items()}

    def keep_if_better(self, stage: str, record: Record, write: Callable[[Path], None]) -> bool:
        """Let ``write`` put the stage's files into staging unless the part there scores higher on the same inputs."""
        old = self.records.get(stage)
        if old is not None and old.inputs == record.inputs and old.score >= record.score:
            print(f"{stage}: kept the present part, {old.score:.4f} against {record.score:.4f}", flush=True)
            return False
        write(self.staging)
        values = {name: asdict(item) for name, item in {**self.records, stage: record}.items()}
        (self.staging / RECORD).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        print(f"{stage}: new part, score {record.score:.4f} {record.measures}", flush=True)
        return True

    def publish(self, card: str) -> None:
        """Replace the published folder by a copy of staging in one rename."""
        (self.staging / "README.md").write_text(card, encoding="utf-8")
        fresh, stale = self.out.with_name(f".{self.out.name}.new"), self.out.with_name(f".{self.out.name}.old")
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.staging, fresh)
        if self.out.exists():
            self.out.rename(stale)
        fresh.rename(self.out)
        shutil.rmtree(stale, ignore_errors=True)
        print(f"published {self.out}", flush=True)


def fingerprint(*folders: Path) -> str:
    """16 hex digits over the weights and configs of model folders, in the order given."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def set_loading_dtype(folder: Path) -> None:
    """Make transformers load fp16 files as fp32: half precision is for the disk, laptops compute in single."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
