"""The task of generating digits: fair shares, a judge that knows good from bad, references within their budget."""

import pytest
import torch

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks import digits_generation
from trimtab.studies.tasks.digits_generation import EVALUATIONS, Generator, Judge, digits, lesson_of
from trimtab.studies.tools.digit_generation import diffusion_model, train

TRIAL = Trial(seed=0, budget="smoke")


def test_while_searching_the_test_images_are_out_of_sight():
    (lesson, unseen), (searching, held_out) = lesson_of(TRIAL), lesson_of(Trial(budget="smoke", searching=True))
    known = {image.numpy().tobytes() for image in lesson.images}
    assert not known & {image.numpy().tobytes() for image in unseen[0]}
    tried = {image.numpy().tobytes() for image in (*searching.images, *held_out[0])}
    assert tried == known
    assert lesson.images.min() == -1
    assert lesson.images.max() == 1


def test_passes_are_counted():
    lesson, _ = lesson_of(TRIAL)
    assert lesson.steps(batch=100) == lesson.allowance // 300
    assert lesson.steps(forward=2, batch=100) == lesson.allowance // 400
    assert lesson.steps(batch=100, share=0.5) == lesson.allowance // 600
    assert sum(p.numel() for p in lesson.network().parameters()) <= lesson.size_limit


def test_every_image_is_drawn_as_often():
    lesson, _ = lesson_of(TRIAL)
    drawn = torch.cat([images for images, _ in lesson.batches(50, TRIAL.generator(), 128)])
    counts = drawn.flatten(1).unique(dim=0, return_counts=True)[1]
    own = lesson.images.flatten(1).unique(dim=0, return_counts=True)[1]
    assert counts.max() <= 6 * own.max()
    assert len(counts) == len(own)


def test_the_judge_prefers_digits_to_blurred_ones_and_sees_missing_classes():
    lesson, unseen = lesson_of(TRIAL)
    judge = Judge.of(TRIAL, *unseen)
    real, zeros = lesson.images, lesson.images[lesson.labels == 0]
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    assert judge.frechet(real) < 0.5
    assert judge.frechet(blurred) > 2 * judge.frechet(real)
    assert judge.frechet(zeros) > 10 * judge.frechet(real)
    good, narrow = judge.quality(real, lesson.labels), judge.quality(zeros, lesson.labels[lesson.labels == 0])
    assert good["fidelity"] > 0.97
    assert good["recall"] > 0.8
    assert narrow["precision"] > 0.8
    assert narrow["recall"] < 0.3
    assert judge.quality(real, (lesson.labels + 1) % 10)["fidelity"] < 0.05


@pytest.mark.parametrize("name", digits.references())
def test_references_keep_to_their_evaluations(name, monkeypatch):
    lesson, _ = lesson_of(TRIAL)
    count = 0

    def counted(*args):
        nonlocal count
        count += 1

    sample = digits.references()[name].fit(lesson)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, out: counted() if type(module).__name__ == "DenoisingMLP" else None
    )
    try:
        for evaluations in EVALUATIONS:
            count = 0
            made = sample(torch.arange(10), evaluations, TRIAL.generator())
            assert made.shape == (10, 1, 8, 8)
            assert 0 < count <= evaluations
            assert torch.equal(sample(torch.arange(10), evaluations, TRIAL.generator()), made)
    finally:
        hook.remove()


def test_training_is_reproducible_leaves_the_global_state_and_averages():
    lesson, _ = lesson_of(TRIAL)
    state = torch.get_rng_state()
    one, other = (diffusion_model(lesson, share=0.2).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], other[key]) for key in one)

    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    averaged = train(
        lesson,
        module,
        lambda images, labels, generator: -module.weight.sum(),
        100,
        optimizer=lambda p: torch.optim.SGD(p, lr=1),
    )
    assert 0 < averaged.weight.item() < module.weight.item()


def test_a_perfect_memory_wins():
    """Who shows training images again is close to what real images reach, and scores the better for it."""

    def remember(lesson):
        def sample(labels, evaluations, generator):
            rows = [torch.nonzero(lesson.labels == label)[:, 0] for label in labels]
            return torch.stack([lesson.images[r[torch.randint(len(r), (1,), generator=generator)[0]]] for r in rows])

        return sample

    def grey(lesson):
        return lambda labels, evaluations, generator: torch.zeros(len(labels), 1, 8, 8)

    good, bad = (digits.run(TRIAL, Generator(fit=fit)).metrics for fit in (remember, grey))
    assert good["frechet"] < 1 < bad["frechet"]
    assert good["fidelity"] > 0.95
    tried = Trial(budget="smoke", searching=True)
    assert digits.run(tried, Generator(fit=remember)).score > digits.run(tried, Generator(fit=grey)).score
    assert digits_generation.digits.label == "8 x 8 pixels"
