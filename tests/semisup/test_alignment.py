from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trimtab.semisup import DistributionAlignment, QueueDistributionAlignment, align_distribution


def probs(batch: int = 6, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


def test_a_uniform_marginal_changes_nothing() -> None:
    torch.testing.assert_close(align_distribution(probs(), torch.full((4,), 0.25)), probs())


def test_a_target_that_is_the_marginal_changes_nothing() -> None:
    marginal = torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(align_distribution(probs(), marginal, marginal), probs())


def test_odds_are_multiplied_by_target_over_marginal() -> None:
    p, marginal, target = probs(), probs(1, seed=1)[0], probs(1, seed=2)[0]
    aligned = align_distribution(p, marginal, target)
    torch.testing.assert_close(aligned.sum(1), torch.ones(6, dtype=torch.float64))
    odds = (p[:, 0] / p[:, 1]) * (target[0] / target[1]) * (marginal[1] / marginal[0])
    torch.testing.assert_close(aligned[:, 0] / aligned[:, 1], odds)


def test_the_exponential_mean_is_read_before_it_takes_the_batch_in() -> None:
    align, mean = DistributionAlignment(4, momentum=0.7).double(), torch.full((4,), 0.25, dtype=torch.float64)
    for seed in range(4):
        p = probs(seed=seed)
        torch.testing.assert_close(align(p), align_distribution(p, mean))
        mean = 0.7 * mean + 0.3 * p.mean(0)
        torch.testing.assert_close(align.marginal, mean)


def test_the_queue_has_the_last_batches_and_this_one() -> None:
    align, means = QueueDistributionAlignment(4, length=3).double(), []
    for seed in range(7):
        p = probs(seed=seed)
        means.append(p.mean(0))
        torch.testing.assert_close(align(p), align_distribution(p, torch.stack(means[-3:]).mean(0)))


def test_a_queue_in_eval_mode_reads_only() -> None:
    align = QueueDistributionAlignment(4).double()
    torch.testing.assert_close(align.eval()(probs()), probs())
    align.train()(probs())
    before = align.state_dict()
    torch.testing.assert_close(align.eval()(probs(seed=1)), align_distribution(probs(seed=1), probs().mean(0)))
    assert all(torch.equal(value, align.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("build", [DistributionAlignment, QueueDistributionAlignment])
def test_constant_predictions_end_at_the_target(build) -> None:  # type: ignore[no-untyped-def]
    target = [0.5, 0.2, 0.2, 0.1]
    align = build(4, target=target).double()
    p = probs(1).expand(5, 4)
    for _ in range(300):
        aligned = align(p)
    torch.testing.assert_close(aligned[0], torch.tensor(target, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [DistributionAlignment, QueueDistributionAlignment])
def test_constant_finite_and_restorable(build) -> None:  # type: ignore[no-untyped-def]
    align = build(4)
    assert not align(probs().float().requires_grad_()).requires_grad
    before = {name: value.clone() for name, value in align.state_dict().items()}
    bad = probs().float()
    bad[0, 0] = float("nan")
    align(bad)
    assert all(torch.equal(value, align.state_dict()[name]) for name, value in before.items())
    again = build(4)
    again.load_state_dict(align.state_dict())
    assert torch.equal(align(probs(seed=3).float()), again(probs(seed=3).float()))
    one = torch.eye(4)[:1]  # classes that are never predicted
    assert build(4)(one).isfinite().all()
    assert build(4)(probs().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: DistributionAlignment(1), ValueError, "num_classes"),
        (lambda: DistributionAlignment(3, momentum=1.5), ValueError, "momentum"),
        (lambda: DistributionAlignment(2, target=[1.0, 0.0]), ValueError, "target"),
        (lambda: QueueDistributionAlignment(3, length=0), ValueError, "length"),
        (lambda: DistributionAlignment(3)(probs()), ValueError, "probs"),
        (lambda: QueueDistributionAlignment(4)(probs()[:0]), ValueError, "probs"),
        (lambda: DistributionAlignment(4)(probs().long()), TypeError, "probs"),
        (lambda: align_distribution(probs(), torch.ones(3)), ValueError, "marginal"),
        (lambda: align_distribution(probs(), torch.ones(4), torch.ones(2)), ValueError, "target"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()


def test_the_queue_agrees_with_semilearn() -> None:
    hooks = pytest.importorskip("semilearn.algorithms.hooks")
    theirs = hooks.DistAlignQueueHook(5, queue_length=3, p_target_type="uniform")
    alone = SimpleNamespace(distributed=False, world_size=1)
    ours, generator = QueueDistributionAlignment(5, length=3), torch.Generator().manual_seed(0)
    for _ in range(5):
        said = torch.randn(8, 5, generator=generator).softmax(1)
        torch.testing.assert_close(ours(said), theirs.dist_align(alone, said), atol=2e-5, rtol=0)
