"""Measures of a whole set of pictures: distance to the wanted pictures, diversity, the choice of a reference, costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

import numpy as np

from packshot.config.schema import EvaluationScores, ModelConfig
from packshot.evaluate.distance import cmmd, kid
from packshot.evaluate.features import Embed, base_encoder, by_plain_features, named_encoder, without_product
from packshot.evaluate.items import Item
from packshot.evaluate.results import COSTS, Picture
from packshot.lists import map_values
from packshot.runs.folder import log
from packshot.runs.networks import load_whole

FEWEST_FOR_KID = 32  # its estimate of equal sets is below 0, the more so the fewer pictures there are
CHOICES = 4  # pictures among which a reference has to be told, its own included
DEFINITIONS = {
    "cmmd": "Maximum mean discrepancy to the wanted pictures (Gaussian kernel, times 1000) by the named features.",
    "kid": "Kernel distance to the wanted pictures (cubic kernel, unbiased, times 1000) by the named features.",
    "diversity": "Mean cosine distance between two pictures of one item, by the named features, the product grey.",
    "reference_choice": f"Share of pictures nearest to their own reference among {CHOICES}, by the named features, the "
    "product grey; by chance 1 in 4.",
    "clip_text": "100 times the cosine of picture and words, by the named CLIP model.",
    "product_similarity": "Cosine between the photograph's product and the picture's, by the named model.",
    "seconds": "What a picture took, as the system states it.",
    "peak_memory_gib": "Most memory while it was drawn, as the system states it.",
}


@dataclass(frozen=True)
class Seen:
    """One picture as set measures see it. image_HW3, matte_HW: uint8 on the picture's own grid."""

    item: Item
    picture: Picture
    image_HW3: np.ndarray
    matte_HW: np.ndarray

    def scene(self) -> np.ndarray:
        """The picture with its product grey."""
        return without_product(self.image_HW3, self.matte_HW)

    def product(self) -> np.ndarray:
        """The product alone, on grey."""
        return product_crop(self.image_HW3, self.matte_HW)


def embeddings(model: ModelConfig, scores: EvaluationScores) -> dict[str, Embed]:
    """What pictures are embedded by, under the names that tables give them."""
    found: dict[str, Embed] = {"plain": by_plain_features}
    if scores.features == "base":
        found["base encoder"] = base_encoder(model)
    elif scores.features != "plain":
        found[scores.features] = named_encoder(scores.features, "scores.features")
    return found


def wanted_pictures(items: list[Item]) -> list[np.ndarray]:
    """The true pictures of all items that have one."""
    found = []
    for item in items:
        truth_HW3 = item.read("truth")
        if truth_HW3 is not None:
            found.append(truth_HW3)
    return found


def distances(seen: list[Seen], wanted: list[np.ndarray], embeds: Mapping[str, Embed]) -> dict[str, float]:
    """CMMD and KID to the wanted pictures, by every embedding; none where fewer than two are known."""
    found: dict[str, float] = {}
    if min(len(wanted), len(seen)) < 2:
        return found
    images = [one.image_HW3 for one in seen]
    for name, embed in embeds.items():
        drawn_ND = embed(images)
        wanted_MD = embed(wanted)
        found[f"cmmd, {name}"] = cmmd(drawn_ND, wanted_MD)
        if min(len(drawn_ND), len(wanted_MD)) >= FEWEST_FOR_KID:
            found[f"kid, {name}"] = kid(drawn_ND, wanted_MD)
    return found


def ids_of(seen: list[Seen]) -> list[str]:
    """The item of each picture."""
    return [one.item.id for one in seen]


def by_item(seen: list[Seen]) -> dict[str, list[int]]:
    """The places of every item's pictures."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(ids_of(seen)):
        places.setdefault(item, []).append(place)
    return places


def cosines(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Cosines between all rows of two tables, shape (N, M)."""
    a_ND = a_ND / np.maximum(np.linalg.norm(a_ND, axis=1, keepdims=True), 1e-12)
    b_MD = b_MD / np.maximum(np.linalg.norm(b_MD, axis=1, keepdims=True), 1e-12)
    return a_ND @ b_MD.T


def diversity(seen: list[Seen], embed: Embed) -> dict[str, float]:
    """By item: how much its pictures differ; only items with at least two."""
    embedded_ND = embed(list(map(Seen.scene, seen)))
    found = {}
    for item, places in by_item(seen).items():
        count = len(places)
        if count > 1:
            alike = cosines(embedded_ND[places], embedded_ND[places])
            found[item] = float(1 - (alike.sum() - np.trace(alike)) / (count * (count - 1)))
    return found


