"""Does SGD with a large learning rate end in flat and simple minima where gradient descent stays in sharp ones?"""

from __future__ import annotations

from trimtab import optim
from trimtab.studies.study import Arm, Claim, Study
from trimtab.studies.tasks.interpolating_minima import InterpolatingMinima

sparse, digits = InterpolatingMinima(), InterpolatingMinima(problem="digits")
RATES = (0.001, 0.02, 0.05, 0.1)
DIGIT_RATES = (0.02, 0.1)


def descents(task: InterpolatingMinima, rates: tuple[float, ...], where: str = "") -> dict[str, Arm]:
    """SGD on one sample at a time, and gradient descent, at each of the learning rates."""
    sgd = {f"SGD {lr:g}{where}": task.descend(lr=lr, batch_size=1) for lr in rates}
    return sgd | {f"GD {lr:g}{where}": task.descend(lr=lr) for lr in rates}


study = Study(
    paper="dynamical_stability",
    arms={
        **descents(sparse, RATES),
        "SGD from GD's minimum, 0.7 critical": sparse.descend(
            lr=lambda gradients: 0.7 * optim.critical_lr(gradients, 1), batch_size=1, settled=True
        ),
        "SGD from GD's minimum, 1.3 critical": sparse.descend(
            lr=lambda gradients: 1.3 * optim.critical_lr(gradients, 1), batch_size=1, settled=True
        ),
        "GD from GD's minimum, 1.3 critical for SGD": sparse.descend(
            lr=lambda gradients: 1.3 * optim.critical_lr(gradients, 1), settled=True
        ),
        **descents(digits, DIGIT_RATES, ", digits"),
    },
    claims=[
        Claim("SGD 0.1", below="SGD 0.001", on="trace", times=1.5),
        Claim("SGD 0.1", below="SGD 0.001", on="error", times=10.0),
        Claim("SGD 0.1", below="SGD 0.001", on="norm", times=2.0),
        Claim(
            "GD 0.1",
            beats="GD 0.001",
            on="trace",
            times=0.95,
            text="GD 0.1: the trace is no less than 0.95 of that of GD 0.001",
        ),
        Claim(
            "GD 0.1",
            beats="GD 0.001",
            on="error",
            times=0.9,
            text="GD 0.1: the error is no less than 0.9 of that of GD 0.001",
        ),
        *(Claim(f"SGD {lr:g}", at_most=2.0, on="trace_times_lr") for lr in RATES),
        Claim("GD 0.1", at_least=2.0, on="trace_times_lr", text="GD 0.1: trace times learning rate is above SGD's 2"),
        Claim("GD 0.1", at_most=2.0, on="top_times_lr"),
        Claim("SGD from GD's minimum, 0.7 critical", at_most=0.05, on="departure", text="SGD stays below critical_lr"),
        Claim("SGD from GD's minimum, 1.3 critical", at_least=0.1, on="departure", text="SGD leaves above critical_lr"),
        Claim(
            "GD from GD's minimum, 1.3 critical for SGD",
            at_most=0.05,
            on="departure",
            text="GD stays above SGD's critical_lr",
        ),
        *(Claim(f"SGD {lr:g}, digits", at_most=2.0, on="trace_times_lr") for lr in DIGIT_RATES),
        *(Claim(f"GD {lr:g}, digits", at_most=2.0, on="top_times_lr") for lr in DIGIT_RATES),
    ],
    plot=["trace", "loss"],
    log="y",
    leaderboard=[*descents(sparse, RATES), "SGD from GD's minimum, 1.3 critical"],
    notes=(
        "A linear model of 60 coefficients as products of two weights, 30 samples of random signs, 3 true coefficients "
        "of 1; the weights start at 0.5 and at half a standard normal. SGD takes one sample at a time, drawn with "
        "replacement. Runs end at a loss of 1e-7 or after 100,000 steps. The minimum that some runs start next to is "
        "that of full-batch descent at 0.02; they take all steps. The network on scikit-learn's digits 0 and 1 has 30 "
        "hidden units."
    ),
)
