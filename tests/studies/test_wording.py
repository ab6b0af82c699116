"""Claims and numbers in words."""

import pytest

from trimtab.studies.engine.wording import amount, claim_sentence, in_sentence, label, number, subject, together

ACCURACY = {"label": "test accuracy, mean of the last 3 rounds (%)", "percent": True}
TIME = {"label": "time of a fit (s)", "percent": False}


def claim(relation, margin, *, other="SGD", ratio=False, arm="ELR"):
    return {"arm": arm, "other": other, "relation": relation, "margin": margin, "ratio": ratio}


@pytest.mark.parametrize(
    ("held", "metric", "told"),
    [
        (
            claim("beats", 0.01),
            ACCURACY,
            "The test accuracy, mean of the last 3 rounds, is at least 1 point higher for ELR than for SGD",
        ),
        (
            claim("beats", -0.005, other="SGD, twice the rate"),
            {"label": "Dice score (%)", "percent": True},
            "The Dice score is at most 0.5 points lower for ELR than for SGD (twice the rate)",
        ),
        (claim("below", 0.0), TIME, "The time of a fit is shorter for ELR than for SGD"),
        (
            claim("below", 10, ratio=True),
            TIME,
            "The time of a fit is shorter for ELR than for SGD by a factor of at least 10",
        ),
        (claim("below", 0.8, ratio=True), TIME, "The time of a fit is at most 1.25 times as long for ELR as for SGD"),
        (
            claim("beats", 0.5, ratio=True),
            {"label": "kurtosis (normal: 3)", "percent": False},
            "The kurtosis (normal: 3) is at least half as high for ELR as for SGD",
        ),
        (
            claim("below", 1, other="without the margin"),
            {"label": "the probe's loss on unseen images (nats a token)", "percent": False},
            "The probe's loss on unseen images is at least 1 nat a token lower for ELR than for “without the margin”",
        ),
        (
            claim("at_most", 0.2, other=None),
            {"label": "victims that fall (%)", "percent": True},
            "The share of victims that fall is at most 20 % for ELR",
        ),
        (
            claim("at_least", 1.0, other=None),
            {"label": "Gaussian samples accepted (%)", "percent": True},
            "The share of Gaussian samples accepted is 100 % for ELR",
        ),
        (
            claim("at_most", -0.45, other=None),
            {"label": "Kendall's tau of losses", "percent": False},
            "Kendall's tau of losses is at most −0.45 for ELR",
        ),
        (
            claim("below", 2e6),
            {"label": "passes at step size 1 over those at 10,000", "percent": False},
            "The number of passes at step size 1 over those at 10,000 is at least 2 million lower for ELR than for SGD",
        ),
    ],
)
def test_a_claim_is_a_sentence_that_can_be_read_aloud(held, metric, told):
    assert claim_sentence(held, metric) == told


def test_what_is_counted_is_told_by_its_number_or_share():
    counted = ("samples needed (thousands)", "cosine between the outputs of two networks", "weights (kB)", "loss")
    assert [subject({"label": words, "percent": False}) for words in counted] == [
        ("number of samples needed", False),
        ("cosine between the outputs of two networks", False),
        ("weights", True),
        ("loss", False),
    ]
    assert subject({"label": "attention, forward (ms)", "percent": False}) == ("time of attention, forward", False)
    assert label({"label": "steps to 1e-10 (of 100)"}) == ("steps to 10⁻¹⁰ (of 100)", "")
    assert in_sentence("a, b (c)") == "“a, b (c)”"


def test_a_value_and_its_interval_end_at_the_same_place():
    percent, plain = {"percent": True}, {"percent": False}
    assert together(0.0001, (-0.003, 0.002), percent) == ("0.01", ("−0.30", "0.20"))
    assert together(-0.00002, (-0.016, 0.016), percent) == ("0.00", ("−1.60", "1.60"))
    assert together(-0.00048, (-0.00058, -0.00037), plain) == ("−0.00048", ("−0.00058", "−0.00037"))
    assert together(852.3, (803.4, 901.9), plain) == ("852", ("803", "902"))
    assert together(2.5e-9, (1e-9, 4e-9), plain) == ("2.5 × 10⁻⁹", ("10⁻⁹", "4 × 10⁻⁹"))
    assert [number(v) for v in (-0.0, -12_345, 1e-10, 0.00048)] == ["0", "−12,300", "10⁻¹⁰", "0.00048"]
    assert [amount(v, percent) for v in (0.0, -1e-9, 0.0002, -0.1234)] == ["0.0", "0.0", "0.02", "−12.3"]
