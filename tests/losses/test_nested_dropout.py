from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from trimtab.losses import (
    CoTeaching,
    NestedCoTeaching,
    NestedDropout,
    select_truncation,
    small_loss_indices,
    truncated_accuracy,
    truncation_distribution,
)


def test_distribution_is_the_papers() -> None:
    found = truncation_distribution(3, sigma=2.0, mu=1.5)
    weights = torch.tensor([math.exp(-0.0625), math.exp(-0.0625), math.exp(-0.5625)], dtype=torch.float64)
    torch.testing.assert_close(found, weights / weights.sum())


def test_limits_of_the_distribution() -> None:
    torch.testing.assert_close(truncation_distribution(8, math.inf), torch.full((8,), 1 / 8, dtype=torch.float64))
    assert truncation_distribution(8, 1e-3)[0] == 1
    assert truncation_distribution(8, 1e-3, mu=5)[4] == 1


def test_drawn_lengths_follow_the_distribution() -> None:
    layer = NestedDropout(12, sigma=5.0, generator=torch.Generator().manual_seed(0))
    seen = Counter(int(layer.draw()) for _ in range(4000))
    assert set(seen) <= set(range(1, 13))
    expected = (4000 * truncation_distribution(12, 5.0)).tolist()
    # A chi-square test wants five expected in every cell, so the rare lengths share one.
    observed = [seen[k] for k in range(1, 10)] + [seen[10] + seen[11] + seen[12]]
    assert stats.chisquare(observed, [*expected[:9], sum(expected[9:])]).pvalue > 1e-3


def test_one_length_for_the_whole_batch_and_no_rescaling() -> None:
    layer = NestedDropout(20, sigma=math.inf, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 3, 20)
    lengths = set()
    for _ in range(20):
        kept = layer(x)
        k = int((kept != 0).sum(-1).unique())  # one value, or this fails
        assert torch.equal(kept[..., :k], x[..., :k])
        lengths.add(k)
    assert len(lengths) > 5


def test_dropped_features_get_no_gradient() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    NestedDropout(6)(x, k=2).square().sum().backward()
    torch.testing.assert_close(x.grad[:, :2], 2 * x.detach()[:, :2])
    assert torch.equal(x.grad[:, 2:], torch.zeros(4, 4))


def test_a_dropped_infinity_leaves_no_trace() -> None:
    x = torch.tensor([[1.0, math.inf]])
    assert torch.equal(NestedDropout(2)(x, k=1), torch.tensor([[1.0, 0.0]]))


