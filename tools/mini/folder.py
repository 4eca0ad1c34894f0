"""The family's folders: staging, records, replacing a part only by a better one, publishing whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, ProcessorMixin

from packshot.errors import PackshotError
from packshot.lists import map_values
from tools.mini.budgeted_training import Progress
from tools.mini.data import Renders

RECORD = "mini.json"


@dataclass(frozen=True)
class Record:
    """What is known of one trained part.

    score: on held-out renders, higher is better; its unit stands in ``measures``, which holds all numbers.
    inputs: fingerprint of the parts it was trained on; a part whose inputs are gone is worth nothing.
    held_out: fingerprint of the scenes it was scored on; scores on different ones cannot be compared.
    """

    score: float
    measures: dict[str, float]
    steps: int
    minutes: float
    scenes: int
    parameters: int
    inputs: str = ""
    held_out: str = ""


def _read_records(folder: Path) -> dict[str, Record]:
    path = folder / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return map_values(lambda values: Record(**values), known)


@dataclass(frozen=True)
class Family:
    """A staging folder where parts are put together, and the folder it is published to.

    start: an earlier family whose weights training begins with; None to begin with nothing.
    """

    staging: Path
    out: Path
    start: Path | None = None

    @classmethod
    def open(cls, work: Path, out: Path, name: str, start: Path | None = None) -> Family:
        """Stage ``out/name`` under ``work/staging/name``, starting from what is published there, else from ``start``.

        Raises:
            PackshotError: ``start`` holds no family.
        """
        if start is not None and not (start / name / RECORD).is_file():
            raise PackshotError(f"{start / name} holds no family ({RECORD} is missing)", hint="leave out --start")
        staging = work / "staging" / name
        published = out / name
        earlier = published if published.exists() or start is None else start / name
        if not staging.exists() and earlier.exists():
            shutil.copytree(earlier, staging)
        staging.mkdir(parents=True, exist_ok=True)
        return cls(staging, published, start and start / name)

    @property
    def records(self) -> dict[str, Record]:
        """The staged parts' records, read afresh: another process may be training another part."""
        return _read_records(self.staging)

    def begin(self, model: torch.nn.Module, part: str) -> bool:
        """Give ``model`` those weights of the earlier family's ``part`` whose names and shapes it has.

        Returns: whether it has most of them; otherwise it is another network and begins with nothing.
        """
        if self.start is None:
            return False
        own = model.state_dict()
        weights = {}
        for path in (self.start / part).glob("*.safetensors"):
            for name, weight in load_file(path).items():
                if name in own and own[name].shape == weight.shape:
                    weights[name] = weight
        if 2 * len(weights) < len(own):
            return False
        model.load_state_dict(weights, strict=False)
        print(
            f"{part or self.start.name}: begins with {len(weights)} of {len(own)} tensors of {self.start}", flush=True
        )
        return True

    def start_config(self, part: str) -> dict[str, object]:
        """The configuration of the earlier family's ``part``.

        Raises:
            PackshotError: training starts from nothing.
        """
        if self.start is None:
            raise PackshotError(f"{part}: this needs the weights of an earlier family", hint="pass --start data/models")
        return json.loads((self.start / part / "config.json").read_text(encoding="utf-8"))

    def rate(self, full: float) -> float:
        """Peak learning rate: less than ``full`` for weights that an earlier training has brought to rest."""
        return full if self.start is None else 0.4 * full

    def record(
        self,
        stage: str,
        progress: Progress,
        renders: Renders,
        score: float,
        measures: dict[str, float],
        parameters: int,
        inputs: str = "",
    ) -> Record:
        """The record of a freshly trained part; its effort includes that of the weights it began with."""
        steps = progress.step
        minutes = progress.seconds / 60
        earlier = _read_records(self.start).get(stage) if self.start else None
        if earlier is not None:
            steps += earlier.steps
            minutes += earlier.minutes
        scenes = len(renders.train)
        return Record(score, measures, steps, minutes, scenes, parameters, inputs, renders.held_out_id)

    def keep_if_better(self, stage: str, record: Record, write: Callable[[Path], None]) -> bool:
        """Let ``write`` put the stage's files into staging unless the part there scores higher on the same terms."""
        old = self.records.get(stage)
        same = old is not None and (old.inputs, old.held_out) == (record.inputs, record.held_out)
        if old is not None and same and old.score >= record.score:
            print(f"{stage}: kept the present part, {old.score:.4f} against {record.score:.4f}", flush=True)
            return False
        write(self.staging)
        values = json.loads((self.staging / RECORD).read_text(encoding="utf-8")) if self.records else {}
        values[stage] = asdict(record)
        (self.staging / RECORD).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        print(f"{stage}: new part, score {record.score:.4f} {record.measures}", flush=True)
        return True

    def keep_captioner(
        self,
        stage: str,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        scores: tuple[dict[str, float], dict[str, float]],
        renders: Renders,
        progress: Progress,
    ) -> None:
        """Stage a captioner, at half precision, unless the present one is better.

        scores: losses, and per slot the share of held-out scenes that it describes right, whose mean decides.
        """
        losses, slots = scores
        score = sum(slots.values()) / len(slots)
        inputs = f"vocabulary {len(processor.tokenizer)}"
        record = self.record(stage, progress, renders, score, {**losses, **slots}, model.num_parameters(), inputs)

        def write(staging: Path) -> None:
            halve(model)
            model.save_pretrained(staging)
            set_loading_dtype(staging)
            processor.save_pretrained(staging)

        self.keep_if_better(stage, record, write)

    def publish(self, card: str) -> None:
        """Replace the published folder by a copy of staging in one rename."""
        (self.staging / "README.md").write_text(card, encoding="utf-8")
        fresh = self.out.with_name(f".{self.out.name}.new")
        stale = self.out.with_name(f".{self.out.name}.old")
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
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """16 hex digits over tensors and their names, at half precision, in which weights are shipped."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def halve(model: torch.nn.Module) -> None:
    """Weights in half precision with seven of its ten bits of mantissa, those of bfloat16: a fifth less to store."""
    model.half()
    for parameter in model.parameters():
        bits = parameter.data.view(torch.int16)
        parameter.data = ((bits + 4) & ~7).view(torch.float16)


def set_loading_dtype(folder: Path) -> None:
    """Make transformers load fp16 files as fp32: half precision is for the disk, laptops compute in single."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