def reference_choice(seen: list[Seen], embed: Embed) -> dict[str, float]:
    """By item: share of its pictures that are nearest to their own reference, among the next items' references."""
    references = {}
    for one in seen:
        if one.item.id not in references:
            reference_HW3 = one.item.read("reference")
            if reference_HW3 is not None:
                references[one.item.id] = reference_HW3
    names = list(references)
    if len(names) < CHOICES:
        return {}
    looks_ND = embed(list(references.values()))
    centre_D = looks_ND.mean(axis=0)  # what all pictures share would drown the rest
    hits: dict[str, list[float]] = {}
    pictures_ND = embed(list(map(Seen.scene, seen)))
    for one, picture_D in zip(seen, pictures_ND, strict=True):
        if one.item.id not in references:
            continue
        own = names.index(one.item.id)
        offered = [(own + step) % len(names) for step in range(CHOICES)]
        alike = cosines((picture_D - centre_D)[None], looks_ND[offered] - centre_D)[0]
        hits.setdefault(one.item.id, []).append(float(alike.argmax() == 0))
    return map_values(mean_or_nan, hits)


def costs(seen: list[Seen]) -> dict[str, dict[str, float]]:
    """What pictures took, by measure and item, where it is stated."""
    found: dict[str, dict[str, float]] = {}
    for name in COSTS:
        stated: dict[str, list[float]] = {}
        for one in seen:
            if name in one.picture.costs:
                stated.setdefault(one.item.id, []).append(one.picture.costs[name])
        if stated:
            found[name] = map_values(mean_or_nan, stated)
    return found


def product_crop(image_HW3: np.ndarray, matte_HW: np.ndarray) -> np.ndarray:
    """The product on grey, cut to its box."""
    rows, columns = np.nonzero(matte_HW >= 128)
    if not len(rows):
        return image_HW3
    alone_HW3 = np.where((matte_HW >= 128)[..., None], image_HW3, np.uint8(127))
    return alone_HW3[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def product_similarity(seen: list[Seen], embed: Embed) -> dict[str, float]:
    """By item: how alike the product is in photograph and picture, to an embedding such as DINOv2's."""
    photos = {}
    for one in seen:
        if one.item.id not in photos:
            photos[one.item.id] = product_crop(*one.item.photo_and_mask())
    photos_ND = embed(list(photos.values()))
    pictures_ND = embed(list(map(Seen.product, seen)))
    own_ND = photos_ND[list(map(list(photos).index, ids_of(seen)))]
    alike_N = np.diag(cosines(own_ND, pictures_ND))
    return means_by_item(seen, alike_N)


def means_by_item(seen: list[Seen], values_N: np.ndarray) -> dict[str, float]:
    """Mean over each item's pictures."""
    return {item: float(np.mean(values_N[places])) for item, places in by_item(seen).items()}


def clip_text(seen: list[Seen], place: str) -> dict[str, float]:
    """By item: 100 times the cosine of picture and words, by a CLIP model; items without words are left out.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    worded = [one for one in seen if one.item.text]
    if len(worded) < len(seen):
        log.warning("%d pictures have no words and no CLIP score", len(seen) - len(worded))
    if not worded:
        return {}
    pictures_ND = named_encoder(place, "scores.clip")([one.image_HW3 for one in worded])
    model = load_whole(AutoModel, place, ("",)).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    words = tokenizer([one.item.text for one in worded], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found = model.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    words_ND = getattr(found, "pooler_output", found).float().numpy()
    return means_by_item(worded, 100 * np.diag(cosines(pictures_ND, words_ND)))


def item_measures(
    seen: list[Seen], embeds: Mapping[str, Embed], scores: EvaluationScores
) -> dict[str, dict[str, float]]:
    """Measures that need several pictures or a network, by measure and item."""
    found: dict[str, dict[str, float]] = {}
    for name, embed in embeds.items():
        found[f"diversity, {name}"] = diversity(seen, embed)
        found[f"reference_choice, {name}"] = reference_choice(seen, embed)
    if scores.clip:
        found["clip_text"] = clip_text(seen, scores.clip)
    if scores.dino:
        found["product_similarity"] = product_similarity(seen, named_encoder(scores.dino, "scores.dino"))
    found |= costs(seen)
    return {name: values for name, values in found.items() if values}


def mean_or_nan(values: list[float]) -> float:
    """The mean of the finite values."""
    known_N = np.array(values)[np.isfinite(values)]
    return float(known_N.mean()) if len(known_N) else nan