def test_eval_mode_keeps_the_chosen_length_and_state_dict_carries_it() -> None:
    layer, x = NestedDropout(6).eval(), torch.randn(3, 6)
    assert torch.equal(layer(x), x)
    layer.set_truncation(4)
    assert torch.equal(layer(x), torch.cat([x[:, :4], torch.zeros(3, 2)], 1))
    other = NestedDropout(6).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_same_generator_same_lengths_and_half_precision_keeps_the_distribution() -> None:
    layers = [NestedDropout(600, sigma=300.0, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    layers[1].half()
    assert [int(layers[0].draw()) for _ in range(50)] == [int(layers[1].draw()) for _ in range(50)]


def test_compiles_without_graph_breaks() -> None:
    layer, x = NestedDropout(6), torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert int((compiled(x) != 0).sum(-1).unique()) in range(1, 7)
    layer.eval().set_truncation(2)
    assert torch.equal(compiled(x), layer(x))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(2, 5), st.booleans(), st.integers(1, 2))
def test_prefix_sums_equal_brute_force(seed: int, width: int, classes: int, bias: bool, networks: int) -> None:
    torch.manual_seed(seed)
    heads = [nn.Linear(width, classes, bias=bias).double() for _ in range(networks)]
    features = [torch.randn(30, width, dtype=torch.float64) for _ in range(networks)]
    targets = torch.randint(classes, (30,))
    layer = NestedDropout(width)
    expected = []
    for k in range(1, width + 1):
        votes = torch.stack([head(layer(part, k=k)) for head, part in zip(heads, features, strict=True)]).mean(0)
        expected.append((votes.argmax(1) == targets).double().mean().item())
    assert truncated_accuracy(features, heads, targets).tolist() == pytest.approx(expected)
    if networks == 1:
        assert truncated_accuracy(features[0], heads[0], targets).tolist() == pytest.approx(expected)


def test_blocks_of_samples_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    features, head, targets = torch.randn(17, 5), nn.Linear(5, 3), torch.randint(3, (17,))
    whole = truncated_accuracy(features, head, targets)
    monkeypatch.setattr("trimtab.losses.nested_dropout._BLOCK", 4 * 15)
    assert torch.equal(truncated_accuracy(features, head, targets), whole)


def test_ties_go_to_the_shortest_and_length_has_its_price() -> None:
    assert select_truncation(torch.tensor([0.2, 0.9, 0.9, 0.9])) == 2
    accuracy = torch.zeros(100)
    accuracy[0], accuracy[99] = 0.9, 0.9005
    assert select_truncation(accuracy) == 1  # 99 features cost 0.00099
    assert select_truncation(accuracy, penalty=0.0) == 100
    accuracy[99] = 0.902
    assert select_truncation(accuracy) == 100


def test_nested_dropout_orders_features() -> None:
    # A linear autoencoder finds a subspace in any basis; nested dropout makes its first code the first principal axis.
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 2.0, 1.0])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    x = (torch.randn(256, 3, generator=generator) * scales) @ turn.T
    layer = NestedDropout(3, sigma=math.inf, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        (decoder(layer(encoder(x))) - x).square().mean().backward()
        optimizer.step()
    first = F.normalize(decoder.weight.detach()[:, 0], dim=0)
    assert abs(float(first @ turn[:, 0])) > 0.98


# Co-teaching


class Scores(nn.Module):
    """A network whose logits on the eye are its rows; remembers what it was trained on."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())
        self.trained_on: list[list[int]] = []
        self.lengths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.trained_on.append(x.argmax(1).tolist())
        return x @ self.rows


def pair(rule: type[CoTeaching] = CoTeaching, **options: object) -> CoTeaching:
    # Of labels 0: the first network finds samples 0 and 1 easy, the second samples 2 and 3.
    margin = torch.tensor([2.0, 1.0, -1.0, -2.0])
    networks = [Scores(torch.stack([m, -m], 1)) for m in (margin, margin.flip(0))]
    return rule(networks, [torch.optim.SGD(network.parameters(), lr=1.0) for network in networks], **options)


def test_small_losses_in_order() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 0.0, 4.0])
    assert small_loss_indices(losses, 0.4).tolist() == [3, 1, 2]
    assert small_loss_indices(losses, 0.0).tolist() == [3, 1, 2, 0, 4]
    assert small_loss_indices(losses, 0.99).tolist() == [3]


@given(st.integers(1, 200), st.integers(0, 99))
def test_number_kept_is_the_floor_of_the_exact_share(batch: int, percent: int) -> None:
    assert len(small_loss_indices(torch.zeros(batch), percent / 100)) == max(1, (100 - percent) * batch // 100)


def test_each_network_learns_from_the_others_choice() -> None:
    rule = pair(forget_rate=0.5)
    before = [network.rows.detach().clone() for network in rule.networks]
    found = rule.step(torch.eye(4), torch.zeros(4, dtype=torch.int64))
    assert [sorted(network.trained_on[0]) for network in rule.networks] == [[2, 3], [0, 1]]
    for network, rows, kept, name in zip(rule.networks, before, ([2, 3], [0, 1]), ("loss_0", "loss_1"), strict=True):
        loss = F.cross_entropy(rows[kept], torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(found[name], loss)
        moved = (network.rows.detach() - rows).abs().sum(1) > 0
        assert moved.nonzero().flatten().tolist() == kept


def test_both_choose_before_either_moves() -> None:
    # Sharing all weights, the second network would choose differently once the first had stepped.
    rule = pair(forget_rate=0.5)
    rule.networks[1].rows = rule.networks[0].rows
    rule.optimizers = [torch.optim.SGD(rule.networks[0].parameters(), lr=100.0) for _ in range(2)]
    rule.step(torch.eye(4), torch.ones(4, dtype=torch.int64))
    assert [sorted(network.trained_on[0]) for network in rule.networks] == [[2, 3], [2, 3]]


def test_forget_rate_rises_over_the_first_epochs() -> None:
    rule = pair(forget_rate=0.5, rampup_epochs=2)
    x, targets = torch.eye(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="set_epoch"):
        rule.step(x, targets)
    for epoch, kept in ((0, 4), (1, 3), (2, 2), (5, 2)):
        rule.set_epoch(epoch)
        rule.step(x, targets)
        assert len(rule.networks[0].trained_on[-1]) == kept


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_normalisation_keeps_its_statistics(frozen: bool) -> None:
    networks = [nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)) for _ in range(2)]
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    rule = CoTeaching(networks, optimizers, freeze_batch_norm=frozen)
    weight = networks[0][0].weight.detach().clone()
    rule.step(5 + torch.randn(8, 3), torch.arange(8) % 2)
    assert bool((networks[0][0].running_mean == 0).all()) == frozen
    assert not torch.equal(networks[0][0].weight, weight)  # its scale is trained in both cases


class Watched(nn.Module):
    """A network that notes how many features its head was given, and in which mode."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.drop = NestedDropout(16, sigma=math.inf, generator=torch.Generator().manual_seed(seed))
        self.head = nn.Linear(16, 3)
        self.seen: list[tuple[bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        kept = self.drop(x)
        self.seen.append((self.training, int((kept != 0).sum(-1).unique())))
        return self.head(kept)


def watched_pair(**options: object) -> NestedCoTeaching:
    networks = [Watched(seed) for seed in range(2)]
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    return NestedCoTeaching(networks, optimizers, **options)


def test_both_train_at_one_random_length_and_choose_at_the_set_one() -> None:
    rule = watched_pair()
    rule.set_truncation(5)
    for _ in range(6):
        rule.step(torch.rand(8, 16) + 0.1, torch.arange(8) % 3)
    first, second = (network.seen for network in rule.networks)
    assert first == second
    assert {k for training, k in first if not training} == {5}
    assert len({k for training, k in first if training}) > 2
    rule.step(torch.rand(8, 16) + 0.1, torch.arange(8) % 3, k=torch.tensor(7))
    assert first[-1] == second[-1] == (True, 7)
    assert all(layer.held is None for layer in rule.layers)


def test_length_is_released_after_an_error() -> None:
    rule = watched_pair()
    with pytest.raises(TypeError, match="targets"):
        rule.step(torch.rand(8, 16), torch.zeros(8))
    assert all(layer.held is None for layer in rule.layers)


def test_predicts_the_mean_of_the_logits_at_the_set_length() -> None:
    rule = watched_pair()
    rule.set_truncation(3)
    x = torch.rand(4, 16)
    short = torch.where(torch.arange(16) < 3, x, 0)
    expected = (rule.networks[0].head(short) + rule.networks[1].head(short)) / 2
    torch.testing.assert_close(rule.predict(x), expected.detach())


def optimizers_of(networks: list[nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: NestedDropout(0), "num_features"),
        (lambda: NestedDropout(4, sigma=0.0), "sigma"),
        (lambda: NestedDropout(4, sigma=math.nan), "sigma"),
        (lambda: NestedDropout(4, mu=math.inf), "mu"),
        (lambda: NestedDropout(4).set_truncation(5), "k"),
        (lambda: NestedDropout(4)(torch.ones(2, 5)), "features"),
        (lambda: NestedDropout(4)(torch.ones(2, 4), k=0), "k"),
        (lambda: truncated_accuracy(torch.ones(2, 3), nn.Linear(4, 2), torch.zeros(2, dtype=torch.int64)), "features"),
        (lambda: truncated_accuracy([torch.ones(2, 3)], [], torch.zeros(2, dtype=torch.int64)), "head"),
        (lambda: truncated_accuracy(torch.ones(0, 3), nn.Linear(3, 2), torch.zeros(0, dtype=torch.int64)), "empty"),
        (
            lambda: truncated_accuracy(torch.full((1, 2), math.nan), nn.Linear(2, 2), torch.tensor([0])),
            "must be finite",
        ),
        (lambda: select_truncation(torch.zeros(0)), "accuracy"),
        (lambda: select_truncation(torch.tensor([math.nan])), "accuracy"),
        (lambda: select_truncation(torch.ones(3), penalty=-1.0), "penalty"),
        (lambda: small_loss_indices(torch.ones(0), 0.2), "losses"),
        (lambda: small_loss_indices(torch.ones(3), 1.0), "forget_rate"),
        (lambda: pair(forget_rate=-0.1), "forget_rate"),
        (lambda: pair(rampup_epochs=-1), "rampup_epochs"),
        (lambda: pair().set_epoch(-1), "epoch"),
        (lambda: CoTeaching([one := nn.Linear(2, 2), one], optimizers_of([one, nn.Linear(2, 2)])), "networks"),
        (lambda: CoTeaching([nn.Linear(2, 2), nn.Linear(2, 2)], []), "optimizers"),
        (lambda: pair(NestedCoTeaching), "NestedDropout"),
        (
            lambda: NestedCoTeaching(
                nets := [nn.Sequential(NestedDropout(d), nn.Linear(d, 2)) for d in (2, 3)], optimizers_of(nets)
            ),
            "of one width",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call: object, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()


def test_wrong_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="features"):
        NestedDropout(4)(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="targets"):
        truncated_accuracy(torch.ones(2, 3), nn.Linear(3, 2), torch.zeros(2))


@pytest.mark.parametrize("kind", [CoTeaching, NestedCoTeaching])
@pytest.mark.parametrize("targets", [torch.arange(6), torch.arange(5) % 3, torch.zeros(6)])
def test_a_refused_step_leaves_modes_and_the_global_generator(kind: type[CoTeaching], targets: Tensor) -> None:
    networks = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), NestedDropout(4), nn.Linear(4, 3)) for _ in range(2)]
    networks[0][1].eval()
    rule = kind(networks, [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks])
    modes = [[part.training for part in network.modules()] for network in networks]
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match="targets must be"):
        rule.step(torch.ones(6, 5), targets)
    assert [[part.training for part in network.modules()] for network in networks] == modes
    assert torch.equal(torch.get_rng_state(), before)
