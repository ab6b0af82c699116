"""The federated task: whose samples are whose, what is judged, and what the references reduce to."""

from __future__ import annotations

import pytest
import torch

from trimtab.federated import CCVR, FedAvg
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.federated_clients.domain_skew import LOOKS, domain_skew
from trimtab.studies.tasks.federated_clients.partly_labelled import PartlyLabelled, few_labels, labelled
from trimtab.studies.tasks.federated_images import (
    Federated,
    FederatedImages,
    FederatedPlan,
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


def test_clients_of_a_domain_skew_share_a_look_and_the_test_has_all() -> None:
    found, plain = domain_skew.federation(TRIAL), mild_skew.federation(TRIAL)
    for i, ((x, y), (x_plain, y_plain)) in enumerate(zip(found.clients, plain.clients, strict=True)):
        torch.testing.assert_close(x, LOOKS[i % len(LOOKS)](x_plain))
        assert torch.equal(y, y_plain)
    for (x, y), (x_plain, y_plain) in ((found.held, plain.held), (found.test, plain.test)):
        assert len(x) == len(y) == len(LOOKS) * len(x_plain)
        torch.testing.assert_close(x[: len(x_plain)], x_plain)
        assert torch.equal(y.view(len(LOOKS), -1), y_plain.expand(len(LOOKS), -1))
    looks = found.test[0].view(len(LOOKS), *plain.test[0].shape)
    assert all((looks[i] - looks[j]).abs().mean() > 0.01 for i in range(4) for j in range(i))


def test_a_domain_skew_tells_the_hardest_look_and_not_the_clients() -> None:
    found = domain_skew.run(TRIAL, Federated(algorithm=fedavg)).metrics
    assert found.keys() == domain_skew.metrics.keys()
    assert found["worst_domain_accuracy"] <= found["accuracy"] + 0.2


def test_few_labels_are_the_same_for_all_and_one_of_each_class_stays() -> None:
    found = few_labels.federation(TRIAL)
    whole = FederatedImages(alpha=few_labels.alpha).federation(TRIAL)
    for (x, y), (x_whole, y_whole) in zip(found.clients, whole.clients, strict=True):
        assert torch.equal(x, x_whole)
        known = y >= 0
        assert torch.equal(y[known], y_whole[known])
        assert torch.equal(y[known].unique(), y_whole.unique())
        assert int(known.sum()) == max(round(few_labels.share * len(y)), len(y_whole.unique()))
    assert torch.equal(found.held[1], whole.held[1])


def test_who_knows_nothing_of_missing_labels_takes_as_many_steps_and_never_sees_one() -> None:
    seen = []

    class Watching(FedAvg):
        def client_update(self, model, broadcast, client, data, *, generator):  # type: ignore[no-untyped-def]
            seen.append(data)
            return super().client_update(model, broadcast, client, data, generator=generator)

    def watching(plan: FederatedPlan) -> FedAvg:
        return Watching(0.1, 2, 50, max_norm=10.0)

    found = few_labels.run(TRIAL, Federated(algorithm=watching)).metrics
    assert found["gradients"] == strong_skew.run(TRIAL, Federated(algorithm=fedavg)).metrics["gradients"]
    assert all((y >= 0).all() for _, y in seen)
    seen.clear()
    few_labels.run(TRIAL, PartlyLabelled(algorithm=lambda plan: Watching(0.1, loss=lambda z, y: z.sum() * 0)))
    assert all((y < 0).any() for _, y in seen)


def test_labelled_samples_are_repeated_evenly() -> None:
    x, y = labelled(torch.arange(7.0), torch.tensor([-1, 0, -1, 1, -1, 2, -1]))
    assert x.tolist() == [1, 3, 5, 1, 3, 5, 1]
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0]
