"""The federated task: whose samples are whose, what is judged, and what the references reduce to."""

from __future__ import annotations

import pytest
import torch

from trimtab.federated import CCVR, FedAvg
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.federated_images import (
    Federated,
    FederatedImages,
    class_accuracies,
    embedded_skew,
    fedavg,
    fedprox,
    long_tail,
    mild_skew,
    principal_axes,
    strong_skew,
)

TRIAL = Trial(setting={"lr": 0.1, "prox": 0.0})


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x.flatten(1)}


@pytest.mark.parametrize("task", [strong_skew, mild_skew, long_tail, embedded_skew])
def test_no_sample_is_in_two_parts(task: FederatedImages) -> None:
    found = task.federation(TRIAL)
    parts = [x for x, _ in found.clients] + [found.held[0], found.test[0]]
    # Digits hold no image twice.
    assert len(set().union(*map(rows, parts))) == sum(map(len, parts))
    sizes = [len(y) for _, y in found.clients]
    assert max(sizes) - min(sizes) <= 1
    torch.testing.assert_close(found.shares.sum(1), torch.ones(len(sizes)))


def test_clients_differ_more_under_a_small_alpha() -> None:
    strong, mild = (task.federation(TRIAL).shares.amax(1).mean() for task in (strong_skew, mild_skew))
    assert strong > mild + 0.1


def test_the_long_tail_follows_the_order_of_the_seed_and_the_test_does_not() -> None:
    found = long_tail.federation(TRIAL)
    counts = torch.bincount(torch.cat([y for _, y in found.clients]), minlength=10)[found.order]
    assert (counts.diff() <= 0).all()
    assert counts[-1] <= 0.05 * counts[0]
    assert torch.bincount(found.test[1]).min() > 10
    other = long_tail.federation(Trial(seed=1))
    assert not torch.equal(found.order, other.order)


def test_embeddings_do_not_know_the_test_and_have_a_variance_of_one() -> None:
    found = embedded_skew.federation(TRIAL)
    assert found.held[0].shape[1] == 32
    torch.testing.assert_close(found.held[0].mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    assert found.held[0].var(0).mean().item() == pytest.approx(1.0, abs=1e-4)


def test_principal_axes_reconstruct_a_plane() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 6) + 1
    mean, axes = principal_axes(x, 2)
    seen = (x - mean) @ axes
    basis = torch.linalg.pinv(axes)
    torch.testing.assert_close(seen @ basis + mean, x, rtol=0, atol=1e-4)


def test_prox_of_zero_is_fedavg_and_an_exchange_that_changes_nothing_only_costs() -> None:
    plain = strong_skew.run(TRIAL, Federated(algorithm=fedavg)).metrics
    assert strong_skew.run(TRIAL, Federated(algorithm=fedprox)).metrics == plain
    idle = Federated(algorithm=lambda plan: CCVR(fedavg(plan), epochs=0))
    found = strong_skew.run(TRIAL, idle).metrics
    assert found["accuracy"] == plain["accuracy"]
    # One exchange: the model to each of 6 clients; 10 counts of 8 bytes, 10 means and scatters of 64 floats from each.
    model = 4 * (64 * 64 + 64 + 64 * 10 + 10)
    report = 80 + 4 * (10 * 64 + 10 * 64 * 64)
    assert 1e6 * (found["megabytes"] - plain["megabytes"]) == pytest.approx(6 * (model + report))
    assert plain["megabytes"] == pytest.approx(4 * 3 * 2 * model / 1e6)
    assert plain["gradients"] == 4 * 3 * 2 * 2


def test_while_settings_are_tried_the_test_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(setting={"lr": 0.1}, searching=True)
    whole = strong_skew.federation(trial)
    spoilt = (torch.full_like(whole.test[0], torch.nan), whole.test[1])
    monkeypatch.setattr(
        FederatedImages, "federation", lambda self, trial: type(whole)(**{**vars(whole), "test": spoilt})
    )
    result = strong_skew.run(trial, Federated(algorithm=fedavg))
    assert result.score is not None
    assert 0.1 < result.score <= 1
    assert not result.metrics


def test_class_accuracies() -> None:
    right, y = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2])
    assert class_accuracies(right, y, 4).tolist() == [0.5, 0.0, 1.0, 0.0]


def test_the_model_is_judged_after_the_final_exchange() -> None:
    class Ruined(FedAvg):
        has_final_exchange = True

        def client_report(self, model, broadcast, client, data, *, generator):
            from trimtab.federated import Update

            return Update({}, len(data[0]))

        def finalize(self, model, server, reports, *, generator):
            from dataclasses import replace

            params = dict(server.params)
            params["head.bias"] = torch.tensor([1e6] + [0.0] * 9)
            return replace(server, params=params)

    found = strong_skew.run(TRIAL, Federated(algorithm=lambda plan: Ruined(0.1))).metrics
    share_of_zeros = (strong_skew.federation(TRIAL).test[1] == 0).float().mean().item()
    assert found["accuracy"] == pytest.approx(share_of_zeros)
