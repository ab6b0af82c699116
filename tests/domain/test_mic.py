from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain import MaskedImageConsistency, masked_consistency, pseudo_label_weight


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def classifier() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def segmenter() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
        ).double()


X = drawn(5, 1, 8, 8)


def test_classification_is_weighted_cross_entropy_of_the_masked_image() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=4, weight=2.0)
    with torch.no_grad():
        student[1].weight.mul_(1.5)  # the teacher is another network by now
    mask = torch.zeros(5, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :4, 4:] = True
    told = mic.teacher.model(X).softmax(1)
    masked = X.clone()
    masked[:, :, :4, 4:] = 0
    found = mic.loss(student, X, mask=mask)
    expected = torch.stack(
        [q.max() * F.cross_entropy(row[None], q.argmax()[None]) for q, row in zip(told, student(masked), strict=True)]
    ).mean()
    torch.testing.assert_close(found["total"], 2 * expected)
    torch.testing.assert_close(found["consistency"], expected.detach())
    torch.testing.assert_close(found["confidence"], told.max(1).values.mean())


def test_segmentation_has_one_weight_an_image() -> None:
    logits, told = drawn(4, 3, 6, 5), 6 * drawn(4, 3, 6, 5, seed=1)
    share = (told.softmax(1).max(1).values > 0.9).double().mean((1, 2))
    assert ((share > 0) & (share < 1)).all()
    assert share.unique().numel() > 1
    torch.testing.assert_close(pseudo_label_weight(told, "share", 0.9), share)
    pixelwise = F.cross_entropy(logits, told.argmax(1), reduction="none").mean((1, 2))
    torch.testing.assert_close(
        masked_consistency(logits, told, weighting="share", threshold=0.9), (share * pixelwise).mean()
    )
    torch.testing.assert_close(masked_consistency(logits, told, weighting="none"), pixelwise.mean())


def test_probability_of_an_image_and_of_pixels() -> None:
    told = drawn(4, 3)
    torch.testing.assert_close(pseudo_label_weight(told), told.softmax(1).max(1).values)
    maps = drawn(4, 3, 2, 2)
    torch.testing.assert_close(pseudo_label_weight(maps), maps.softmax(1).max(1).values.mean((1, 2)))


def test_nothing_hidden_and_no_teaching_yet_is_cross_entropy_to_its_own_classes() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=2, ratio=0.0, weighting="none")
    logits = student(X)
    torch.testing.assert_close(mic.loss(student, X)["total"], F.cross_entropy(logits, logits.argmax(1)))


def test_the_teacher_sees_the_whole_image() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=4)
    everything = torch.ones(5, 1, 8, 8, dtype=torch.bool)
    expected = masked_consistency(student(torch.zeros_like(X)), mic.teacher(X))
    torch.testing.assert_close(mic.loss(student, X, mask=everything)["total"], expected)


def test_hidden_pixels_take_the_fill() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=4, fill=-1.5)
    everything = torch.ones(5, 1, 8, 8, dtype=torch.bool)
    expected = masked_consistency(student(torch.full_like(X, -1.5)), mic.teacher(X))
    torch.testing.assert_close(mic.loss(student, X, mask=everything)["total"], expected)


def test_masks_are_drawn_from_the_generator() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=2)
    before = torch.get_rng_state()
    one, same, other = (mic.loss(student, X, generator=seeded(s))["total"] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_the_student_alone() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=2)
    mic.loss(student, X, generator=seeded())["total"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in mic.parameters())
    told = drawn(3, 2).requires_grad_()
    masked_consistency(drawn(3, 2, seed=1).requires_grad_(), told).backward()
    assert told.grad is None


def test_the_teacher_warms_up_as_the_authors() -> None:
    """Decays of 0 (the copy), 1/2, 2/3, ... up to the limit."""
    student = classifier()
    mic = MaskedImageConsistency(student, decay=0.7)
    kept, expected = [], copy.deepcopy(student[1].weight.detach())
    for step in range(1, 5):
        kept.append(mic.teacher.next_decay)
        with torch.no_grad():
            student[1].weight.add_(step)
        mic.update(student)
        expected = kept[-1] * expected + (1 - kept[-1]) * student[1].weight.detach()
        torch.testing.assert_close(mic.teacher.model[1].weight, expected)
    assert kept == pytest.approx([1 / 2, 2 / 3, 0.7, 0.7])


def test_statistics_of_the_teacher_are_its_own() -> None:
    student = segmenter()
    mic = MaskedImageConsistency(student, patch=2, weighting="share").double()
    mic.loss(student, X + 3, generator=seeded())
    teacher, its = mic.teacher.model[1].running_mean.clone(), student[1].running_mean
    assert not torch.equal(teacher, its)  # one saw whole images and the other masked ones
    mic.update(student)
    assert torch.equal(mic.teacher.model[1].running_mean, teacher)


def test_half_precision_is_raised() -> None:
    logits, told = drawn(4, 3), drawn(4, 3, seed=1)
    value = masked_consistency(logits.bfloat16(), told.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), masked_consistency(logits, told), rtol=2e-2, atol=1e-2)
    student = classifier().float()
    mic = MaskedImageConsistency(student, patch=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert mic.loss(student, X.float(), generator=seeded())["total"].dtype == torch.float32


def test_one_image_is_enough() -> None:
    student = classifier()
    assert MaskedImageConsistency(student, patch=2).loss(student, X[:1])["total"].isfinite()


def test_refused() -> None:
    student = classifier()
    mic = MaskedImageConsistency(student, patch=4)
    mask = torch.zeros(5, 1, 8, 8, dtype=torch.bool)
    before = copy.deepcopy(mic.state_dict())
    for error, match, call in [
        (ValueError, r"ratio must be in \[0, 1\)", lambda: MaskedImageConsistency(student, ratio=1.0)),
        (ValueError, "patch must be at least 1", lambda: MaskedImageConsistency(student, patch=0)),
        (ValueError, "weighting must be one of", lambda: MaskedImageConsistency(student, weighting="half")),  # type: ignore[arg-type]
        (ValueError, "threshold must be", lambda: MaskedImageConsistency(student, threshold=1.5)),
        (ValueError, "weight must be", lambda: MaskedImageConsistency(student, weight=-1.0)),
        (ValueError, "decay must be", lambda: MaskedImageConsistency(student, decay=2.0)),
        (ValueError, "patch must be at most", lambda: mic.loss(student, X[..., :3])),
        (ValueError, "x must be", lambda: mic.loss(student, X[:0])),
        (ValueError, "x must be", lambda: mic.loss(student, X[0])),
        (TypeError, "x must be floating point", lambda: mic.loss(student, X.long())),
        (TypeError, "mask must be of booleans", lambda: mic.loss(student, X, mask=mask.double())),
        (ValueError, "mask must be of shape", lambda: mic.loss(student, X, mask=mask[:2])),
        (ValueError, "module must have the weights", lambda: mic.update(segmenter())),
        (ValueError, "state_dict must be", lambda: mic.load_state_dict({})),
        (ValueError, "logits must be of shape", lambda: masked_consistency(drawn(2, 3), drawn(3, 3))),
        (ValueError, "logits must hold", lambda: masked_consistency(drawn(0, 3), drawn(0, 3))),
        (ValueError, "logits must be of shape", lambda: pseudo_label_weight(drawn(3))),
    ]:
        with pytest.raises(error, match=match):
            call()
    after = mic.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(("weight", "bias")))
