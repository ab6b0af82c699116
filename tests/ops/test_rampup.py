from __future__ import annotations

import itertools
import math

import pytest

from trimtab.ops.rampup import sigmoid_rampup


def test_rises_from_exp_minus_five_to_one() -> None:
    values = [sigmoid_rampup(step, 20) for step in range(25)]
    assert values[0] == pytest.approx(math.exp(-5))
    assert values[10] == pytest.approx(math.exp(-5 / 4))
    assert values[20:] == [1.0] * 5
    assert all(before < after for before, after in itertools.pairwise(values[:21]))
    assert sigmoid_rampup(0, 0) == 1.0


def test_negative_arguments_are_refused() -> None:
    for arguments in ((-1, 5), (1, -5)):
        with pytest.raises(ValueError, match="step|length"):
            sigmoid_rampup(*arguments)
