"""IP-Adapter: whose picture is the reference, where its weights start, and what is read of them."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from packshot.config.schema import IPAdapterMethod, LoraMethod, ReferenceSource, TrainIPAdapter
from packshot.diffusion.keyed import SampleKey
from packshot.methods import METHODS
from packshot.methods.ip_adapter import look
from packshot.models.load import load_parts
from packshot.scene import Scene
from packshot.train.encode import MOST_KIN, Encoder, Examples, choose_kin, lent
from packshot.train.task import DiffusionTask
from packshot.train.validation import hold, sample_picture


class Chosen:
    """Some samples of a dataset."""

    def __init__(self, rows, indices):
        self._rows, self._indices = rows, indices
        self.ids, self.texts, self.sizes = ([of[i] for i in indices] for of in (rows.ids, rows.texts, rows.sizes))

    def __len__(self):
        return len(self.ids)

    def read(self, index, images):
        return self._rows.read(self._indices[index], images)

    def digest(self, index):
        return self._rows.digest(self._indices[index])


@pytest.fixture(scope="module")
def alike(rows):
    """Three samples of one look, and one of another."""
    looks = defaultdict(list)
    for index in range(len(rows)):
        looks[look(rows.read(index, ()))].append(index)
    several = next(indices for indices in looks.values() if len(indices) >= 3)
    alone = next(indices for indices in looks.values() if len(indices) == 1)
    return Chosen(rows, [*several[:3], *alone])


def make_task(rows, folder=None, **settings):
    """The task of an IP-Adapter and its samples; without a folder they are encoded at each access."""
    config = TrainIPAdapter(method=IPAdapterMethod(image_dropout=0, **settings))
    parts = load_parts(config.model)
    method = METHODS[IPAdapterMethod](parts, config.method)
    examples = Examples(rows, Encoder(parts, method, 128, config.data), folder)
    examples.fill(Accelerator(cpu=True))
    return DiffusionTask(method, parts, config, examples), examples


def own(examples, index):
    """What the method makes of a sample itself."""
    return examples.encoder.method.encode([examples.seen(index)])[0]["reference"]


def whose(examples, reference):
    """The sample whose surroundings a reference shows."""
    far = [float((own(examples, index) - reference).norm()) for index in range(len(examples))]
    assert min(far) < 1e-3
    return far.index(min(far))


def test_kin_share_a_look_are_at_most_eight_and_follow_from_the_ids_alone():
    ids = [f"sample {number}" for number in range(40)]
    kinds = [None if number == 7 else "big" if number < 30 else f"pair {number // 2}" for number in range(40)]
    chosen = choose_kin(kinds, ids)
    assert chosen[7] == []
    for index, kin in enumerate(chosen):
        assert index not in kin
        assert len(set(kin)) == len(kin) == (0 if index == 7 else MOST_KIN if index < 30 else 1)
        assert all(kinds[other] == kinds[index] for other in kin)
    named = {ids[index]: [ids[other] for other in kin] for index, kin in enumerate(chosen)}
    again = choose_kin(kinds[::-1], ids[::-1])
    assert named == {ids[39 - index]: [ids[39 - other] for other in kin] for index, kin in enumerate(again)}
    counts = torch.bincount(torch.tensor([other for kin in chosen[:7] + chosen[8:30] for other in kin]))
    assert set(counts[counts > 0].tolist()) == {MOST_KIN}  # nobody is shown more often than others
    assert choose_kin(["x", "x"], ["same", "same"]) == [[], []]


def test_a_look_is_surface_and_mood_and_none_is_known_of_a_bare_caption():
    scene = Scene(surface="A wooden table", mood="calm", background="a wall", surroundings=("leaves",))
    same = Scene(surface="a wooden table", mood="Calm", lighting="soft light", style=("macro",))
    assert look({"scene": scene}) == look({"scene": same})
    for other in (replace(scene, mood=None), replace(scene, surface="a white table"), replace(scene, surface="")):
        assert look({"scene": other}) not in (None, look({"scene": scene}))
    assert look({"scene": Scene(background="a wall")}) is None


def test_the_reference_is_another_sample_of_the_look_drawn_anew_at_each_access(alike):
    task, examples = make_task(alike)
    drawn = []
    for epoch in range(12):
        key = SampleKey(0, epoch, alike.ids[0])
        batch = task.collate([examples[0]], [key])
        assert torch.equal(batch["reference"], task.collate([examples[0]], [key])["reference"])
        drawn.append(whose(examples, batch["reference"][0]))
    assert set(drawn) == {1, 2}
    assert drawn != [drawn[0], drawn[1]] * 6
    alone = task.collate([examples[3]], [SampleKey(0, 0, alike.ids[3])])["reference"][0]
    assert torch.equal(alone, own(examples, 3))


def test_a_drawn_reference_does_not_depend_on_the_order_of_the_set(alike, rows):
    backwards = Chosen(rows, alike._indices[::-1])
    key = SampleKey(0, 5, alike.ids[0])
    (_, here), (_, there) = make_task(alike), make_task(backwards)
    assert torch.equal(lent(here[0]["encoded"], key)["reference"], lent(there[3]["encoded"], key)["reference"])


def test_a_sample_is_its_own_reference_if_that_is_asked_for(alike):
    task, examples = make_task(alike, reference=ReferenceSource.self)
    for epoch in range(4):
        batch = task.collate([examples[0]], [SampleKey(0, epoch, alike.ids[0])])
        assert torch.equal(batch["reference"][0], own(examples, 0))


def test_cached_references_are_those_encoded_on_the_fly_and_every_picture_is_encoded_once(alike, tmp_path):
    task, cached = make_task(alike, tmp_path)
    _, fresh = make_task(alike)
    assert len(cached._caches["method"]._where) == len(alike)
    for index in range(len(alike)):
        for epoch in range(3):
            key = SampleKey(0, epoch, alike.ids[index])
            a, b = (task.collate([examples[index]], [key])["reference"] for examples in (cached, fresh))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    cached.encoder.release()
    assert torch.isfinite(task(task.collate([cached[0]], [SampleKey(0, 0, alike.ids[0])]))).all()


def test_only_as_many_samples_lend_their_pictures_as_are_read(alike):
    _, examples = make_task(alike)
    first = Examples(alike, examples.encoder, None, count=2)
    assert first.kin == [[1], [0]]


def test_methods_without_references_read_no_scene(alike, monkeypatch):
    parts = load_parts(TrainIPAdapter().model)
    method = METHODS[LoraMethod](parts, LoraMethod(rank=2))
    examples = Examples(alike, Encoder(parts, method, 128, TrainIPAdapter().data), None)
    monkeypatch.setattr(alike, "read", None)
    assert examples.kin == [[], [], [], []]


class Drawn(Exception):
    """Raised in place of a picture."""


def test_validation_draws_with_the_reference_of_the_first_of_its_kin(alike):
    task, examples = make_task(alike)
    held = hold(examples, 0, torch.device("cpu"))

    class Pipeline:
        scheduler = examples.encoder.parts.scheduler

        def __call__(self, **arguments):
            raise Drawn(arguments["ip_adapter_image_embeds"][0])

    with pytest.raises(Drawn) as caught:
        sample_picture(task, Pipeline(), held, {}, seed=0)
    null, reference = caught.value.args[0][:, 0]
    assert torch.equal(null, task.method.null_reference)
    assert whose(examples, reference) == examples.kin[0][0] != 0
