"""The tasks of minimisers and optimizers: what they count, when they are solved, and who solves them."""

import math

import pytest
import torch

from trimtab.optim import LogisticObjective
from trimtab.studies.engine.library import field_of
from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.optim.optimistic_mirror_descent.learners import CurvedOptimisticFTRL
from trimtab.studies.optim.optimistic_mirror_descent.streams import Knowledge, Quadratics
from trimtab.studies.tasks.logistic_regression import (
    LogisticRegression,
    _minimizer,
    breast_cancer,
    digits,
    few_threes,
    outvoted,
    threes_eights,
)
from trimtab.studies.tasks.small_language_model import python_text
from trimtab.studies.tasks.test_functions import (
    AnnealedLangevin,
    FinishedError,
    Problem,
    TestFunctions,
    plane,
    space,
    valley,
)
from trimtab.studies.tools import full_batch
from trimtab.studies.tools.full_batch import Oracle


@pytest.fixture
def oracle():
    return Oracle(
        breast_cancer.objective(breast_cancer.split(Trial())),
        torch.randn(31, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        budget=50.0,
        solved=lambda x, value: value < 0.1,
        generator=torch.Generator().manual_seed(0),
    )


def test_a_gradient_is_a_pass_and_a_value_half_of_it(oracle):
    x = oracle.start
    oracle(x)
    assert oracle.passes == 0.5
    oracle.gradient(x)
    assert oracle.passes == 1.0, "the way forward is shared"
    oracle.gradient(x + 1)
    assert oracle.passes == 2.0


def test_a_hessian_is_half_a_pass_a_row_and_a_product_with_it_one(oracle):
    x, v = oracle.start, torch.ones(31, dtype=torch.float64)
    product = oracle.hessian_vector(x, v)
    assert oracle.passes == 1.5
    hessian = oracle.hessian(x)
    assert oracle.passes == 1.5 + 31 / 2
    torch.testing.assert_close(product, hessian @ v)


def test_the_bound_of_the_hessian_is_made_once(oracle):
    x = oracle.start
    bound = oracle.gauss_newton(x)
    assert oracle.passes == 31 / 2
    assert oracle.gauss_newton(x + 1) is bound
    assert oracle.passes == 31 / 2
    assert torch.linalg.eigvalsh(bound - oracle.hessian(x)).min() > -1e-12


def test_who_has_spent_all_passes_is_ended_and_charged_nothing_more(oracle):
    oracle.spend(49.5)
    with pytest.raises(full_batch.FinishedError):
        oracle.gradient(oracle.start)
    assert oracle.passes == 50.0  # the way forward was paid for


def test_a_point_that_is_good_enough_ends_it(oracle):
    oracle.record(oracle.start)
    assert oracle.iterations == 0
    assert not oracle.reached
    low = oracle.start.clone()
    for _ in range(400):
        low = low - 0.3 * oracle.objective.gradient(low)
    with pytest.raises(full_batch.FinishedError):
        oracle.record(low)
    assert oracle.reached
    assert oracle.iterations == 1
    assert oracle.best == float(oracle.objective(low)) < 0.1


def test_a_value_that_is_not_finite_ends_it_unsolved(oracle):
    with pytest.raises(full_batch.FinishedError):
        oracle.record(oracle.start * math.nan)
    assert not oracle.reached


@pytest.mark.parametrize("name", list(LogisticRegression.references()))
def test_references_solve_two_classes(name):
    entrant = LogisticRegression.references()[name]
    rate = {"lr": {"gradient descent": 10.0, "Nesterov": 1.0, "Adam": 1.0}.get(name)}
    found = breast_cancer.run(Trial(setting=rate), entrant)
    assert found.metrics["passes"] < 400
    assert 0 <= found.metrics["gap"] < 1e-6
    assert found.metrics["test_accuracy"] > 0.9


@pytest.mark.parametrize("name", ["L-BFGS", "damped Newton", "super-universal Newton", "cubic Newton", "trust-ncg"])
@pytest.mark.parametrize("task", [few_threes, threes_eights, outvoted], ids=lambda task: task.problem)
def test_references_separate_classes_without_a_penalty(name, task):
    found = task.run(Trial(), LogisticRegression.references()[name])
    assert found.metrics["passes"] < 400


@pytest.mark.parametrize("task", [breast_cancer, digits], ids=lambda task: task.problem)
def test_the_minimum_is_where_the_gradient_vanishes(task):
    trial = Trial(seed=3)
    data = task.split(trial)
    objective = task.objective(data)
    assert objective.gradient(_minimizer(objective, task.start(data, trial))).norm() < 1e-12


def test_threes_are_few_and_every_other_is_tested():
    data = few_threes.split(Trial())
    assert int((data.y_train == 0).sum()) == 5
    assert int((data.y_test == 0).sum()) > 100
    everyone = torch.cat([data.x_train, data.x_test])
    assert len(everyone.unique(dim=0)) == len(threes_eights.split(Trial()).x_train) + len(
        threes_eights.split(Trial()).x_test
    )


def test_outvoted_samples_are_on_the_wrong_side_after_one_step():
    data = outvoted.split(Trial())
    objective = outvoted.objective(data)
    assert isinstance(objective, LogisticObjective)
    margins = objective.labels * (objective.features @ -objective.gradient(torch.zeros(5, dtype=torch.float64)))
    assert (margins[:2] < 0).all()
    assert (margins[2:] > 0).all()


def problem(function="rastrigin", dim=3, budget=1000):
    minimizer = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)[:dim]
    return Problem(function, minimizer, minimizer + 4, budget, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", ["rastrigin", "ackley", "rosenbrock"])
def test_functions_have_their_minimum_of_zero_where_they_say(function):
    p = problem(function)
    assert float(p.value(p.minimizer)) == pytest.approx(0, abs=1e-12)
    around = p.minimizer + torch.randn(500, 3, generator=p.generator, dtype=torch.float64)
    assert (p.value(around) > 0).all()
    torch.testing.assert_close(p.gradient(p.minimizer), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert p.numpy(around.numpy()) == pytest.approx(p.value(around).numpy())


def test_evaluations_are_counted_and_end():
    p = problem(budget=20)
    x = p.cloud(4)
    p(x)
    p.gradient(x)
    assert p.evaluations == 8
    v = torch.ones(3, dtype=torch.float64)
    product = p.hessian_vector(x[0], v)
    torch.testing.assert_close(product, p.hessian(x[0]) @ v)
    assert p.evaluations == 12
    with pytest.raises(FinishedError):
        p(p.cloud(9))
    assert p.left == 8


def test_the_best_point_is_remembered_and_the_minimum_ends_it():
    p = problem()
    points = p.cloud(10)
    values = p(points)
    assert p.best[1] == values.min()
    torch.testing.assert_close(p.best[0], points[values.argmin()])
    with pytest.raises(FinishedError):
        p(p.minimizer)
    assert p.best[1] == 0


@pytest.mark.parametrize("task", [plane, space, valley], ids=lambda task: task.label)
def test_nobody_has_more_evaluations_than_another(task):
    for name, entrant in TestFunctions.references().items():
        setting = {key: values[1] for key, values in (entrant.search or {}).items()}
        found = task.run(Trial(setting=setting), entrant)
        assert found.metrics["evaluations"] <= 1_000 * task.dim, name
        assert found.metrics["gap"] < float("inf"), name


def test_langevins_noise_falls_like_the_logarithm():
    point = torch.nn.Parameter(torch.zeros(200_000, dtype=torch.float64))
    optimizer = AnnealedLangevin([point], lr=0.04, sigma=3.0, generator=torch.Generator().manual_seed(0))
    for k in (1, 2):
        before, point.grad = point.detach().clone(), torch.ones_like(point)
        optimizer.step()
        move = point.detach() - before
        assert float(move.mean()) == pytest.approx(-0.04, abs=0.02)
        assert float(move.std()) == pytest.approx(3.0 / math.log(k + 1) * 0.2, rel=0.01)


def test_a_language_model_learns_and_chooses_on_held_out_text():
    found = python_text.run(Trial(setting={"lr": 3e-3}), python_text.references()["AdamW"])
    assert found.metrics["test_loss"] < math.log(96)
    assert found.metrics["optimizer_state_bytes"] > 8 * 100_000
    tried = python_text.run(Trial(setting={"lr": 3e-3}, searching=True), python_text.references()["AdamW"])
    assert tried.score is not None
    assert not tried.metrics


def test_strongly_convex_ftrl_has_the_regret_of_a_logarithm():
    stream = Quadratics.draw("iid", 2000, 4, torch.Generator().manual_seed(0))
    known = Knowledge(
        start=torch.zeros(4, 20, dtype=torch.float64),
        domain=stream.domain,
        diameter=2 * stream.domain.radius,
        horizon=2000,
        **stream.known,
    )
    learner, total, at = CurvedOptimisticFTRL(known), torch.zeros(4, dtype=torch.float64), {}
    for t in range(2000):
        loss, gradient = stream.loss_and_gradient(t, learner.predict())
        total = total + loss
        learner.update(gradient)
        if t + 1 in (200, 2000):
            at[t + 1] = float((total - stream.best_losses([t + 1], 0)[0]).mean())
    assert 0 < at[200] < at[2000] < at[200] + 3 * math.log(10)


@pytest.mark.parametrize("function", ["rastrigin", "rosenbrock"])
def test_gauss_newton_is_that_of_a_sum_of_squares(function):
    """At the minimum, where the residuals vanish, it is the Hessian; the residuals' squares are the function."""
    p = problem(function)
    torch.testing.assert_close(p.gauss_newton(p.minimizer), p.hessian(p.minimizer))
    assert torch.linalg.eigvalsh(p.gauss_newton(p.cloud(1)[0])).min() > 0


def test_ackleys_function_is_no_sum_of_squares():
    with pytest.raises(ValueError, match="function must be one of rastrigin, rosenbrock, got 'ackley'"):
        problem("ackley").gauss_newton(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("task", [digits, few_threes], ids=lambda task: task.problem)
def test_every_paper_on_the_task_can_stand_on_every_problem(task):
    for contestant in field_of(task, "smoke").contestants:
        settings = settings_of(task.grid(contestant.body))
        found = task.run(Trial(setting=settings[-1]), contestant.body)
        assert 0 < found.metrics["passes"] <= 400, contestant.name
