"""The tasks of transport, matrix recovery and graph recovery: what is counted as solved, and what nobody is told."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks import dag_recovery, matrix_recovery, transport
from trimtab.studies.tasks.dag_recovery import GraphLearner, by_variance, judge
from trimtab.studies.tasks.matrix_recovery import Recovery, Solution
from trimtab.studies.tasks.transport import TransportSolver, least_cost, rounded_plan


def test_rounded_plans_have_the_marginals_and_a_plan_that_has_them_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    plan, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5,), (4,)))
    a, b = a / a.sum(), b / b.sum()
    rounded = rounded_plan(plan / plan.sum(), a, b)
    assert bool((rounded >= 0).all())
    torch.testing.assert_close(rounded.sum(1), a)
    torch.testing.assert_close(rounded.sum(0), b)
    torch.testing.assert_close(rounded_plan(rounded, a, b), rounded)


def test_least_cost_is_that_of_the_best_assignment() -> None:
    cost = torch.tensor([[0.0, 1.0, 1.0], [0.5, 0.2, 1.0], [1.0, 0.1, 0.9]], dtype=torch.float64)
    mass = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert least_cost(cost, mass, mass) == pytest.approx((0.0 + 0.2 + 0.9) / 3)


def test_a_plan_too_far_from_the_least_cost_takes_forever() -> None:
    product = TransportSolver(plan=lambda problem: torch.outer(problem.a, problem.b))
    found = transport.clouds.run(Trial(), product)
    assert found.metrics["seconds"] == math.inf
    assert found.metrics["excess"] > 0.01
    tried = transport.clouds.run(Trial(searching=True), product)
    assert not tried.metrics
    assert tried.score == pytest.approx(-1e3 * (1 + found.metrics["excess"]))


@pytest.mark.parametrize("variant", matrix_recovery.MatrixRecovery.variants().values(), ids=lambda v: v.kind)
def test_the_truth_has_no_error_and_is_scored_where_nothing_was_seen(variant: matrix_recovery.MatrixRecovery) -> None:
    truth, instance = variant.instance(Trial())
    assert instance.entries is not None

    def seen_alone(instance: matrix_recovery.Instance) -> Solution:
        found = torch.zeros_like(truth)
        found[instance.entries] = truth[instance.entries]
        return Solution(found, 1)

    assert variant.run(Trial(), Recovery(recover=lambda instance: Solution(truth, 1))).metrics["error"] == 0
    error = variant.run(Trial(), Recovery(recover=seen_alone)).metrics["error"]
    assert error == pytest.approx(1.0) if variant.kind != "outliers" else 0 < error < 1


def test_hidden_similarities_are_hidden_in_their_mirror_image_too() -> None:
    _, instance = matrix_recovery.similarities.instance(Trial())
    known = np.isfinite(instance.table)
    np.testing.assert_array_equal(known, known.T)
    assert 0.4 < known.mean() < 0.8


def test_held_out_measurements_are_not_among_those_that_are_fitted() -> None:
    _, instance = matrix_recovery.outliers.instance(Trial())
    part, held = instance.parted()
    assert len(part.values) + len(held) == len(instance.values)
    kept = part.operator[0](instance.operator[1](torch.ones_like(instance.values)))
    assert bool((kept == 1).all())
    weights = torch.randn(len(part.values), dtype=torch.float64)
    matrix = torch.randn(*instance.shape, dtype=torch.float64)
    torch.testing.assert_close(weights @ part.operator[0](matrix), (part.operator[1](weights) * matrix).sum())


def test_the_true_graph_is_without_a_fault_and_no_graph_without_a_find() -> None:
    seen, truth = dag_recovery.equal.problem(Trial())
    right, none = judge(truth, truth, seen.X), judge(np.zeros_like(truth), truth, seen.X)
    assert right["shd"] == 0
    assert right["order_excess"] == pytest.approx(0)
    assert none["shd"] == np.count_nonzero(truth)
    assert none["score_excess"] > 0.1


def test_noise_levels_have_one_graph_and_one_noise_in_their_unit() -> None:
    trial = Trial(seed=3)
    low, truth = dag_recovery.equal.problem(trial)
    high, same = replace(dag_recovery.equal, level=4.0).problem(trial)
    np.testing.assert_array_equal(truth, same)
    np.testing.assert_allclose(high.X, 2 * low.X)


def test_order_of_variances_finds_a_chain_whose_variances_grow() -> None:
    z = np.random.default_rng(0).normal(size=(2000, 3))
    X = np.stack([z[:, 0], z[:, 1] + z[:, 0], z[:, 2] + z[:, 1] + z[:, 0]], axis=1)
    weights = by_variance(dag_recovery.Observations(X, 1, 1, 0))
    assert weights[0, 1] == pytest.approx(1.0, abs=0.1)
    assert not weights[np.tril_indices(3)].any()


def test_tries_are_scored_on_other_graphs_than_results() -> None:
    found = dag_recovery.equal.run(Trial(searching=True), GraphLearner(learn=by_variance))
    assert not found.metrics
    assert found.score is not None
    assert found.score <= 0
