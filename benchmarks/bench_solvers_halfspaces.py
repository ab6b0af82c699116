"""Learning a halfspace with a test of its assumptions, beside scikit-learn's linear models, and what the tests cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from benchmarks.timing import medians
from trimtab.solvers import HalfspaceTesterLearner, halfspace_iterates
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.tester_learner.halfspaces import Halfspaces


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Time of a fit on Gaussian samples, with the excess errors beside it, and the share that is descent."""
    trial = Trial(budget="smoke" if quick else "laptop")
    for d in (5,) if quick else (5, 10, 20):
        sample, excess = Halfspaces(dimensions=d).draw(trial, "gaussian")
        ours = HalfspaceTesterLearner(noise_rate=sample.rate, random_state=0).fit(sample.X, sample.y)
        peers = {
            "LogisticRegression": LogisticRegression(fit_intercept=False).fit(sample.X, sample.y),
            "LinearSVC": LinearSVC(fit_intercept=False, random_state=0).fit(sample.X, sample.y),
        }
        half = len(sample.X) // 2
        rng = np.random.default_rng(0)
        batches, start = rng.integers(half, size=(ours.n_iter, ours.batch_size)), rng.normal(size=d)

        def descend(
            X: np.ndarray = sample.X[:half],
            y: np.ndarray = sample.y[:half],
            start: np.ndarray = start,
            batches: np.ndarray = batches,
            sigma: float = ours.sigma_,
        ) -> None:
            halfspace_iterates(X, y, sigma, start=start, batches=batches)

        calls = {name: lambda m=model, s=sample: m.fit(s.X, s.y) for name, model in {"ours": ours, **peers}.items()}
        seconds = medians({**calls, "descent": descend}, 1 if quick else 7, warmup=1)
        word = "accepted" if ours.accepted_ else "rejected"
        for name, model in peers.items():
            yield {
                "what": f"tester-learner's fit against {name}, {len(sample.X):,} x {d}",
                "ours": 1e3 * seconds["ours"],
                "peer": 1e3 * seconds[name],
                "ratio": seconds["ours"] / seconds[name],
                "unit": "ms",
                "note": f"{word}; excess error {excess(ours.coef_[0]):.4f} against {excess(model.coef_[0]):.4f}",
            }
        yield {
            "what": f"tester-learner's tests against its descent, {len(sample.X):,} x {d}",
            "ours": 1e3 * (seconds["ours"] - seconds["descent"]),
            "peer": 1e3 * seconds["descent"],
            "ratio": (seconds["ours"] - seconds["descent"]) / seconds["descent"],
            "unit": "ms",
            "note": f"{len(ours.report_.tests)} tests of {len(ours.candidates_)} candidates",
        }
