"""The task of incomes over clients: who is where, what is judged, and that fairness can be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from trimtab.studies.engine.study import Trial
from trimtab.studies.federated.fairness_pid import FairFedAvg
from trimtab.studies.tasks.fair_federated import (
    FairFederated,
    Informed,
    People,
    at_random,
    by_sex,
    by_sex_and_income,
    judged,
    spread,
)
from trimtab.studies.tasks.federated_images import Federated, fedavg, fedprox

TRIAL = Trial(setting={"lr": 0.3, "prox": 0.0})


def told(people: People) -> nn.Module:
    """A model that says what the first feature says."""
    model = nn.Linear(people.x.shape[1], 2)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
        model.weight[1, 0] = 1.0
    return model


def test_nobody_is_in_two_parts_and_the_sex_is_no_feature() -> None:
    parts = by_sex.people(TRIAL)
    assert len({row.numpy().tobytes() for part in parts for row in part.x}) == sum(len(part.x) for part in parts)
    x, sex = parts[0].x, parts[0].sex
    assert not any(torch.equal(column.round().long(), sex) for column in x.T)


def test_kinds_of_people_are_at_the_clients_of_their_kind() -> None:
    draws = torch.Generator().manual_seed(0)
    income, sex = torch.randint(2, (2, 20_000), generator=draws)
    for split, kind in (("by sex", sex), ("by sex and income", sex ^ income)):
        client = spread(split, income, sex, 10, draws)
        assert (client % 2 == kind).float().mean().item() == pytest.approx(0.9, abs=0.01)
        assert torch.bincount(client, minlength=10).min() > 1800
    client = spread("at random", income, sex, 10, draws)
    assert (client % 2 == sex).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_what_is_judged_in_cases_where_it_is_known() -> None:
    sex = torch.tensor([0, 0, 1, 1]).repeat(10)
    income = torch.tensor([0, 1, 0, 1]).repeat(10)
    client = sex.clone()
    people = People(torch.stack([2.0 * sex - 1, torch.zeros(40)], 1), income, sex, client)
    found = judged(told(people), people, 2)  # the sex is told, and is that of the client
    assert found["accuracy"] == 0.5
    assert found["worst_group_accuracy"] == 0.0
    assert found["parity_gap"] == found["global_disparity"] == found["redundant"] == pytest.approx(1.0)
    assert found["unique"] == found["masked"] == found["local_disparity"] == pytest.approx(0.0, abs=1e-9)
    constant = People(torch.zeros(40, 2) - 1, income, sex, client)
    found = judged(told(constant), constant, 2)
    assert found["parity_gap"] == found["global_disparity"] == found["local_disparity"] == 0.0


def test_a_pull_of_zero_is_fedavg_and_so_is_fairness_of_no_weight() -> None:
    plain = by_sex.run(TRIAL, Federated(algorithm=fedavg)).metrics
    assert by_sex.run(TRIAL, Federated(algorithm=fedprox)).metrics == plain

    class Unfair(FairFedAvg):
        weight = 0.0

    def unfair(plan):
        made = fedavg(plan).local
        return Unfair(made.lr, made.epochs, made.batch_size, max_norm=made.max_norm)

    found = by_sex.run(TRIAL, Informed(algorithm=unfair)).metrics
    assert found == pytest.approx(plain)


def test_fairness_within_clients_lowers_what_is_told_within_them() -> None:
    def fair(plan):
        return FairFedAvg(plan.lr, 2, 50, max_norm=10.0)

    plain = by_sex_and_income.run(TRIAL, Federated(algorithm=fedavg)).metrics
    found = by_sex_and_income.run(TRIAL, Informed(algorithm=fair)).metrics
    assert found["local_disparity"] < 0.5 * plain["local_disparity"]


def test_while_settings_are_tried_the_test_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = replace(TRIAL, searching=True)
    train, held, test = at_random.people(trial)
    spoilt = replace(test, x=torch.full_like(test.x, torch.nan))
    monkeypatch.setattr(FairFederated, "people", lambda self, trial: (train, held, spoilt))
    result = at_random.run(trial, Federated(algorithm=fedavg))
    assert result.score is not None
    assert 0.5 < result.score <= 1
    assert not result.metrics


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        FairFederated("by age")  # type: ignore[arg-type]
