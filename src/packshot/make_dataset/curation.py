"""Steps that leave out pictures by what they show; each runs only where its key under ``curation`` has a value.

A measure is a row of :data:`MEASURES`: its step, its column, its key and its reason follow from the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from PIL import Image

from packshot.config.common import MatteConfig
from packshot.config.make_dataset import BuildData
from packshot.dataset.similar import find_similar, to_levels
from packshot.imaging.decode import flatten
from packshot.imaging.detector import FACES, KEY, NUDITY, detector_file, require_classes, surest
from packshot.imaging.embedding import MINI_ENCODER, embed, load_encoder
from packshot.imaging.emptiness import product_confidence
from packshot.imaging.mask_networks import foreground_share, load_network
from packshot.imaging.text_share import text_share
from packshot.lists import by_name, column
from packshot.make_dataset.pictures import picture
from packshot.make_dataset.steps import PICTURE, network_identity
from packshot.pipeline import Outcome, Step
from packshot.pipeline.step import Sample
from packshot.runs.files import file_sha256, folder_hash, readable
from packshot.runs.licenses import refuse_source

SIMILARITY = "nearest_similarity"


@dataclass(frozen=True)
class MeasureRow:
    """A measure of single pictures.

    name: of its step. key: of ``curation``, the limit above which a picture is left out. column: of the set. reason: in
    ``rejected.parquet``. about: the column in words. measure: of an RGB picture. load: raises ConfigError for models
    that cannot be used. identity: what else decides the value, by digest. version: of the code.
    """

    name: str
    key: str
    column: str
    reason: str
    about: str
    measure: Callable[[Image.Image, BuildData], float]
    load: Callable[[BuildData], None] = lambda config: None
    identity: Callable[[BuildData], dict[str, object]] = lambda config: {}
    version: int = 1

    def limit(self, config: BuildData) -> float | None:
        """The limit that a config sets, None where the measure is not wanted."""
        return getattr(config.curation, self.key)


_FAMILY = MatteConfig(model="mini")  # whose network max_product was fitted for


def detected(name: str, key: str, reason: str, wanted: re.Pattern[str], what: str) -> MeasureRow:
    """The measure of a class of things that ``curation.detector`` finds. wanted: of the names of its classes."""

    def load(config: BuildData) -> None:
        file = detector_file(config.curation.detector)
        refuse_source(config.licenses, KEY, str(file))
        require_classes(file, wanted, f"curation.{key}")

    return MeasureRow(
        name,
        key,
        f"{name}_confidence",
        reason,
        f"confidence of a detector that the picture shows {what}",
        lambda image, config: surest(image, detector_file(config.curation.detector), wanted),
        load,
        lambda config: {"detector": file_sha256(detector_file(config.curation.detector))},
    )


_ROWS = (
    MeasureRow(
        "foreground",
        "max_foreground",
        "foreground_share",
        "not_empty",
        "share of the picture that the mask network sees as an object in front",
        lambda image, config: foreground_share(image, config.matte.model),
        lambda config: load_network(config.matte.model),
        lambda config: network_identity(config.matte),
    ),
    MeasureRow(
        "product",
        "max_product",
        "product_confidence",
        "shows_product",
        "how sure it is that the family's network sees a product, and not plants or stones around an empty place",
        lambda image, config: product_confidence(image),
        lambda config: load_network(_FAMILY.model),
        lambda config: network_identity(_FAMILY),
    ),
    MeasureRow(
        "text",
        "max_text",
        "text_share",
        "text",
        "share of the picture under boxes around lines of text",
        lambda image, config: text_share(image),
    ),
    detected("face", "max_face", "face", FACES, "a face"),
    detected("nudity", "max_nudity", "nudity", NUDITY, "nudity"),
)
MEASURES: dict[str, MeasureRow] = by_name(_ROWS)
# The columns of all measures in words.
MEANING = {row.column: row.about for row in _ROWS} | {
    SIMILARITY: "cosine of the embedding with that of the most similar earlier picture; 0 for the first"
}


def wanted(config: BuildData) -> list[MeasureRow]:
    """The measures whose key has a value, in their order."""
    return [row for row in MEASURES.values() if row.limit(config) is not None]


def curation_columns(config: BuildData) -> list[str]:
    """The columns that curation adds to the set."""
    return [*(row.column for row in wanted(config)), *([SIMILARITY] if compares(config) else [])]


def compares(config: BuildData) -> bool:
    """Whether pictures are compared by their embeddings."""
    return config.curation.max_similarity is not None


def refuse_models(config: BuildData) -> None:
    """Load every model that the measures need once. Raises ConfigError for one that cannot be used."""
    for row in wanted(config):
        row.load(config)
    if compares(config):
        load_encoder(config.curation.encoder or MINI_ENCODER)


def curation_steps(config: BuildData) -> list[Step]:
    """The steps that the config asks for."""
    made = [measure_step(row, config) for row in wanted(config)]
    return [*made, embedding_step(config), similarity_step(config)] if compares(config) else made


def measure_step(row: MeasureRow, config: BuildData) -> Step:
    """Measures every picture and leaves out those above the limit."""
    settings: dict[str, object] = {"limit": row.limit(config), **row.identity(config)}
    function = partial(measure_samples, name=row.name, config=config)
    return Step(row.name, row.version, settings, pa.schema([(row.column, pa.float32())]), function, reads=PICTURE)


def measure_samples(samples: list[Sample], name: str, config: BuildData) -> list[Outcome]:
    """Pictures by one measure."""
    row = MEASURES[name]
    limit = row.limit(config)
    assert limit is not None  # the step exists only with a limit
    outcomes = []
    for sample in samples:
        value = float(np.float32(row.measure(flatten(picture(sample)), config)))
        if value > limit:
            outcomes.append(Outcome({row.column: value}, row.reason, f"{row.column} {value:.4g}", kept=False))
        else:
            outcomes.append(Outcome({row.column: value}))
    return outcomes


def embedding_step(config: BuildData) -> Step:
    """A vector for each picture."""
    encoder = config.curation.encoder or MINI_ENCODER
    place = readable("curation.encoder", encoder)
    digest = folder_hash(place) if place.is_dir() else file_sha256(place)
    schema = pa.schema([("embedding", pa.binary())])
    function = partial(embed_samples, encoder=encoder)
    return Step("embedding", 1, {"encoder": digest}, schema, function, reads=PICTURE)


def embed_samples(samples: list[Sample], encoder: str) -> list[Outcome]:
    """Vectors as bytes, so that their comparison is exact."""
    return [Outcome({"embedding": to_levels(embed(flatten(picture(sample)), encoder))}) for sample in samples]


def similarity_step(config: BuildData) -> Step:
    """Compares every picture with those before it that stay."""
    limit = config.curation.max_similarity
    assert limit is not None  # the step exists only with a limit
    function = partial(compare, limit=limit)
    schema = pa.schema([(SIMILARITY, pa.float32())])
    return Step("similarity", 1, {"limit": limit}, schema, function, reads=("id", "embedding"), whole=True)


def compare(samples: list[Sample], limit: float) -> list[Outcome]:
    """Leaves out what is as similar to an earlier picture as ``limit``, or more. The measure names that picture."""
    outcomes = []
    for other, value in find_similar(column(samples, "embedding"), limit):
        columns = {SIMILARITY: value}
        if other is not None and value >= limit:
            outcomes.append(Outcome(columns, "similar", f"{value:.4f} {samples[other]['id']}", kept=False))
        else:
            outcomes.append(Outcome(columns))
    return outcomes
