"""Supervised dictionaries against scikit-learn's features followed by a logistic regression: time, AUC and F1."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import NMF, PCA, MiniBatchDictionaryLearning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.timing import compared, medians
from trimtab.solvers import SupervisedDictionary
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.supervised_dictionary.documents import Documents
from trimtab.studies.solvers.supervised_dictionary.few_features import Contest, Part
from trimtab.studies.tasks.tabular_classification import TabularClassification, clothes, tumours


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Fits of both at their defaults, but for a reconstruction weight of one for each sample."""
    trial = Trial(budget="smoke" if quick else "laptop")
    yield from _fits("documents", Documents(rank=5).contest(trial), quick)
    if not quick:
        yield from _fits("documents, rank 20", Documents(rank=20).contest(trial), quick)
    yield from _fits("images", _of_table(clothes, trial, rank=5), quick)
    yield from _fits("tumours", _of_table(tumours, trial, rank=2), quick)


def _of_table(task: TabularClassification, trial: Trial, rank: int) -> Contest:
    """The rows of a shared task."""
    t = task.table(trial)
    train, valid, test = (
        Part(x, y, np.empty((len(y), 0))) for x, y in ((t.x, t.y), (t.x_held, t.y_held), (t.x_test, t.y_test))
    )
    return Contest(train, valid, test, rank=rank, seed=trial.seed, quick=trial.budget == "smoke")


def _fits(name: str, contest: Contest, quick: bool) -> Iterator[dict[str, object]]:
    x, y, rank = contest.train.x, contest.train.y, contest.rank
    signed = x.min() < 0
    blocks = SupervisedDictionary(
        rank, solver="bcd", xi=contest.unit, nonnegative=not signed, max_iter=50, random_state=0
    )
    ours: dict[str, Any] = {
        "filter, LPGD": SupervisedDictionary(rank, xi=contest.unit, random_state=0),
        "feature, LPGD": SupervisedDictionary(rank, mode="feature", xi=contest.unit, random_state=0),
        "filter, BCD of 50 sweeps": blocks,
    }
    sparse = MiniBatchDictionaryLearning(
        rank,
        alpha=0.01,
        batch_size=64,
        max_iter=20,
        transform_algorithm="lasso_cd",
        transform_alpha=0.01,
        random_state=0,
    )
    learners: dict[str, Any] = {"PCA": PCA(rank, random_state=0)}
    if rank < 20:  # beyond which it takes half a minute
        learners["dictionary learning"] = sparse
    if not signed:
        learners["NMF"] = NMF(rank, init="nndsvda", random_state=0)
    peers: dict[str, Any] = {
        f"{key} + LR": make_pipeline(learner, StandardScaler(), LogisticRegression(max_iter=1000))
        for key, learner in learners.items()
    }
    contestants = ours | peers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that run out, on either side
        calls = {key: (lambda model=model: model.fit(x, y)) for key, model in contestants.items()}
        seconds = medians(calls, repeats=1 if quick else 3, warmup=0)
    auc = {key: _auc(model, contest) for key, model in contestants.items()}
    f1 = {key: _f1(model, contest) for key, model in contestants.items()}
    main, reference = next(iter(ours)), next(reversed(peers))
    for mine in ours:
        for peer in peers if mine == main else [reference]:
            ratio = seconds[mine] / seconds[peer]
            aimed = mine == main and not peer.startswith("PCA")
            yield {
                "what": f"SupervisedDictionary ({mine}) against {peer}, {name}, {len(x)} x {x.shape[1]}, {rank} atoms",
                "ours": 1e3 * seconds[mine],
                "peer": 1e3 * seconds[peer],
                "ratio": ratio,
                "unit": "ms",
                "aim": "at most 1, at an AUC no lower" if aimed else "",
                "met": (ratio <= 1 and auc[mine] >= auc[peer] - 1e-3) if aimed else None,
                "note": f"AUC {auc[mine]:.3f} against {auc[peer]:.3f}, F1 {f1[mine]:.3f} against {f1[peer]:.3f}",
            }
    for peer in peers:
        yield _to_equal_accuracy(name, contest, ours[main], peers[peer], peer, auc[peer], quick)


def _to_equal_accuracy(
    name: str, contest: Contest, model: Any, peer: Any, called: str, aim: float, quick: bool
) -> dict[str, object]:
    """The time of as many of our iterations, in doublings, as an AUC of the peer's takes."""
    iterations, short = 1, clone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while _auc(short.set_params(max_iter=iterations).fit(contest.train.x, contest.train.y), contest) < aim:
            if iterations >= model.max_iter:
                break
            iterations *= 2
        calls = {
            key: (lambda m=m: m.fit(contest.train.x, contest.train.y)) for key, m in (("ours", short), ("peer", peer))
        }
        seconds = medians(calls, repeats=1 if quick else 5, warmup=0)
    reached = _auc(short, contest)
    return compared(
        f"SupervisedDictionary (filter, LPGD) to the AUC of {called}, {name}",
        seconds,
        None if called.startswith("PCA") else 1,
        f"{iterations} iterations, AUC {reached:.3f} against {aim:.3f}",
        met=reached >= aim,
    )


def _auc(model: Any, contest: Contest) -> float:
    return float(roc_auc_score(contest.test.y, model.decision_function(contest.test.x)))


def _f1(model: Any, contest: Contest) -> float:
    """Of the rare class, at the threshold that is exceeded as often in the test part as that class was in training."""
    scores = model.decision_function(contest.test.x)
    return float(f1_score(contest.test.y, scores >= np.quantile(scores, 1 - contest.train.y.mean())))
