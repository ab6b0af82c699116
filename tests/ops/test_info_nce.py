from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.info_nce import info_nce, info_nce_of_cosines, nt_xent, sup_con

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_info_nce_is_cross_entropy_of_the_positive() -> None:
    q, p, n = draws(5, 3), draws(5, 3, seed=1), draws(7, 3, seed=2)
    logits = torch.cat([F.cosine_similarity(q, p)[:, None] - 0.2, F.normalize(q) @ F.normalize(n).T], 1) / 0.3
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(info_nce(q, p, n, 0.3, 0.2), expected)
    torch.testing.assert_close(info_nce(q, p, n.expand(5, 7, 3), 0.3, 0.2), expected)
    torch.testing.assert_close(info_nce(4 * q, p / 7, 2 * n, 0.3, 0.2), expected)


def test_without_negatives_the_other_positives_are_taken() -> None:
    q, p = draws(5, 3), draws(5, 3, seed=1)
    expected = F.cross_entropy(F.normalize(q) @ F.normalize(p).T / 0.3, torch.arange(5))
    torch.testing.assert_close(info_nce(q, p, temperature=0.3), expected)
    assert info_nce(q[:1], p[:1]).item() == 0  # nothing to mistake it for


def test_a_smaller_margin_is_easier() -> None:
    q, p, n = draws(5, 3), draws(5, 3, seed=1), draws(7, 3, seed=2)
    easy, plain, strict = (info_nce(q, p, n, 0.3, margin) for margin in (-0.5, 0.0, 0.5))
    assert easy < plain < strict


def test_reductions() -> None:
    q, p, n = draws(5, 3), draws(5, 3, seed=1), draws(7, 3, seed=2)
    each = info_nce(q, p, n, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(info_nce(q, p, n, reduction="sum"), each.sum())
    torch.testing.assert_close(info_nce(q, p, n), each.mean())


def test_a_negative_at_minus_infinity_is_none() -> None:
    positive, negatives = draws(4).tanh(), draws(4, 3, seed=1).tanh()
    less = torch.cat([negatives, torch.full((4, 2), -math.inf, dtype=DOUBLE)], 1)
    torch.testing.assert_close(info_nce_of_cosines(positive, less), info_nce_of_cosines(positive, negatives))


def loop_of_sup_con(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    z, values = F.normalize(z), []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            bottom = torch.stack([(z[i] @ z[j] / temperature).exp() for j in others]).sum().log()
            values.append(-torch.stack([z[i] @ z[j] / temperature - bottom for j in positives]).mean())
    return torch.stack(values).mean()


def test_sup_con_and_nt_xent_agree_with_a_loop() -> None:
    z, labels = draws(9, 4), torch.tensor([0, 1, 1, 0, 5, 2, 2, 2, 0])
    torch.testing.assert_close(sup_con(z, labels, 0.2), loop_of_sup_con(z, labels, 0.2))
    torch.testing.assert_close(nt_xent(z, 3, 0.4), loop_of_sup_con(z, torch.arange(3).repeat(3), 0.4))


def test_nt_xent_agrees_with_the_usual_two_view_form() -> None:
    z = draws(8, 5)
    cosines = F.normalize(z) @ F.normalize(z).T / 0.5
    cosines.fill_diagonal_(-math.inf)
    torch.testing.assert_close(nt_xent(z, 2, 0.5), F.cross_entropy(cosines, torch.arange(8).roll(4)))


def test_sup_con_agrees_with_its_package() -> None:
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    z, labels = draws(12, 4).float(), torch.arange(12) % 3
    torch.testing.assert_close(sup_con(z, labels, 0.1), peers.SupConLoss(temperature=0.1)(z, labels))


def test_gradients() -> None:
    q, p, n = (draws(4, 3, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda *parts: info_nce(*parts, 0.4, -0.5), (q, p, n))
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, temperature=0.4), (q, p))
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 2, 0.4), q)
    lonely = draws(3, 3).requires_grad_()
    assert sup_con(lonely, torch.arange(3)).item() == 0
    (gradient,) = torch.autograd.grad(sup_con(lonely, torch.arange(3)), lonely)
    assert (gradient == 0).all()
    single = draws(1, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(sup_con(single, torch.tensor([0])), single)
    assert (gradient == 0).all()


def test_half_precision_is_raised_and_autocast_left_out() -> None:
    z = draws(8, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = nt_xent(z, 2, 0.1)
        torch.testing.assert_close(info_nce(z, z.flip(0), z), info_nce(z.float(), z.float().flip(0), z.float()))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, nt_xent(z.float(), 2, 0.1))


def test_bad_input_is_refused_by_name() -> None:
    z, labels = draws(4, 3), torch.arange(4)
    refused = [
        (lambda: info_nce(z, z[:2]), "positive"),
        (lambda: info_nce(z[:0], z[:0]), "query"),
        (lambda: info_nce(z, z, z[:, :2]), "negatives"),
        (lambda: info_nce(z, z, z.expand(3, 4, 3)), "negatives"),
        (lambda: info_nce(z, z, z, 0.0), "temperature"),
        (lambda: info_nce(z, z, z, 0.1, math.nan), "margin"),
        (lambda: info_nce(z, z, z, reduction="max"), "reduction"),
        (lambda: info_nce_of_cosines(z, z), "positive"),
        (lambda: info_nce_of_cosines(z[:, 0], z[:2]), "negatives"),
        (lambda: nt_xent(z[:3]), "z"),
        (lambda: nt_xent(z, 1), "n_views"),
        (lambda: nt_xent(z[:0]), "z"),
        (lambda: sup_con(z, labels[:3]), "labels"),
        (lambda: sup_con(z, labels, -1.0), "temperature"),
    ]
    for call, name in refused:
        with pytest.raises(ValueError, match=name):
            call()
    for call, name in [(lambda: nt_xent(z.long()), "z"), (lambda: sup_con(z, labels.float()), "labels")]:
        with pytest.raises(TypeError, match=name):
            call()
