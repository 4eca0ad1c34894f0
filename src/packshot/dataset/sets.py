"""What ``data.train`` names: its sets as one list of samples, and how often an epoch shows each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from packshot.config.common import LicenseConfig
from packshot.config.train import MOST_REPEATS, DataConfig, NamedSet
from packshot.dataset.holdout import choose
from packshot.dataset.rows import Rows, concatenate, load_rows, select
from packshot.errors import ConfigError

KEY = "data.train"
MOST_LONGER = 10  # times that an epoch may be longer so that its shares come near data.train_weights
NEAR = 0.01  # of a share: how near is near


class DataScript(Protocol):
    """A script that trains; of its config these groups are read here."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def licenses(self) -> LicenseConfig: ...


@dataclass(frozen=True)
class LoadedSet:
    """One set as it is trained on. shown: how many samples of it an epoch shows, repeats counted."""

    named: NamedSet
    rows: Rows
    shown: int

    def record(self) -> dict[str, object]:
        """What the manifest says of the set; ``sha256`` is the identity of its samples, prefix and all."""
        return {
            "path": self.named.path,
            "rows": len(self.rows),
            "sha256": self.rows.fingerprint(),
            "repeats": self.named.repeats,
            "weight": self.named.weight,
            "prefix": self.named.prefix,
            "shown_per_epoch": self.shown,
            "licenses": self.rows.licenses,
        }


@dataclass(frozen=True)
class TrainingData:
    """All samples of ``data.train``.

    rows: the samples of all sets, one set after the other. validation: those to validate on. order: the index of the
    sample at each place of an epoch; None where each sample has one place, in order. notes: what a person should know,
    for the screen once the run has begun.
    """

    rows: Rows
    sets: list[LoadedSet]
    validation: Rows
    order: list[int] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def shown(self) -> int:
        """How many samples an epoch shows, repeats counted."""
        return len(self.rows) if self.order is None else len(self.order)

    def records(self) -> list[dict[str, object]]:
        """What the manifest says of each set."""
        return [one.record() for one in self.sets]


def load_training(
    config: DataScript, pictures: Sequence[str] | None, needed: Sequence[str] = (), validates: bool = True
) -> TrainingData:
    """The sets of ``data.train``, one after the other, and the samples to validate on.

    pictures: the picture columns to read, None for all. needed: those of which a set must have a column. validates:
    whether the run validates; otherwise nothing is held out.

    Raises:
        ConfigError: a set cannot be read or lacks a picture, or it is too small for its weight.
    """
    named = config.data.sets()
    parts = [load_named(config, KEY, one, pictures, needed) for one in named]
    notes: list[str] = []
    path = config.data.validation_set()
    if path is not None:
        validation = load_named(config, "data.validation", NamedSet(path), pictures, needed)
    else:
        parts, validation = hold_out(config.data, parts, validates, notes)
    times = repeated(parts, named, notes)
    sets = []
    first = 0
    for one, rows in zip(named, parts, strict=True):
        sets.append(LoadedSet(one, rows, sum(times[first : first + len(rows)])))
        first += len(rows)
    rows = concatenate(KEY, parts)
    if len(parts) == 1 and sum(times) == len(rows):
        return TrainingData(rows, sets, validation, notes=notes)
    order: list[int] = []
    for index, count in enumerate(times):
        order += [index] * count
    for one in sets:
        share = f"{100 * one.shown / len(order):.1f} %"
        notes.append(f"{KEY}: {len(one.rows)} samples of {one.named.path} are {share} of an epoch of {len(order)}")
    return TrainingData(rows, sets, validation, order, notes)


