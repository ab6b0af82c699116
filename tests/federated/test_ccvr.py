from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.federated import CCVR, ClassMoments, FedAvg, FedLoGe, finish, simulate
from trimtab.federated.protocol import stream


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, classes))


def clients(skewed: bool = True) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three clusters; each client has one of them."""
    draw, found = seeded(1), []
    for i in range(3):
        y = torch.full((40,), i) if skewed else torch.randint(3, (40,), generator=draw)
        found.append((2.5 * torch.eye(4)[y] + torch.randn(40, 4, generator=draw), y))
    return found


def trained(algorithm: CCVR, model: nn.Module, data=None, rounds: int = 3):
    data = clients() if data is None else data
    state = simulate(algorithm, model, data, rounds=rounds, fraction=0.4, generator=seeded(3)).state
    before = {name: value.clone() for name, value in state.server.params.items()}
    return state, finish(algorithm, model, data, state), before


def test_only_the_head_changes_and_training_is_the_bases() -> None:
    algorithm = CCVR(FedAvg(0.1, batch_size=10), per_class=100, lr=0.1, head="2")
    state, finished, before = trained(algorithm, model := network())
    base = simulate(FedAvg(0.1, batch_size=10), network(), clients(), rounds=3, fraction=0.4, generator=seeded(3)).state
    for name, value in finished.server.params.items():
        assert torch.equal(before[name], base.server.params[name])
        assert torch.equal(state.server.params[name], before[name]), "the state before must be left alone"
        assert torch.equal(value, before[name]) == name.startswith("0")
        assert torch.equal(model.state_dict()[name], value)


def test_a_skewed_federation_is_repaired() -> None:
    x, y = (torch.cat(parts) for parts in zip(*clients(False), strict=True))
    algorithm = CCVR(FedAvg(0.3, 3, batch_size=10), per_class=200, lr=0.1, head="2")
    _, finished, before = trained(algorithm, model := network())

    def accuracy(params) -> float:
        model.load_state_dict(params)
        return (model(x).argmax(1) == y).float().mean().item()

    assert accuracy(finished.server.params) > accuracy(before) + 0.1


def test_reports_hold_the_moments_of_the_features() -> None:
    algorithm, model = CCVR(FedAvg(0.1), head="2"), network()
    x, y = clients()[1]
    sent = algorithm.configure(algorithm.init_server(model, 3))
    report = algorithm.client_report(network(), sent, {}, (x, y), generator=seeded())
    assert report.params == {}
    moments, features = ClassMoments.from_tensors(report.extras), model[:2](x).detach()
    assert moments.counts.tolist() == [0, 40, 0]
    torch.testing.assert_close(moments.covariances()[1], torch.cov(features.T))


def test_the_logits_fit_virtual_features_by_cross_entropy() -> None:
    """With two point masses and a step over all of them, the update is softmax regression's, by hand."""
    algorithm = CCVR(FedAvg(0.1), per_class=4, epochs=1, lr=0.5, batch_size=8, momentum=0.0)
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    features = torch.eye(2).repeat_interleave(4, 0)
    labels = torch.arange(2).repeat_interleave(4)
    found = algorithm.calibrate(head, features, labels, present=torch.tensor([True, True]), generator=seeded())
    # The gradient of the mean is (p - onehot) x, halved for two classes: +-1/4 at zero logits.
    torch.testing.assert_close(found["weight"], 0.5 * torch.tensor([[0.25, -0.25], [-0.25, 0.25]]))
    torch.testing.assert_close(found["bias"], torch.zeros(2))


def test_rows_of_classes_that_nobody_has_stay() -> None:
    model = network(classes=5)
    algorithm = CCVR(FedAvg(0.1), per_class=50, weight_decay=0.1, head="2")
    _, finished, before = trained(algorithm, model)
    changed = (finished.server.params["2.weight"] != before["2.weight"]).any(1)
    assert changed.tolist() == [True, True, True, False, False]
    assert ((finished.server.params["2.bias"] != before["2.bias"]) == changed).all()


def test_rows_that_stay_do_not_move_while_the_others_are_fitted() -> None:
    """Otherwise what is fitted would be fitted against logits that nobody will see."""
    algorithm = CCVR(FedAvg(0.1), per_class=4, epochs=6, lr=0.5, batch_size=8, momentum=0.0, weight_decay=0.0)
    head = nn.Linear(2, 3)
    features, labels = torch.eye(2).repeat_interleave(4, 0), torch.arange(2).repeat_interleave(4)
    present = torch.tensor([True, True, False])
    found = algorithm.calibrate(head, features, labels, present=present, generator=seeded())
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    for _ in range(6):  # softmax regression with the third row fixed
        slope = ((features @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels, 3)) / 8
        weight[:2] -= 0.5 * (slope.T @ features)[:2]
        bias[:2] -= 0.5 * slope.sum(0)[:2]
    torch.testing.assert_close(found["weight"], weight)
    torch.testing.assert_close(found["bias"], bias)


def test_without_epochs_nothing_changes() -> None:
    _, finished, before = trained(CCVR(FedAvg(0.1), epochs=0, head="2"), network())
    assert all(torch.equal(value, before[name]) for name, value in finished.server.params.items())


def test_clamped_draws_are_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = []
    original = CCVR.calibrate

    def spy(self, head, features, *rest, **options):
        lowest.append(features.min().item())
        return original(self, head, features, *rest, **options)

    monkeypatch.setattr(CCVR, "calibrate", spy)
    for clamp in (False, True):
        trained(CCVR(FedAvg(0.1), clamp=clamp, head="2"), network(), rounds=1)
    assert lowest[0] < 0
    assert lowest[1] == 0


def test_the_order_of_reports_does_not_matter_much_and_the_generator_decides() -> None:
    algorithm, model = CCVR(FedAvg(0.1), head="2"), network()
    server = algorithm.init_server(model, 3)
    sent = algorithm.configure(server)
    reports = [algorithm.client_report(model, sent, {}, data, generator=seeded()) for data in clients()]
    before = torch.get_rng_state()
    one, two = (algorithm.finalize(model, server, r, generator=stream(0, 1)) for r in (reports, reports[::-1]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(one.params["2.weight"], two.params["2.weight"], rtol=1e-3, atol=1e-4)
    other = algorithm.finalize(model, server, reports, generator=stream(0, 2))
    assert not torch.equal(one.params["2.weight"], other.params["2.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_class": 0}, "per_class"),
        ({"epochs": -1}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_bad_arguments(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CCVR(FedAvg(0.1), **settings)


def test_bad_bases_and_heads() -> None:
    with pytest.raises(ValueError, match="base must have no final exchange"):
        CCVR(FedLoGe(etf_steps=0))
    with pytest.raises(ValueError, match="head must be the name"):
        CCVR(FedAvg(0.1)).init_server(network(), 3)
    with pytest.raises(ValueError, match="targets must be in"):
        trained(CCVR(FedAvg(0.1, loss=lambda z, y: z.sum()), head="2"), network(classes=2))
