"""Pseudo-correspondences against a loop over patches, what each condition refuses, and the loss on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import correspondence_loss, pseudo_correspondences

CONDITIONS = {"min_importance": 0.3, "min_assignment": 0.25, "min_similarity": 0.4, "ratio": 1.3, "max_matches": 3}


def batch(seed: int, images: int = 3, n: int = 9, m: int = 8, clusters: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        draw(images, 3, n),
        draw(images, 3, m),
        draw(images, clusters, n).softmax(1),
        draw(images, clusters, m).softmax(1),
        draw(images, n).sigmoid(),
    ]


def by_loop(features, others, assignment, other_assignment, importance) -> list[tuple[int, int, int]]:
    found = []
    for image in range(len(features)):
        matches = []
        for anchor in range(features.shape[2]):
            if importance[image, anchor] <= 0.3:
                continue
            cluster = assignment[image, :, anchor].argmax()
            cosines = sorted(
                (
                    (torch.cosine_similarity(features[image, :, anchor], others[image, :, n], dim=0).item(), n)
                    for n in range(others.shape[2])
                    if other_assignment[image, cluster, n] > 0.25
                ),
                reverse=True,
            )
            if not cosines or cosines[0][0] <= 0.4:
                continue
            if len(cosines) == 1 or cosines[0][0] > 1.3 * cosines[1][0]:
                matches.append((image, anchor, cosines[0][1]))
        found += matches[:3]
    return found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equals_a_loop(seed):
    arguments = batch(seed)
    found = pseudo_correspondences(*arguments, **CONDITIONS)
    columns = (found.image, found.anchor, found.positive)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == by_loop(*arguments)
    features, others = arguments[0].mT[found.image, found.anchor], arguments[1].mT[found.image, found.positive]
    torch.testing.assert_close(found.similarity, torch.cosine_similarity(features, others))


def one_anchor(*cosines: float) -> list[Tensor]:
    """One important patch, and candidates at these cosines to it."""
    candidates = torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines]).T[None]
    held = torch.ones(1, 1, len(cosines))
    return [torch.tensor([[[1.0], [0.0]]]), candidates, torch.ones(1, 1, 1), held, torch.ones(1, 1)]


@pytest.mark.parametrize(
    ("cosines", "matches"),
    [
        ((0.9, 0.4), 1),
        ((0.9, 0.46), 0),  # the second is more than half as similar
        ((0.79, 0.1), 0),  # not similar enough
        ((0.9, -0.5), 1),  # a dissimilar second is no rival
        ((0.9,), 1),  # nor is none
    ],
)
def test_the_defaults_ask_for_a_clear_match(cosines, matches):
    assert len(pseudo_correspondences(*one_anchor(*cosines)).anchor) == matches


def test_loss_pulls_matched_local_features_and_no_others():
    arguments = batch(3)
    found = pseudo_correspondences(*arguments, **CONDITIONS)
    assert len(found.anchor) > 1
    local, other = (torch.randn(3, 4, n, dtype=torch.float64, requires_grad=True) for n in (9, 8))
    value = correspondence_loss(local, other, found)
    cosines = torch.cosine_similarity(local.mT[found.image, found.anchor], other.mT[found.image, found.positive])
    torch.testing.assert_close(value, (found.similarity * (1 - cosines)).mean())
    value.backward()
    touched = torch.zeros(3, 9, dtype=torch.bool)
    touched[found.image, found.anchor] = True
    assert torch.equal(local.grad.abs().sum(1) > 0, touched)
    stepped = correspondence_loss(local - 0.01 * local.grad, other - 0.01 * other.grad, found)
    assert stepped < value


def test_features_get_no_gradient_from_the_choice():
    arguments = [x.requires_grad_() for x in batch(4)]
    assert not pseudo_correspondences(*arguments, **CONDITIONS).similarity.requires_grad


def test_no_match_is_no_loss_but_has_a_gradient():
    arguments = batch(5)
    found = pseudo_correspondences(*arguments, min_similarity=1.1)
    local = torch.randn(3, 4, 9, requires_grad=True)
    value = correspondence_loss(local, torch.randn(3, 4, 8), found)
    value.backward()
    assert value.item() == 0
    assert local.grad.abs().max() == 0


@pytest.mark.parametrize("position", range(5))
def test_wrong_shapes_are_named(position):
    names = ["features", "other_features", "assignment", "other_assignment", "importance"]
    arguments = batch(0)
    arguments[position] = arguments[position][:-1]
    with pytest.raises(ValueError, match="|".join(names)):
        pseudo_correspondences(*arguments)
    arguments[position] = arguments[position][0]
    with pytest.raises(ValueError, match="|".join(names)):
        pseudo_correspondences(*arguments)


@pytest.mark.parametrize(
    ("limit", "value"), [("min_importance", 1.0), ("min_assignment", 1.0), ("min_similarity", 0.5), ("ratio", 2.0)]
)
def test_each_limit_must_be_exceeded(limit, value):
    """A patch of importance 1, in a cluster with mass 1, whose best candidate has cosine 0.5 and the second 0.25."""
    limits = {"min_importance": 0.0, "min_assignment": 0.0, "min_similarity": 0.0, "ratio": 1.0}
    arguments = [x.double() for x in one_anchor(0.5, 0.25)]
    arguments[1] = torch.tensor([[0.5, 0.25], [0.75**0.5, 0.9375**0.5]], dtype=torch.float64)[None]
    cosines = torch.nn.functional.normalize(arguments[1], dim=1)[0, 0].tolist()
    if limit == "min_similarity":
        value = cosines[0]
    elif limit == "ratio":
        value = cosines[0] / cosines[1]
    assert len(pseudo_correspondences(*arguments, **limits).anchor) == 1
    assert len(pseudo_correspondences(*arguments, **(limits | {limit: value})).anchor) == 0
