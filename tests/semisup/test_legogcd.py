from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.ops.info_nce import nt_xent, sup_con
from trimtab.semisup import LegoGCD, LocalEntropyRegularization, dual_view_kl, gcd_accuracy, self_distillation


def cosines(views: int = 12, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(views, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


NOTHING = torch.zeros(12, dtype=torch.bool)


def test_kl_is_the_divergence_and_zero_only_for_equal_views() -> None:
    first, second = cosines(), cosines(seed=1)
    expected = F.kl_div((second / 0.1).log_softmax(1), (first / 0.1).softmax(1), reduction="batchmean")
    torch.testing.assert_close(dual_view_kl(first, second), expected)
    assert dual_view_kl(first, second) > 0
    assert dual_view_kl(first, first) == 0
    assert not torch.isclose(dual_view_kl(first, second), dual_view_kl(second, first))


def test_softened_kl_takes_the_softmax_twice_and_is_bounded() -> None:
    first, second = cosines(), cosines(seed=1)
    p, q = (first / 0.1).softmax(1), (second / 0.1).softmax(1)
    expected = (p * (p - q)).sum(1) - p.exp().sum(1).log() + q.exp().sum(1).log()
    torch.testing.assert_close(dual_view_kl(first, second, softened=True), expected.mean())
    opposite = torch.tensor([[9.0, -9.0]])
    torch.testing.assert_close(dual_view_kl(opposite, -opposite, softened=True), torch.tensor(1.0))
    assert dual_view_kl(opposite, -opposite) > 100
    assert dual_view_kl(first, first, softened=True) == 0
    given = batch()
    found = rule(softened_dkl=True).loss(*given)
    scores = rule()(torch.cat(given[:2]))
    torch.testing.assert_close(found["dkl"], dual_view_kl(scores[:10], scores[10:], softened=True).detach())
    assert not torch.isclose(found["total"], rule().loss(*given)["total"])


def test_kl_has_gradients_through_both_views() -> None:
    first, second = cosines().requires_grad_(), cosines(seed=1).requires_grad_()
    assert torch.autograd.gradcheck(dual_view_kl, (first, second))


def test_distillation_by_hand_with_constant_targets() -> None:
    first, second = cosines().requires_grad_(), cosines(seed=1).requires_grad_()
    value = self_distillation(first, second, 0.05, 0.2)
    p, q = ((view / 0.05).softmax(1).detach() for view in (first, second))
    expected = -(q * (first / 0.2).log_softmax(1)).sum(1).mean() - (p * (second / 0.2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(value, expected / 2)
    grad = torch.autograd.grad(value, first)[0]
    torch.testing.assert_close(grad, ((first / 0.2).softmax(1) - q).detach() / 0.2 / len(first) / 2)
    tensor = self_distillation(first, second, torch.tensor(0.05, dtype=torch.float64), 0.2)
    torch.testing.assert_close(tensor, value)


def test_local_entropy_with_an_even_mean_is_the_entropy_of_what_counts() -> None:
    scores = cosines()
    ler = LocalEntropyRegularization(3, 5, threshold=0.5).double()
    p = (scores / 0.1).softmax(1)
    counts = (p.amax(1) >= 0.5) & (scores.argmax(1) < 3)
    assert 0 < counts.sum() < 12
    entropy = torch.special.entr((scores / 0.05).softmax(1)).sum(1)
    torch.testing.assert_close(ler(scores, NOTHING), entropy[counts].sum() / 12)


def test_local_entropy_reads_the_mean_before_and_then_takes_the_batch_in() -> None:
    ler = LocalEntropyRegularization(3, 5, threshold=0.0, momentum=0.8).double()
    mean = torch.full((5,), 0.2, dtype=torch.float64)
    for seed in range(3):
        scores = cosines(seed=seed)
        s = scores / 0.05
        each = -(s.softmax(1) * (s + 0.4 * mean.log()).log_softmax(1)).sum(1)
        torch.testing.assert_close(ler(scores, NOTHING), (each * (scores.argmax(1) < 3)).mean())
        mean = 0.8 * mean + 0.2 * scores.softmax(1).mean(0)
        torch.testing.assert_close(ler.mean, mean)
        assert ler.mean.sum().item() == pytest.approx(1)
    ler.eval()(cosines(seed=9), NOTHING)
    torch.testing.assert_close(ler.mean, mean)


def test_local_entropy_leaves_out_labelled_novel_and_unsure_views() -> None:
    sure_known = torch.tensor([[1.0, 0.0, 0.0]])
    one = torch.tensor([False])
    ler = LocalEntropyRegularization(2, 3).eval()
    assert ler(0.5 * sure_known, one) > 0
    assert ler(0.5 * sure_known, ~one) == 0
    assert ler(0.5 * sure_known.flip(1), one) == 0
    assert ler(0.01 * sure_known, one) == 0
    assert LocalEntropyRegularization(2, 3, threshold=1.1)(sure_known, one) == 0


def test_local_entropy_has_a_gradient_through_its_own_target() -> None:
    ler = LocalEntropyRegularization(5, 5, threshold=0.0).double().eval()
    scores = cosines().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ler(z, NOTHING), (scores,))
    ler(scores, NOTHING).backward()
    assert scores.grad is not None
    p = (scores.detach() / 0.05).softmax(1)
    entropy = torch.special.entr(p).sum(1, keepdim=True)
    torch.testing.assert_close(scores.grad, -p * (p.log() + entropy) / 0.05 / 12)


def rule(**options: object) -> LegoGCD:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = {"hidden": 16, "projection": 6, "threshold": 0.3, **options}
        return LegoGCD(nn.Flatten(), 4, 2, 4, **chosen).double()  # type: ignore[arg-type]


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 10, 2, 2, generator=generator, dtype=torch.float64)
    labelled = torch.arange(10) < 4
    return first, second, torch.tensor([0, 1, 1, 0, 9, -3, 2, 3, 0, 1]), labelled


def test_the_total_by_hand() -> None:
    held, (first, second, targets, labelled) = rule(sup_weight=0.3, even=1.5), batch()
    held.set_epoch(29)
    before = held.local_entropy.mean.clone()
    found = held.loss(first, second, targets, labelled)
    views = torch.cat([first, second])
    scores = held(views)
    torch.testing.assert_close(scores, F.normalize(views.flatten(1)) @ F.normalize(held.prototypes).T)
    known = targets[:4].repeat(2)
    rows = torch.cat([torch.arange(4), torch.arange(10, 14)])
    z = held.projector(views.flatten(1))
    even = math.log(4) - torch.special.entr((scores / 0.1).softmax(1).mean(0)).sum()
    expected = {
        "cross_entropy": F.cross_entropy(scores[rows] / 0.1, known),
        "distil": self_distillation(scores[:10], scores[10:], 0.04),
        "dkl": dual_view_kl(scores[:10], scores[10:]),
        "even": even,
        "contrast": nt_xent(z, 2, 1.0),
        "sup_contrast": sup_con(z[rows], known, 0.07),
    }
    ler = LocalEntropyRegularization(2, 4, threshold=0.3).double()
    ler.mean.copy_(before)
    expected["ler"] = ler(scores, labelled.repeat(2))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())
    free = expected["distil"] + expected["dkl"] + 1.5 * even + expected["contrast"]
    total = 0.7 * free + 0.3 * (expected["cross_entropy"] + expected["sup_contrast"]) + 2 * expected["ler"]
    torch.testing.assert_close(found["total"], total)
    assert found["ler"] > 0


def test_without_the_two_terms_it_is_simgcd() -> None:
    plain, full = rule(ler=0.0, dkl=0.0), rule()
    one, both = plain.loss(*batch()), full.loss(*batch())
    difference = 0.65 * both["dkl"] + 2 * both["ler"]
    torch.testing.assert_close(both["total"] - one["total"], difference)


def test_labels_of_the_unlabelled_are_not_read() -> None:
    first, second, targets, labelled = batch()
    other = torch.where(labelled, targets, 3)
    torch.testing.assert_close(
        rule().loss(first, second, targets, labelled), rule().loss(first, second, other, labelled)
    )


def test_without_labels_the_supervised_part_is_zero() -> None:
    held, (first, second, targets, labelled) = rule(), batch()
    found = held.loss(first, second, targets, torch.zeros_like(labelled))
    assert found["cross_entropy"] == found["sup_contrast"] == 0
    found["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in held.parameters())


def test_the_teachers_temperature_falls_linearly() -> None:
    held = rule(teacher_temperature=(0.07, 0.04), warmup=4)
    seen = []
    for epoch in range(6):
        held.set_epoch(epoch)
        seen.append(held.teacher_temperature.item())
    assert seen == pytest.approx([0.07, 0.06, 0.05, 0.04, 0.04, 0.04])
    assert rule(warmup=0).teacher_temperature.item() == pytest.approx(0.04)


def test_cosines_do_not_depend_on_lengths() -> None:
    held, x = rule(), batch()[0]
    torch.testing.assert_close(held(x), held(7 * x))
    assert held(x).abs().max() <= 1
    with torch.no_grad():
        before = held(x)
        held.prototypes.mul_(3)
    torch.testing.assert_close(held(x), before)


def test_accuracy_has_one_match_for_all_samples() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    found = gcd_accuracy(targets, torch.tensor([4, 4, 4, 9, 9, 1, 1, 9]), targets < 2)
    assert (found.all, found.known, found.novel) == pytest.approx((7 / 8, 1.0, 2 / 3))
    swapped = gcd_accuracy(targets, targets, targets < 0)
    assert swapped.all == 1
    assert math.isnan(swapped.known)


def test_half_precision() -> None:
    held = rule().float()
    first, second, targets, labelled = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = held.loss(first.float(), second.float(), targets, labelled)
    assert found["total"].dtype == torch.float32
    assert found["total"].isfinite()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: LocalEntropyRegularization(6, 5), ValueError, "num_known"),
        (lambda: LocalEntropyRegularization(2, 5, momentum=1.5), ValueError, "momentum"),
        (lambda: LocalEntropyRegularization(2, 5)(cosines(), NOTHING[1:]), ValueError, "labelled"),
        (lambda: LocalEntropyRegularization(2, 5)(cosines(), NOTHING.long()), TypeError, "labelled"),
        (lambda: LocalEntropyRegularization(2, 4)(cosines(), NOTHING), ValueError, "logits"),
        (lambda: rule(ler=-1.0), ValueError, "ler"),
        (lambda: rule(sup_weight=1.1), ValueError, "sup_weight"),
        (lambda: rule(teacher_temperature=(0.07,)), ValueError, "teacher_temperature"),
        (lambda: rule().set_epoch(-1), ValueError, "epoch"),
        (lambda: rule().loss(batch()[0], batch()[1][1:], *batch()[2:]), ValueError, "second"),
        (lambda: rule().loss(*batch()[:2], batch()[2][1:], batch()[3]), ValueError, "targets"),
        (lambda: rule().loss(*batch()[:2], batch()[2].double(), batch()[3]), TypeError, "targets"),
        (lambda: rule().loss(*batch()[:3], batch()[3][1:]), ValueError, "labelled"),
        (lambda: rule().loss(*(part[:0] for part in batch())), ValueError, "first"),
        (lambda: dual_view_kl(cosines(), cosines(11)), ValueError, "second"),
        (lambda: self_distillation(cosines(), cosines(), 0.0), ValueError, "teacher_temperature"),
        (lambda: gcd_accuracy(torch.arange(3), torch.arange(3), torch.ones(2, dtype=torch.bool)), ValueError, "known"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()
