from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trimtab.unlearning import klom, margins, membership_auc, relearning_steps


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_margin_is_the_log_odds_of_the_label() -> None:
    logits, targets = drawn(3, 5, 4), torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(margins(logits, targets), (p / (1 - p)).log())
    torch.testing.assert_close(margins(logits + 1000, targets), margins(logits, targets), atol=1e-3, rtol=1e-3)


def test_margins_of_large_logits_are_finite() -> None:
    assert margins(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1])).item() == -2e4


def test_equal_sets_have_no_divergence_and_the_order_of_models_is_nothing() -> None:
    one, other = drawn(30, 7), drawn(40, 7, seed=1)
    assert klom(one, one).abs().max() == 0
    torch.testing.assert_close(klom(one, other), klom(one.flip(0), other[torch.randperm(40)]))


def test_divergence_by_hand() -> None:
    # Bins of width 0.5 over [0, 1]: p = (1/4, 3/4), q = (1/2, 1/2).
    p, q = torch.tensor([[0.0], [0.9], [0.9], [1.0]]), torch.tensor([[0.1], [0.8]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert klom(p, q, bins=2).item() == pytest.approx(expected)


def test_it_is_of_the_unlearned_from_the_oracles() -> None:
    narrow, wide = torch.zeros(4, 1), torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert klom(narrow, wide, bins=2).item() == pytest.approx(math.log(2))
    assert klom(wide, narrow, bins=2).item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-5))


def test_margins_beyond_the_ends_are_set_to_them() -> None:
    assert klom(torch.full((3, 1), 500.0), torch.full((3, 1), 100.0)).item() == 0


def test_membership_is_the_area_under_the_curve() -> None:
    members, others = drawn(50).round(decimals=1), drawn(70, seed=2).round(decimals=1) + 0.3
    truth, score = [1] * 50 + [0] * 70, torch.cat([-members, -others])
    assert membership_auc(members, others) == pytest.approx(roc_auc_score(truth, score))
    assert membership_auc(members, members) == pytest.approx(0.5)


class Counter:
    """Training that knows again what it was to forget after so many steps."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.done, self.looks = wanted, 0, 0

    def step(self) -> None:
        self.done += 1

    def known_again(self) -> bool:
        self.looks += 1
        return self.done >= self.wanted


@pytest.mark.parametrize(
    ("wanted", "limit", "every", "found", "done", "looks"),
    [
        (0, 10, 1, 0, 0, 1),  # it was never forgotten
        (3, 10, 1, 3, 3, 4),
        (3, 10, 2, 4, 4, 3),  # seen at the next look
        (99, 10, 4, 10, 10, 3),  # given up, and no step beyond
        (0, 0, 1, 0, 0, 0),
    ],
)
def test_steps_of_relearning_are_counted(
    wanted: int, limit: int, every: int, found: int, done: int, looks: int
) -> None:
    training = Counter(wanted)
    assert relearning_steps(training.step, training.known_again, limit=limit, every=every) == found
    assert (training.done, training.looks) == (done, looks)


def test_relearning_a_line_takes_the_steps_of_its_closed_form() -> None:
    # Descent on w^2 / 2 at a rate of 1/2 halves w: below 1/100 from 1 after 7 steps.
    w = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.5)

    def step() -> None:
        optimizer.zero_grad()
        (w.square().sum() / 2).backward()
        optimizer.step()

    assert relearning_steps(step, lambda: bool(w.abs() < 0.01), limit=20) == 7


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="limit"):
        relearning_steps(lambda: None, lambda: True, limit=-1)
    with pytest.raises(ValueError, match="every"):
        relearning_steps(lambda: None, lambda: True, limit=3, every=0)
    with pytest.raises(ValueError, match="targets"):
        margins(torch.zeros(2, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="targets"):
        margins(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="targets"):
        margins(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="logits"):
        margins(torch.zeros(2, 1), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="oracle"):
        klom(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="unlearned"):
        klom(torch.zeros(0, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="unlearned"):
        klom(torch.full((2, 3), math.nan), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="clip"):
        klom(torch.zeros(2, 3), torch.zeros(2, 3), clip=(1.0, 1.0))
    with pytest.raises(ValueError, match="members"):
        membership_auc(torch.zeros(0), torch.zeros(3))


def test_arrays_are_named() -> None:
    with pytest.raises(TypeError, match="targets must be a tensor, got ndarray"):
        margins(torch.zeros(2, 3), np.zeros(2, dtype=np.int64))  # type: ignore[arg-type]
