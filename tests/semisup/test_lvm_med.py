from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trimtab.semisup import (
    GraphMatchingLoss,
    black_box_matching,
    local_similarity,
    match_graphs,
    neighbour_edges,
)

DOUBLE = torch.float64
NONE = torch.zeros(1, 0, 2, dtype=torch.int64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def problem(n: int, groups: int = 3, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    edges_s, edges_t = (neighbour_edges(draws(groups, n, 3, seed=seed), k) for seed in (1, 2))
    return draws(groups, n, n, seed=3), 0.5 * draws(groups, n * k, n * k, seed=4), edges_s, edges_t


def cost(u: Tensor, q: Tensor, edges_s: Tensor, edges_t: Tensor, partner: list[int]) -> float:
    """Of a matching of one group, edge by edge."""
    total = sum(float(u[i, a]) for i, a in enumerate(partner))
    for e, (i, j) in enumerate(edges_s.tolist()):
        for f, (a, b) in enumerate(edges_t.tolist()):
            if partner[i] == a and partner[j] == b:
                total += float(q[e, f])
    return total


def test_edges_go_to_the_nearest() -> None:
    z = draws(4, 7, 3)
    edges = neighbour_edges(z, 3)
    assert edges.shape == (4, 21, 2)
    for points, pairs in zip(z, edges, strict=True):
        distance = torch.cdist(points, points).fill_diagonal_(math.inf)
        for i in range(7):
            assert set(pairs[pairs[:, 0] == i, 1].tolist()) == set(distance[i].argsort()[:3].tolist())
    torch.testing.assert_close(neighbour_edges(1e4 * z + 1e4, 3), edges)


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_exact_matching_is_the_best_of_all(method: str) -> None:
    parts = problem(4)
    found = match_graphs(*parts, method=method)  # type: ignore[arg-type]
    for g in range(3):
        group = [part[g] for part in parts]
        best = min(itertools.permutations(range(4)), key=lambda p, group=group: cost(*group, list(p)))
        assert found[g].tolist() == list(best)


def test_without_edges_it_is_an_assignment() -> None:
    for n, method in ((4, "exact"), (9, "exchange"), (9, "auto")):
        u, q, edges_s, edges_t = problem(n)
        found = match_graphs(u, 0 * q, edges_s, edges_t, method=method)  # type: ignore[arg-type]
        assert found.tolist() == [linear_sum_assignment(cost)[1].tolist() for cost in u.numpy()]


def test_exchanges_never_lose_and_end_where_none_pays() -> None:
    parts = problem(8, k=3)
    found = match_graphs(*parts, method="exchange")
    for g in range(3):
        group = [part[g] for part in parts]
        mine = found[g].tolist()
        assert sorted(mine) == list(range(8))
        start = linear_sum_assignment(group[0].numpy())[1].tolist()
        assert cost(*group, mine) <= cost(*group, start) + 1e-9
        for i, j in itertools.combinations(range(8), 2):
            other = list(mine)
            other[i], other[j] = other[j], other[i]
            assert cost(*group, mine) <= cost(*group, other) + 1e-9


def test_shuffling_the_second_graph_shuffles_the_matching() -> None:
    u, q, edges_s, edges_t = problem(5)
    order = torch.tensor([3, 0, 4, 1, 2])  # row a of the shuffled graph is row order[a] of the other
    place = order.argsort()
    found = match_graphs(u, q, edges_s, edges_t)
    shuffled = match_graphs(u[:, :, order], q, edges_s, place[edges_t])
    assert torch.equal(order[shuffled], found)


def test_the_gradient_is_that_of_the_interpolation() -> None:
    u, q, edges_s, edges_t = problem(4)
    u.requires_grad_()
    q.requires_grad_()
    weight, lam = draws(3, 4, 4, seed=9), 0.7
    v = black_box_matching(u, q, edges_s, edges_t, lam_grad=lam)
    (v * weight).sum().backward()
    with torch.no_grad():
        partners = [match_graphs(x, q, edges_s, edges_t) for x in (u, u + lam * weight)]
        one, other = (F.one_hot(partner, 4).double() for partner in partners)
    torch.testing.assert_close(v.detach(), one)
    torch.testing.assert_close(u.grad, (other - one) / lam)
    for g, e, f in itertools.product(range(3), range(8), range(8)):
        (i, j), (a, b) = edges_s[g, e].tolist(), edges_t[g, f].tolist()
        expected = (other[g, i, a] * other[g, j, b] - one[g, i, a] * one[g, j, b]) / lam
        assert q.grad is not None
        assert q.grad[g, e, f] == expected
    assert (one != other).any()


def test_no_gradient_where_the_matching_is_right() -> None:
    u = (-torch.eye(4, dtype=DOUBLE)[None]).requires_grad_()
    v = black_box_matching(u, torch.zeros(1, 0, 0, dtype=DOUBLE), NONE, NONE, lam_grad=80.0)
    true = torch.eye(4, dtype=DOUBLE)
    loss = (v * (1 - true) + (1 - v) * true).sum()
    loss.backward()
    assert loss.item() == 0
    assert u.grad is not None
    assert (u.grad == 0).all()


def plain(**options: object) -> GraphMatchingLoss:
    """With a graph network that hands on what it is given."""
    loss = GraphMatchingLoss(6, **{"k": 2, "group_size": 4, "dropout": 0.0, "affinity": "cosine", **options}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for own, others in zip(loss.own, loss.others, strict=True):
            own.weight.copy_(torch.eye(6))
            own.bias.zero_()
            others.weight.zero_()
    return loss


def test_equal_views_match_themselves() -> None:
    z = draws(11, 6).abs()
    assert plain(margin=0.0)(z, z).item() == 0
    assert plain(margin=0.0, edge_weight=0.0)(z, z).item() == 0


def test_the_true_pairs_must_win_by_the_margin() -> None:
    z = 2 * torch.eye(6, dtype=DOUBLE)[:4]  # cosines are 1 with themselves and 0 with others
    assert plain(edge_weight=0.0, margin=0.9)(z, z).item() == 0
    assert plain(edge_weight=0.0, margin=1.1)(z, z).item() == 8  # no partner is right: twice the size


def test_costs_are_what_they_should_be() -> None:
    z_s, z_t = draws(4, 6).abs(), draws(4, 6, seed=1).abs()
    u, q, edges_s, edges_t = plain(margin=0.3).costs(z_s, z_t)
    cosines = F.normalize(z_s, dim=1) @ F.normalize(z_t, dim=1).T
    torch.testing.assert_close(u[0], 0.3 * torch.eye(4, dtype=DOUBLE) - cosines)
    ends_s = z_s[edges_s[0, :, 0]] - z_s[edges_s[0, :, 1]]
    ends_t = z_t[edges_t[0, :, 0]] - z_t[edges_t[0, :, 1]]
    torch.testing.assert_close(q[0], -F.normalize(ends_s, dim=1) @ F.normalize(ends_t, dim=1).T / 2)
    soft = plain(affinity="softplus", margin=0.0, normalize=True).costs(z_s, z_t)[0][0]
    torch.testing.assert_close(soft, 0.5 - F.softplus(cosines))
    raw = plain(affinity="softplus", margin=0.0).costs(z_s, z_t)[0][0]
    torch.testing.assert_close(raw, 0.5 - F.softplus(z_s @ z_t.T))
    assert 0.5 - float(-F.softplus(torch.zeros(()))) - 1 == pytest.approx(math.log(2) - 0.5)


def test_true_pairs_can_win_by_the_margin_as_it_stands() -> None:
    corners = torch.eye(10, dtype=DOUBLE) - 0.1  # as far apart from each other as ten directions can be
    loss = GraphMatchingLoss(10).double().eval()
    loss._mixed = lambda z, edges, generator: z  # type: ignore[method-assign]
    for edge_weight in (0.0, 1.0):
        loss.edge_weight = edge_weight
        assert loss(corners, corners) == 0
    loss.affinity, loss.normalize, loss.edge_weight = "softplus", True, 0.0
    assert loss(corners, corners) == 20  # not so for what mixes the two programs
    loss.normalize = False
    assert loss(10 * corners, corners) == 0


def test_message_passing_adds_up_neighbours() -> None:
    loss = GraphMatchingLoss(6, k=2, group_size=4, width=3, dropout=0.5).double().eval()
    z = draws(4, 6)
    edges = neighbour_edges(z[None], 2)
    x = z
    for layer, (own, others) in enumerate(zip(loss.own, loss.others, strict=True)):
        x = F.relu(x) if layer else x
        total = torch.stack([x[edges[0, edges[0, :, 0] == i, 1]].sum(0) for i in range(4)])
        x = own(x) + others(total)
    torch.testing.assert_close(loss._mixed(z[None], edges, None)[0], x)


def test_descending_makes_true_pairs_alike() -> None:
    z_s, z_t = draws(8, 6, seed=5).requires_grad_(), draws(8, 6, seed=6)
    loss = plain(margin=0.5)
    before = F.cosine_similarity(z_s, z_t).mean().item()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss(z_s, z_t), z_s)
        z_s = (z_s - 20 * gradient).detach().requires_grad_()
    assert F.cosine_similarity(z_s, z_t).mean().item() > before + 0.1


def test_local_similarity_agrees_with_a_loop() -> None:
    a, b = draws(2, 3, 4, 5), draws(2, 3, 6, 5, seed=1)
    places = [torch.rand(2, 3, m, 2, generator=torch.Generator().manual_seed(m)).double() for m in (4, 6)]
    plain_, located = local_similarity(a, b, top=2), local_similarity(a, b, *places, top=2)
    for g, i, j in itertools.product(range(2), range(3), range(3)):
        cosines = F.normalize(a[g, i], dim=1) @ F.normalize(b[g, j], dim=1).T
        by_feature = cosines.amax(1).topk(2).values.mean()
        nearest = torch.cdist(places[0][g, i], places[1][g, j]).argmin(1)
        by_place = cosines[torch.arange(4), nearest].topk(2).values.mean()
        torch.testing.assert_close(plain_[g, i, j], by_feature, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(located[g, i, j], (by_feature + by_place) / 2, rtol=1e-6, atol=1e-6)


def test_maps_have_their_share() -> None:
    z_s, z_t, maps = draws(4, 6).abs(), draws(4, 6, seed=1).abs(), (draws(4, 5, 3), draws(4, 5, 3, seed=1))
    loss = plain(margin=0.0, lam_local=0.7)
    local = local_similarity(maps[0][None], maps[1][None])
    whole = loss.costs(z_s, z_t)[0]
    torch.testing.assert_close(loss.costs(z_s, z_t, local=maps)[0], 0.7 * whole - 0.3 * local)


@pytest.mark.parametrize("kind", ["gumbel", "gamma"])
def test_noise_is_drawn_by_the_generator(kind: str) -> None:
    z = draws(400, 6).abs()
    quiet, noisy = plain(margin=0.0), plain(margin=0.0, noise=kind, noise_scale=0.2)
    one, other = (noisy.costs(z, z, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    drawn = (quiet.costs(z, z)[0] - one[0]) / 0.2
    if kind == "gumbel":
        assert drawn.mean().item() == pytest.approx(0.5772, abs=0.1)
        assert drawn.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.1)
    else:  # a tenth of a Gumbel variable in the limit of ten of them added up: mean of about 0.06
        assert drawn.mean().item() == pytest.approx((sum(1 / i for i in range(1, 11)) - math.log(10)) / 10, abs=0.02)


def test_a_rest_is_left_out_and_dropout_is_reproducible() -> None:
    z_s, z_t = draws(11, 6), draws(11, 6, seed=1)
    loss = plain(margin=0.2)
    torch.testing.assert_close(loss(z_s, z_t), loss(z_s[:8], z_t[:8]))
    train = GraphMatchingLoss(6, k=2, group_size=4).double()
    one, other = (train.costs(z_s, z_t, generator=torch.Generator().manual_seed(0))[0] for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, train.eval().costs(z_s, z_t)[0])


def test_autocast_is_left_out() -> None:
    loss = GraphMatchingLoss(6, k=2, group_size=4).eval()
    z_s, z_t = draws(8, 6).bfloat16(), draws(8, 6, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = loss.costs(z_s, z_t)[0]
    assert u.dtype == torch.float32
    torch.testing.assert_close(u, loss.costs(z_s.float(), z_t.float())[0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda z: neighbour_edges(z, 2), "z"),
        (lambda z: neighbour_edges(z[None], 8), "k"),
        (lambda z: match_graphs(z[None], torch.zeros(1, 0, 0), NONE, NONE), "u"),
        (lambda z: match_graphs(z[None, :6], torch.zeros(1, 1, 0), NONE, NONE), "q"),
        (lambda z: match_graphs(z[None, :6], torch.zeros(1, 0, 0), NONE[0], NONE), "edges_s"),
        (lambda z: match_graphs(z[None, :6], torch.zeros(1, 0, 0), NONE, NONE, method="best"), "method"),
        (lambda z: black_box_matching(z[None, :6], torch.zeros(1, 0, 0), NONE, NONE, lam_grad=0.0), "lam_grad"),
        (lambda z: local_similarity(z[None, None], z[None, None], top=9), "top"),
        (lambda z: local_similarity(z[None, None], z[None], top=1), "local_s and local_t"),
        (lambda z: GraphMatchingLoss(6, group_size=1), "group_size"),
        (lambda z: GraphMatchingLoss(6, k=4, group_size=4), "k"),
        (lambda z: GraphMatchingLoss(6, dropout=1.0), "dropout"),
        (lambda z: GraphMatchingLoss(6, affinity="dot"), "affinity"),
        (lambda z: GraphMatchingLoss(6, noise="normal"), "noise"),
        (lambda z: GraphMatchingLoss(6)(z[:7], z[:7]), "z_s"),
        (lambda z: GraphMatchingLoss(6)(z, z[:7]), "z_t"),
        (lambda z: GraphMatchingLoss(5, k=2, group_size=4)(z, z), "z_s"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[Tensor], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        call(draws(8, 6))


@pytest.mark.parametrize("method", ["exact", "exchange"])
def test_costs_that_are_not_finite_match_nothing(method: str) -> None:
    u, q, edges_s, edges_t = problem(5)
    for name, parts in (("u", (u * math.nan, q)), ("q", (u, q * math.inf))):
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            match_graphs(*parts, edges_s, edges_t, method=method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^u must be finite"):  # which was a loss of zero
        GraphMatchingLoss(3, k=2, group_size=4)(draws(4, 3).float() * math.nan, draws(4, 3).float())


@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1e13])
def test_exchanges_know_no_units(scale: float) -> None:
    parts = problem(8)
    found = match_graphs(*parts, method="exchange")
    assert not torch.equal(found, match_graphs(parts[0], 0 * parts[1], *parts[2:], method="exchange"))
    scaled = match_graphs(scale * parts[0], scale * parts[1], *parts[2:], method="exchange")
    assert torch.equal(scaled, found)


@pytest.mark.parametrize("method", ["exact", "exchange"])
def test_no_groups_have_no_matching(method: str) -> None:
    parts = [part[:0] for part in problem(5)]
    assert match_graphs(*parts, method=method).shape == (0, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("local", "positions", "name"),
    [
        (None, 2 * (draws(8, 5, 2),), "positions"),
        (2 * (draws(4, 5, 3),), None, "local"),
        (2 * (draws(9, 5, 3),), None, "local"),
        ((draws(8, 5, 3),), None, "local"),
        (2 * (draws(8, 5, 3),), 2 * (draws(4, 5, 2),), "positions"),
    ],
)
def test_maps_of_other_samples_are_refused(local: object, positions: object, name: str) -> None:
    loss, z = GraphMatchingLoss(3, k=2, group_size=4).double(), draws(8, 3)
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        loss(z, z, local=local, positions=positions)
