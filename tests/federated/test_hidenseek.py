from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from trimtab.federated import (
    HideNseek,
    SignSupermask,
    keep_largest,
    pack_signs,
    prune_at_init,
    signed_weights,
    simulate,
    synflow_scores,
    unpack_signs,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def clients(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = [torch.randn(20, 4, generator=seeded(i)) for i in range(count)]
    return [(one, one[:, :3].argmax(1)) for one in x]


class TestScores:
    def test_by_hand(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
        model[1].weight.data = torch.tensor([[1.0, -1.0]])
        found = synflow_scores(model, (2,))
        assert found["0.weight"].tolist() == [[1, 2], [3, 4]]
        assert found["1.weight"].tolist() == [[3, 7]]

    def test_each_layer_of_a_chain_adds_up_to_the_same(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(48, 5)
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first, last = synflow_scores(model, (1, 6, 6)).values()
        torch.testing.assert_close(first.sum(), last.sum())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert isinstance(model[1], nn.BatchNorm2d)

    def test_frozen_weights_carry_but_have_no_score(self) -> None:
        model = network()
        whole = synflow_scores(model, (4,))
        model[2].weight.requires_grad_(False)
        some = synflow_scores(model, (4,))
        assert some.keys() == {"0.weight", "4.weight"}
        torch.testing.assert_close(some["4.weight"], whole["4.weight"])


class TestPruning:
    @pytest.mark.parametrize("density", [0.1, 0.33, 1.0])
    @pytest.mark.parametrize("iterations", [1, 5])
    def test_as_many_are_kept(self, density: float, iterations: int) -> None:
        masks = prune_at_init(network(), density, (4,), iterations)
        total = 64 + 128 + 24
        assert sum(int(mask.sum()) for mask in masks.values()) == round(density * total)

    def test_the_largest_over_all_layers(self) -> None:
        scores = {"a": torch.tensor([[5.0, 4.0], [1.0, 0.0]]), "b": torch.tensor([3.0, 0.5])}
        masks = keep_largest(scores, 0.5)
        assert masks["a"].tolist() == [[True, True], [False, False]]
        assert masks["b"].tolist() == [True, False]

    def test_no_layer_is_emptied(self) -> None:
        masks = keep_largest({"a": torch.arange(50.0) + 10, "b": torch.rand(3)}, 0.02)
        assert masks["a"].sum() == masks["b"].sum() == 1

    @pytest.mark.parametrize("density", [0.0, 1.1])
    def test_bad_densities_are_named(self, density: float) -> None:
        for call in (lambda: prune_at_init(network(), density, (4,)), lambda: HideNseek(1.0, (4,), density)):
            with pytest.raises(ValueError, match="density"):
                call()


class TestSupermask:
    theta = torch.tensor([[3.0, -5.0], [7.0, 2.0]])
    mask = torch.tensor([[True, True], [True, False]])

    def test_values_and_gradient(self) -> None:
        score = torch.tensor([[0.1, -0.2], [0.0, 9.0]], requires_grad=True)
        pull = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        for values, expected in (("sign", [[3, 5], [7, 0]]), ("binary", [[3, 0], [7, 0]])):
            weight = SignSupermask(self.theta, self.mask, values)(score)
            assert weight.tolist() == expected
            (gradient,) = torch.autograd.grad((weight * pull).sum(), score)
            assert torch.equal(gradient, self.mask * self.theta * pull)

    def test_on_a_layer(self) -> None:
        layer = nn.Linear(2, 2, bias=False)
        parametrize.register_parametrization(layer, "weight", SignSupermask(self.theta, self.mask), unsafe=True)
        assert [name for name, _ in layer.named_parameters()] == ["parametrizations.weight.original"]
        assert torch.equal(layer.weight.abs(), (self.mask * self.theta).abs())

    def test_wrong_shapes_are_named(self) -> None:
        with pytest.raises(ValueError, match="mask must be"):
            SignSupermask(self.theta, self.mask[:1])
        with pytest.raises(ValueError, match="values must be"):
            SignSupermask(self.theta, self.mask, "ternary")


class TestBits:
    @pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
    def test_round_trip(self, count: int) -> None:
        bits = torch.rand(count, generator=seeded()) < 0.4
        packed = pack_signs(bits)
        assert packed.dtype == torch.uint8
        assert len(packed) == -(-count // 8)
        assert torch.equal(unpack_signs(packed, count), bits)

    def test_wrong_input_is_named(self) -> None:
        with pytest.raises(TypeError, match="positive"):
            pack_signs(torch.ones(3))
        with pytest.raises(ValueError, match="packed must be"):
            unpack_signs(torch.zeros(1, dtype=torch.uint8), 9)


class TestAlgorithm:
    def run(self, rounds: int = 1, count: int = 3, model: nn.Module | None = None, **options):
        algorithm = HideNseek(30.0, (4,), **{"density": 0.5, **options})
        model = network() if model is None else model
        return algorithm, model, simulate(algorithm, model, clients(count), rounds=rounds, generator=seeded())

    def test_the_first_network_is_the_pruned_random_one(self) -> None:
        algorithm, model = HideNseek(1.0, (4,), density=0.25), network()
        server = algorithm.init_server(model, 3)
        for name, (theta, mask) in algorithm.ticket(model).items():
            assert torch.equal(server.params[name], theta * mask)
            size = (2 / theta.shape[1] / mask.float().mean()) ** 0.5
            torch.testing.assert_close(theta.abs(), torch.full_like(theta, size.item()))
        assert not server.params["0.bias"].any()

    def test_drawn_weights_are_pruned_by_their_size(self) -> None:
        constant, normal = (
            HideNseek(1.0, (4,), density=0.25, weights=kind).ticket(network())
            for kind in ("signed_constant", "kaiming_normal")
        )
        for name, (theta, mask) in normal.items():
            assert torch.equal(mask, constant[name][1])
            assert torch.equal(theta.sign(), constant[name][0].sign())
            assert theta[mask].abs().mean() > theta[~mask].abs().mean()
            assert theta.std() > 0.1

    def test_the_form_and_the_seed_make_the_ticket(self) -> None:
        algorithm, other = HideNseek(1.0, (4,)), nn.Sequential(*network())
        for p in other.parameters():
            nn.init.normal_(p)
        first, second = algorithm.ticket(network()), algorithm.ticket(other)
        assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
        reseeded = HideNseek(1.0, (4,), seed=1).ticket(other)
        assert not torch.equal(first["0.weight"][0], reseeded["0.weight"][0])

    def test_only_signs_change_and_only_of_kept_weights(self) -> None:
        for values in ("sign", "binary"):
            algorithm, model, history = self.run(2, values=values)
            params = history.state.server.params
            changed = 0
            for name, (theta, mask) in algorithm.ticket(model).items():
                w = params[name]
                factor = (w / theta)[mask].unique().tolist()
                assert set(factor) <= ({-1.0, 1.0} if values == "sign" else {0.0, 1.0})
                assert not w[~mask].any()
                changed += int((w != theta * mask).sum())
            assert changed
            assert not params["2.bias"].any()
            assert all(p.requires_grad for p in model.parameters())
            assert not any(parametrize.is_parametrized(module) for module in model.modules())

    def test_one_client_decides_alone(self) -> None:
        algorithm, model, history = self.run(count=1)
        mine = algorithm.personal(model, history.state.clients[0])
        for name, weight in mine.items():
            assert torch.equal(history.state.server.params[name], weight)
        assert set(history.state.server.memory["mean"].tolist()) == {-1.0, 1.0}

    def test_signs_are_averaged_by_samples(self) -> None:
        data = clients(2)
        data[1] = (data[1][0][:5], data[1][1][:5])
        algorithm, model = HideNseek(30.0, (4,), density=0.5), network()
        history = simulate(algorithm, model, data, rounds=1, generator=seeded())
        signs = [2.0 * unpack_signs(history.state.clients[i]["signs"], 108) - 1 for i in range(2)]
        torch.testing.assert_close(history.state.server.memory["mean"], (20 * signs[0] + 5 * signs[1]) / 25)
        assert not torch.equal(*signs)

    def test_the_starting_scores_are_the_means(self) -> None:
        algorithm, model = HideNseek(0.0, (4,), density=0.5), network()
        server = algorithm.init_server(model, 2)
        server.memory["mean"].copy_(torch.linspace(-1, 1, 108))
        update, _ = algorithm.client_update(model, algorithm.configure(server), {}, clients()[0], generator=seeded())
        assert torch.equal(unpack_signs(update.extras["signs"], 108), torch.linspace(-1, 1, 108) >= 0)

    def test_what_is_sent(self) -> None:
        for broadcast, down in (("mean", 4 * 108), ("sign", 14)):
            *_, history = self.run(broadcast=broadcast)
            assert history.rounds[0].bytes_up == 3 * 14  # 108 bits
            assert history.rounds[0].bytes_down == 3 * down

    def test_it_learns(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        x, y = (torch.cat(part) for part in zip(*clients(), strict=True))

        def right() -> float:
            return (model(x).argmax(1) == y).float().mean().item()

        model.load_state_dict(HideNseek(1.0, (4,), density=0.5).init_server(model, 3).params)
        before = right()
        self.run(15, model=model, local_epochs=3, batch_size=10)
        assert right() > max(before + 0.1, 0.6)

    def test_signed_weights_of_no_change(self) -> None:
        ticket = HideNseek(1.0, (4,)).ticket(network())
        count = sum(int(mask.sum()) for _, mask in ticket.values())
        for name, weight in signed_weights(ticket, torch.ones(count, dtype=torch.bool)).items():
            assert torch.equal(weight, ticket[name][0] * ticket[name][1])

    def test_tied_and_missing_weights_are_refused(self) -> None:
        tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        for model in (tied, nn.BatchNorm1d(4)):
            with pytest.raises(ValueError, match="model must have"):
                HideNseek(1.0, (4,)).ticket(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"in_shape": (0,)}, "in_shape"),
        ({"start": 0.0}, "start"),
        ({"broadcast": "scores"}, "broadcast"),
        ({"values": "ternary"}, "values"),
        ({"weights": "ones"}, "weights"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        HideNseek(**{"lr": 1.0, "in_shape": (4,), **options})


class TestScoresThatSaySomething:
    def test_a_norm_of_mean_squares_is_no_dead_end(self) -> None:
        first, last = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)
        scores = synflow_scores(nn.Sequential(first, nn.RMSNorm(6), last), (4,))
        plain = synflow_scores(nn.Sequential(first, last), (4,))
        torch.testing.assert_close(list(scores.values()), list(plain.values()))
        assert all(score.sum() > 0 for score in scores.values())

    @pytest.mark.parametrize("value", [0.0, 1e200])
    def test_a_network_that_passes_nothing_on_or_too_much_is_named(self, value: float) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
        for layer in model:
            nn.init.constant_(layer.weight, value)
        with pytest.raises(ValueError, match="model must pass on something finite"):
            synflow_scores(model, (2,))

    def test_a_network_without_weights_is_named(self) -> None:
        with pytest.raises(ValueError, match="model must have a weight"):
            synflow_scores(nn.ReLU(), (2,))

    @pytest.mark.parametrize("scores", [{}, {"a": torch.tensor([torch.nan, 1.0])}, {"a": torch.zeros(0)}])
    def test_scores_that_are_none_are_named(self, scores: dict[str, torch.Tensor]) -> None:
        with pytest.raises(ValueError, match="scores must be"):
            keep_largest(scores, 0.5)

    def test_complex_weights_have_no_sign(self) -> None:
        with pytest.raises(TypeError, match="model must have real weights"):
            HideNseek(1.0, (2,)).ticket(nn.Linear(2, 2, dtype=torch.cfloat))
