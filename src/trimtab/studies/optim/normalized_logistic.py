"""Does the normalised logistic step separate two classes in fewer passes where one class is rare?

Gradient descent and its normalised form choose among the same six step sizes, 0.1 to 1,000, each on another draw of the
data; perceptrons have no step size to choose. Everything starts from zero and stops at the first weights that put every
training sample on its side. That normalised steps stay within the bound of Theorem 6.1, and take the iterations of the
paper's Table 1, is tested, not measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sklearn.linear_model import Perceptron
from torch import Tensor

from trimtab import optim
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.logistic_regression import few_threes, outvoted, threes_eights
from trimtab.studies.tools.full_batch import RATES, Minimizer, Oracle

Step = Callable[[Tensor, Tensor, Tensor, float], Tensor]
GAMMAS = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def stepwise(step: Step, oracle: Oracle) -> None:
    """Steps of one pass each, at the setting's step size, if there is one."""
    theta, gamma = oracle.start, float(oracle.setting.get("lr", 1.0))
    oracle.record(theta)
    while oracle.shape[0] == 1:  # there is no such step for more than two classes: it stays where it is
        oracle.spend(1.0)
        theta = step(theta, oracle.objective.features, oracle.objective.labels, gamma)
        oracle.record(theta)


def batch_perceptron(theta: Tensor, X: Tensor, y: Tensor, gamma: float) -> Tensor:
    """The mean over all samples of those that are wrong."""
    return optim.batch_perceptron_step(theta, X, y)


def normalized_batch_perceptron(theta: Tensor, X: Tensor, y: Tensor, gamma: float) -> Tensor:
    """The mean over the wrong samples alone."""
    samples = X * y[:, None]
    return theta + samples[samples @ theta <= 0].mean(0)


def online_perceptron(oracle: Oracle) -> None:
    """scikit-learn's perceptron, sample by sample in an order drawn anew every pass."""
    X, y = oracle.objective.features.numpy(), oracle.objective.labels.numpy()
    draw = int(torch.randint(2**31, (), generator=oracle.generator))
    model = Perceptron(fit_intercept=False, max_iter=1, tol=None, random_state=draw)
    oracle.record(oracle.start)
    while oracle.shape[0] == 1:
        oracle.spend(1.0)
        model.partial_fit(X, y, classes=[-1, 1])
        oracle.record(torch.from_numpy(model.coef_[0].copy()))


def separate(step: Step, trial: Trial) -> Result:
    """Passes and the highest loss on the way at step sizes from 0.1 to 10,000, threes against eights."""
    objective = threes_eights.objective(threes_eights.split(trial))
    most = trial.pick(smoke=300, laptop=20_000, paper=100_000)
    passes, peaks = [], []
    for gamma in GAMMAS:
        theta, peak = torch.zeros_like(objective.features[0]), 0.0
        for count in range(most + 1):
            peak = max(peak, float(objective(theta)))
            if count == most or bool((objective.labels * (objective.features @ theta) > 0).all()):
                break
            theta = step(theta, objective.features, objective.labels, gamma)
        passes.append(float(count))
        peaks.append(peak)
    return Result(
        {"passes_at_1": passes[1], "passes_at_10000": passes[-1], "peak_at_1": peaks[1], "peak_at_10000": peaks[-1]}
        | {"speed_up": passes[1] / max(1.0, passes[-1]), "rise": peaks[-1] / peaks[1]},
        {
            "passes": Curve(GAMMAS, passes, x_label="step size"),
            "peak_loss": Curve(GAMMAS, peaks, x_label="step size"),
        },
    )


steps = Experiment(
    name="step sizes",
    arms={
        "gradient descent": partial(separate, optim.logistic_step),
        "Normalized LR+GD": partial(separate, optim.normalized_logistic_step),
    },
    metrics={
        "passes_at_1": Metric("passes at step size 1", best="min"),
        "passes_at_10000": Metric("passes at step size 10,000", best="min"),
        "peak_at_1": Metric("highest loss at step size 1 (nats)", best=None),
        "peak_at_10000": Metric("highest loss at step size 10,000 (nats)", best=None),
        "speed_up": Metric("passes at step size 1 over those at 10,000"),
        "rise": Metric("highest loss at step size 10,000 over that at 1", best=None),
    },
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    reads=("digits",),
    log="xy",
    cost=2.0,
)

study = Study(
    paper="normalized_logistic",
    entrants={
        name: dict.fromkeys((few_threes, outvoted, threes_eights), entrant)
        for name, entrant in {
            "Normalized LR+GD": Minimizer(
                minimize=partial(stepwise, optim.normalized_logistic_step), search={"lr": RATES}
            ),
            "batch perceptron": Minimizer(minimize=partial(stepwise, batch_perceptron)),
            "normalized batch perceptron": Minimizer(minimize=partial(stepwise, normalized_batch_perceptron)),
            "online perceptron": Minimizer(minimize=online_perceptron),
        }.items()
    },
    on=[few_threes, outvoted, threes_eights],
    experiments=[steps],
    headline=Claim(
        "Normalized LR+GD",
        below="gradient descent",
        on="passes",
        times=1.3,
        at=few_threes,
        text="Normalized LR+GD separates a rare class in 1.3 times fewer passes than gradient descent",
    ),
    claims=[
        Claim("Normalized LR+GD", below="batch perceptron", on="passes", times=1.3, at=few_threes),
        Claim("Normalized LR+GD", below="gradient descent", on="passes", times=1.3, at=outvoted),
        Claim("Normalized LR+GD", below="gradient descent", on="passes", times=0.8, at=threes_eights),
        Claim("Normalized LR+GD", below="online perceptron", on="passes", at=few_threes),
        Claim("Normalized LR+GD", below="L-BFGS", on="passes", at=few_threes),
        Claim("gradient descent", at_least=10, on="speed_up", at=steps),
        Claim("gradient descent", at_least=10, on="rise", at=steps),
    ],
)
