"""The images that adaptation is tried and tested on, and the references."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.tasks import domain_adaptation
from trimtab.studies.tasks.domain_adaptation import DomainAdaptation, class_mean, source_free, stream, with_source
from trimtab.studies.tasks.few_labels import SemiSupervised
from trimtab.studies.tools import adapting, few_label_rules, shifts
from trimtab.studies.tools.adapting import Adaptation


def rows(x):
    return {tuple(image.flatten().tolist()) for image in x}


@pytest.mark.parametrize("task", [with_source, source_free, stream], ids=lambda task: task.label)
@pytest.mark.parametrize("searching", [False, True])
def test_no_image_is_in_two_parts(task, searching):
    domains = task.domains(Trial(searching=searching))
    parts = [domains.source[0], domains.source_test[0], domains.stream[0]]
    parts += [] if domains.target is None else [domains.target]
    seen = [rows(part) for part in parts]
    for number, one in enumerate(seen):
        assert not any(one & other for other in seen[number + 1 :])
    assert (domains.target is None) == (task.terms == "stream")
    assert len(domains.stream[0]) % domains.parts == 0
    assert all(part.min() >= 0 and part.max() <= 1 for part in parts)


def test_settings_are_tried_on_other_images_under_other_changes(monkeypatch):
    """The pool behind a search is the source's training part; that behind a test is not."""
    monkeypatch.setattr(domain_adaptation, "turned", lambda x, generator: x)
    monkeypatch.setattr(domain_adaptation, "TRIED", (lambda x, generator: x,))
    monkeypatch.setattr(domain_adaptation, "TESTED", (lambda x, generator: x,))
    for task in (source_free, stream):
        tested = task.domains(Trial())
        tried = task.domains(Trial(searching=True))
        known = rows(domain_adaptation.load("digits").x_train)
        assert rows(tried.stream[0]) <= known
        assert not rows(tested.stream[0]) & known
    assert not set(domain_adaptation.TRIED) & {domain_adaptation.turned}


def test_a_target_may_be_uneven():
    even, uneven = (DomainAdaptation(target="digits", terms="source-free", imbalance=by) for by in (1.0, 10.0))
    assert len(uneven.domains(Trial()).target) < 0.7 * len(even.domains(Trial()).target)
    assert torch.equal(uneven.domains(Trial()).stream[0], even.domains(Trial()).stream[0])
    share = uneven._imbalanced(torch.arange(20_000), torch.arange(20_000) % 10, 10, torch.Generator().manual_seed(0))
    count = torch.bincount(share % 10)
    assert float(count[0] / count[9]) == pytest.approx(10, rel=0.25)


@pytest.mark.parametrize(
    "options",
    [{"target": "mnist"}, {"terms": "stream"}, {"target": "corrupted"}, {"imbalance": 0.5}, {"imbalance": 2.0}],
)
def test_what_does_not_go_together_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        DomainAdaptation(**options)


def test_everybody_gets_the_same_network_of_their_own():
    seen = []

    def adapt(lesson):
        seen.append([p.detach().clone() for p in lesson.network.parameters()])
        assert not lesson.network.training
        with torch.no_grad():
            for p in lesson.network.parameters():
                p.zero_()
        return adapting.in_eval(lesson.network)

    entrant = Adaptation(adapt=adapt, search={})
    for _ in range(2):
        source_free.run(Trial(), entrant)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_only_some_terms_give_the_source():
    given = {}

    def adapt(lesson):
        given[lesson.source is None, lesson.target is None] = True
        return adapting.in_eval(lesson.network)

    for task in (with_source, source_free, stream):
        task.run(Trial(), Adaptation(adapt=adapt, search={}))
    assert set(given) == {(False, False), (True, False), (False, True)}


def test_a_semi_supervised_rule_learns_from_source_and_target():
    seen = []

    class Recorder(few_label_rules.LabelledOnly):
        def loss(self, x, targets, weak, strong):
            seen.append((len(x), len(targets), len(weak), len(strong)))
            return super().loss(x, targets, weak, strong)

    entrant = SemiSupervised(rule=lambda start: Recorder(start.network))
    adapt = functools.partial(domain_adaptation.from_few_labels, entrant=entrant)
    found = with_source.run(Trial(setting={"lr": 1e-3}), Adaptation(adapt=adapt, search={}))
    assert 0 <= found.metrics["target_accuracy"] <= 1
    assert set(seen) == {(64, 64, 64, 64)}
    with pytest.raises(ValueError, match="lesson must have source and target"):
        source_free.run(Trial(setting={"lr": 1e-3}), Adaptation(adapt=adapt, search={}))


@pytest.mark.parametrize("name", DomainAdaptation.references())
def test_references_run_and_search(name):
    entrant = DomainAdaptation.references()[name]
    setting = settings_of(stream.grid(entrant))[0]
    for task in (source_free, stream):
        found = task.run(Trial(setting=setting), entrant)
        assert set(found.metrics) == set(task.metrics)
    tried = stream.run(Trial(setting=setting, searching=True), entrant)
    assert not tried.metrics
    assert 0 <= tried.score <= 1


def test_batch_statistics_help_where_only_brightness_changes():
    found = [stream.run(Trial(), DomainAdaptation.references()[name]) for name in ("source only", "batch statistics")]
    assert found[1].metrics["target_accuracy"] > found[0].metrics["target_accuracy"] + 0.1


def test_prototypes_of_nothing_are_the_heads_own():
    torch.manual_seed(0)
    network = domain_adaptation.source_network((1, 8, 8), 4).eval()
    predictor = adapting.PrototypesOfSure(network, keep=5)
    z = torch.randn(6, 64)
    expected = z @ nn.functional.normalize(network.head.weight.detach(), dim=1).T
    torch.testing.assert_close(predictor.scores(z), expected)
    predictor(torch.rand(50, 1, 8, 8))
    assert torch.bincount(predictor.label).max() <= 5


def test_classes_count_alike():
    right, y = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 2])
    assert class_mean(right, y, 3) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, g: shifts.noise(x, g),
        lambda x, g: shifts.speckle(x, g),
        lambda x, g: shifts.occlude(x, g),
        lambda x, g: shifts.waves(x, g),
        lambda x, g: shifts.gradient_ground(x, g),
        *(
            (lambda x, g, f=f: f(x))
            for f in (
                shifts.blur,
                shifts.contrast,
                shifts.brighten,
                shifts.power,
                shifts.invert,
                shifts.shear,
                shifts.scale,
                shifts.dilate,
                shifts.erode,
                shifts.pixelate,
                shifts.posterize,
                shifts.outline,
            )
        ),
        lambda x, g: shifts.rotate(x, 30.0),
    ],
)
def test_changes_keep_the_range_and_the_form(change):
    x = torch.rand(3, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    found = change(x, torch.Generator().manual_seed(1))
    assert found.shape == x.shape
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    assert (found - x).abs().max() > 1e-3
    assert torch.equal(found, change(x, torch.Generator().manual_seed(1)))


def test_a_turn_of_nothing_and_a_turn_back():
    x = shifts.blur(torch.rand(2, 1, 15, 15), 1.0)
    torch.testing.assert_close(shifts.rotate(x, 0.0), x)
    torch.testing.assert_close(shifts.rotate(shifts.rotate(x, 90.0), -90.0), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(shifts.rotate(x, 90.0), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_fields_of_a_variant_are_its_label():
    assert dataclasses.replace(source_free, imbalance=10.0).label == "target digits, terms source-free, imbalance 10.0"