def hold_out(data: DataConfig, parts: list[Rows], validates: bool, notes: list[str]) -> tuple[list[Rows], Rows]:
    """The sets without what is held out of them, and the samples to validate on. A line is added to ``notes``."""
    whole = concatenate(KEY, parts)
    if not validates:
        return parts, whole
    owners: list[int] = []
    for number, rows in enumerate(parts):
        owners += [number] * len(rows)
    held = choose(whole, owners, data.holdout_share, data.cache_dir) if data.holdout_share else []
    if not held:
        notes.append("validation uses samples that are trained on: data.validation names another set")
        return parts, whole
    notes.append(
        f"{len(held)} of {len(whole)} samples of data.train are held out for validation "
        f"(data.holdout_share={data.holdout_share:g}; data.validation names a set of its own)"
    )
    kept: list[Rows] = []
    first = 0
    apart = set(held)
    for rows in parts:
        kept.append(select(rows, [index for index in range(len(rows)) if first + index not in apart]))
        first += len(rows)
    return kept, select(whole, held)


def load_named(
    config: DataScript, key: str, named: NamedSet, pictures: Sequence[str] | None, needed: Sequence[str] = ()
) -> Rows:
    """One set, by the rules of a training's config.

    Raises:
        ConfigError: it cannot be read, or lacks a needed picture.
    """
    rows = load_rows(
        key,
        named.path,
        pictures=pictures,
        cache=config.data.cache_dir,
        licenses=config.licenses,
        prefix=named.prefix,
        needs_review=config.data.needs_review,
        empty_captions=config.data.allow_empty_captions,
    )
    rows.refuse_without(key, needed)
    return rows


def repeated(parts: Sequence[Rows], named: Sequence[NamedSet], notes: list[str]) -> list[int]:
    """How often an epoch shows each sample, set after set: by the sets' repeats, their own column, and their weights.

    Raises:
        ConfigError: the shares that were asked for would repeat a set too often.
    """
    own = [row_repeats(rows, notes) for rows in parts]
    factors = [one.repeats for one in named]
    if named[0].weight is not None:
        shares = [(one.weight or 0.0) * one.repeats for one in named]
        factors = balanced([sum(times) for times in own], shares)
        for one, factor in zip(named, factors, strict=True):
            if factor > MOST_REPEATS:
                raise ConfigError(
                    f"data.train_weights: {one.path} is so small for its weight {one.weight} that an epoch would show "
                    f"each of its samples {factor} times.",
                    f"At most {MOST_REPEATS} times: choose weights that are nearer to the sizes of the sets.",
                )
    shown: list[int] = []
    for factor, times in zip(factors, own, strict=True):
        shown += [factor * count for count in times]
    return shown


def row_repeats(rows: Rows, notes: list[str]) -> list[int]:
    """The column ``repeats`` of a set; 1 where it says nothing. A line is added to ``notes`` if it says something."""
    found = [int(value or 1) for value in rows.column("repeats") or [None] * len(rows)]
    if any(count > 1 for count in found):
        notes.append(
            f"{KEY}: the column repeats of {rows.path} shows its {len(found)} samples {sum(found)} times an epoch "
            "(build_data.py source.folder_repeats=false leaves it out)"
        )
    return found


def balanced(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """How often each set has to be repeated as a whole, so that it has its share of an epoch.

    Whole repeats keep the samples of one set equal. An epoch shows every set at least once; it is made up to
    ``MOST_LONGER`` times as long as it must be, until each share is met within ``NEAR``, or as nearly as that allows.
    """
    whole = sum(shares)
    wanted = [share / whole for share in shares]
    shortest = max(size / share for size, share in zip(sizes, wanted, strict=True))
    best: list[int] = []
    least = float("inf")
    for length in range(1, MOST_LONGER + 1):
        factors = []
        for size, share in zip(sizes, wanted, strict=True):
            factors.append(max(1, round(length * shortest * share / size)))
        total = sum(factor * size for factor, size in zip(factors, sizes, strict=True))
        error = max(
            abs(factor * size / total - share) / share
            for factor, size, share in zip(factors, sizes, wanted, strict=True)
        )
        if error < least:
            best = factors
            least = error
        if error <= NEAR:
            break
    return best
