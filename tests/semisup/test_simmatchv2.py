from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.semisup import DistributionAlignment, SimMatchV2, edge_edge_loss, graph_propagate, node_edge_loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def graph(nodes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return F.normalize(drawn(3, nodes, 4, seed=seed), dim=2), drawn(3, nodes, 5, seed=seed + 1).softmax(2)


def edges(features: torch.Tensor, temperature: float) -> torch.Tensor:
    unit = torch.eye(features.shape[1], dtype=torch.bool)
    return (features @ features.mT / temperature).masked_fill(unit, -torch.inf).softmax(2)


def test_without_neighbours_the_label_is_its_own() -> None:
    features, labels = graph()
    torch.testing.assert_close(graph_propagate(features, labels, alpha=0.0), labels[:, 0])


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_it_is_the_inverse_and_the_neumann_series(alpha: float) -> None:
    features, labels = graph()
    a = edges(features, 0.2)
    inverse = (1 - alpha) * torch.linalg.inv(torch.eye(6, dtype=torch.float64) - alpha * a)
    torch.testing.assert_close(inverse.sum(2), torch.ones(3, 6, dtype=torch.float64))
    found = graph_propagate(features, labels, alpha, 0.2)
    torch.testing.assert_close(found, (inverse @ labels)[:, 0])
    series, power = torch.zeros_like(labels), labels
    for _ in range(100):
        series, power = series + (1 - alpha) * power, alpha * a @ power
    torch.testing.assert_close(found, series[:, 0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))


def test_neighbours_of_one_class_pull_monotonically() -> None:
    features, labels = graph()
    labels[:, 1:] = F.one_hot(torch.tensor(2), 5).double()
    found = torch.stack([graph_propagate(features, labels, alpha)[:, 2] for alpha in (0.0, 0.1, 0.4, 0.9)])
    assert (found.diff(dim=0) > 0).all()


def test_the_nearest_neighbour_counts_most() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.19**0.5], [0.0, 1.0]]])
    labels = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    found = graph_propagate(features, labels)[0]
    assert found[2] > found[0] > found[1] > 0


def test_edges_agree_best_with_themselves() -> None:
    weak = drawn(4, 7).clamp(-1, 1)
    r = (weak / 0.1).softmax(1)
    torch.testing.assert_close(edge_edge_loss(weak, weak), -(r * r.log()).sum(1).mean())
    strong = drawn(4, 7, seed=1).clamp(-1, 1)
    assert edge_edge_loss(strong, weak) > edge_edge_loss(weak, weak)
    expected = -(r * (strong / 0.1).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(edge_edge_loss(strong, weak), expected)


def test_weak_views_and_the_memory_are_constants() -> None:
    strong, weak, p = drawn(4, 7).requires_grad_(), drawn(4, 7, seed=1).requires_grad_(), drawn(4, 3).requires_grad_()
    held = drawn(7, 3, seed=2).softmax(1).requires_grad_()
    (edge_edge_loss(strong, weak) + node_edge_loss(strong, held, p.softmax(1))).backward()
    assert weak.grad is None
    assert p.grad is None
    assert held.grad is None
    assert strong.grad is not None
    assert strong.grad.abs().sum() > 0


def test_the_classes_that_edges_lead_to() -> None:
    strong, held, p = drawn(4, 7), drawn(7, 3, seed=2).softmax(1), drawn(4, 3, seed=3).softmax(1)
    led_to = (strong / 0.5).softmax(1) @ held
    torch.testing.assert_close(node_edge_loss(strong, held, p, 0.5), -(p * led_to.log()).sum(1).mean())


def test_empty_nodes_take_no_part() -> None:
    strong, weak, p = drawn(4, 7), drawn(4, 7, seed=1), drawn(4, 3, seed=3).softmax(1)
    held = drawn(7, 3, seed=2).softmax(1)
    filled = torch.tensor([True] * 5 + [False] * 2)
    held[5:] = 0
    torch.testing.assert_close(edge_edge_loss(strong, weak, filled=filled), edge_edge_loss(strong[:, :5], weak[:, :5]))
    torch.testing.assert_close(
        node_edge_loss(strong, held, p, filled=filled), node_edge_loss(strong[:, :5], held[:5], p)
    )
    strong.requires_grad_()
    nothing = torch.zeros(7, dtype=torch.bool)
    total = edge_edge_loss(strong, weak, filled=nothing) + node_edge_loss(strong, 0 * held, p, filled=nothing)
    total.backward()
    assert total == 0
    assert strong.grad is not None
    assert strong.grad.isfinite().all()


def rule(**options: object) -> SimMatchV2:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        labels = torch.arange(12) % 3
        chosen = {"top_n": 4, "queue_size": 32, "dim": 8, "threshold": 0.35, **options}
        return SimMatchV2(nn.Flatten(), nn.Linear(6, 3), labels, **chosen).double()  # type: ignore[arg-type]


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    index = torch.randperm(12, generator=seeded(seed))[:4]
    return drawn(4, 2, 3, seed=seed), index % 3, index, drawn(9, 2, 3, seed=seed + 50), drawn(9, 2, 3, seed=seed + 90)


def test_the_total_by_hand_with_the_memories_of_the_batches_before() -> None:
    held = rule(align=nn.Identity())
    held.loss(*batch(1))
    held.update()
    rows, bank, classes = held.labelled.rows.clone(), held.queue.features[:9].clone(), held.queue.payload[:9].clone()
    x, targets, index, weak, strong = batch(2)
    found = held.loss(x, targets, index, weak, strong)
    scores, e = held.teacher(weak)
    p = scores.softmax(1)
    known = F.normalize(rows, dim=1)
    near = (e @ known.T).topk(4, dim=1).indices
    y = F.one_hot(torch.arange(12) % 3, 3).double()
    pseudo = graph_propagate(torch.cat([e[:, None], known[near]], 1), torch.cat([p[:, None], y[near]], 1))
    logits, z = held.net(strong)
    sure = (p.amax(1) >= 0.35).double()
    nn_loss = (sure * F.cross_entropy(logits, pseudo, reduction="none")).mean()
    ee_loss, ne_loss = edge_edge_loss(z @ bank.T, e @ bank.T), node_edge_loss(z @ bank.T, classes, p)
    expected = F.cross_entropy(held(x), targets) + 10 * nn_loss + 5 * ee_loss + 5 * ne_loss
    torch.testing.assert_close(found["total"], expected)
    torch.testing.assert_close(found["used"], sure.mean())
    # Then the batch enters.
    torch.testing.assert_close(held.queue.features[9:18], e)
    torch.testing.assert_close(held.queue.payload[9:18], p)
    torch.testing.assert_close(held.labelled.rows[index], held.teacher(x)[1])


def test_alignment_is_on_by_default_and_reads_the_mean_before() -> None:
    held, plain = rule(), rule(align=nn.Identity())
    assert isinstance(held.align, DistributionAlignment)
    for _ in range(3):
        held.loss(*batch(1))
    weak = batch(1)[3]
    p = plain.teacher(weak)[0].softmax(1)
    align = DistributionAlignment(3).double()
    for _ in range(3):
        aligned = align(p)
    torch.testing.assert_close(held.queue.payload[18:27], aligned)


def test_several_strong_views_are_averaged() -> None:
    held = rule()
    held.loss(*batch(1))
    held.eval()
    x, targets, index, weak, strong = batch(2)
    other = drawn(9, 2, 3, seed=7)
    one, two = (held.loss(x, targets, index, weak, view) for view in (strong, other))
    both = held.loss(x, targets, index, weak, [strong, other])
    for name in ("node_node", "edge_edge", "node_edge"):
        torch.testing.assert_close(both[name], (one[name] + two[name]) / 2)


def test_without_weights_it_is_cross_entropy() -> None:
    held = rule(weights=(0.0, 0.0, 0.0))
    for seed in range(2):
        x, targets, *rest = batch(seed)
        torch.testing.assert_close(held.loss(x, targets, *rest)["total"], F.cross_entropy(held(x), targets))


def test_normalised_features_do_not_depend_on_their_length() -> None:
    x = batch()[0]
    torch.testing.assert_close(rule()(x), rule()(100 * x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rule(normalize=False)(x), rule(normalize=False)(100 * x))


def test_the_average_moves_by_its_momentum_and_takes_no_gradient() -> None:
    held = rule(momentum=0.75)
    before = held.teacher.model.head.weight.clone()
    held.loss(*batch())["total"].backward()
    assert all(p.grad is None for p in held.teacher.parameters())
    with torch.no_grad():
        held.net.head.weight.add_(1.0)
    held.update()
    torch.testing.assert_close(held.teacher.model.head.weight, before + 0.25)


def test_eval_mode_changes_nothing() -> None:
    held = rule()
    held.loss(*batch(1))
    before = {name: value.clone() for name, value in held.state_dict().items() if isinstance(value, torch.Tensor)}
    held.eval().loss(*batch(2))
    assert all(torch.equal(value, held.state_dict()[name]) for name, value in before.items())


def test_a_batch_larger_than_the_memory_and_a_repeated_index() -> None:
    held = rule(queue_size=5)
    x, _, _, weak, strong = batch()
    index = torch.tensor([1, 1, 2, 3])
    for _ in range(2):
        assert held.loss(x, index % 3, index, weak, strong)["total"].isfinite()
    assert len(held.queue) == 5


def test_half_precision() -> None:
    held = rule().float()
    for seed in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = held.loss(*(part.float() if part.is_floating_point() else part for part in batch(seed)))
        assert found["total"].dtype == torch.float32
        assert found["total"].isfinite()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: rule(top_n=13), ValueError, "top_n"),
        (lambda: rule(alpha=1.0), ValueError, "alpha"),
        (lambda: rule(temperature=0.0), ValueError, "temperature"),
        (lambda: rule(threshold=1.5), ValueError, "threshold"),
        (lambda: rule(weights=(1.0, 2.0)), ValueError, "weights"),
        (lambda: rule(weights=(1.0, 2.0, -1.0)), ValueError, "weights"),
        (lambda: SimMatchV2(nn.Flatten(), nn.Identity(), torch.arange(3)), TypeError, "head"),  # type: ignore[arg-type]
        (lambda: SimMatchV2(nn.Flatten(), nn.Linear(2, 2), torch.arange(3)), ValueError, "labels"),
        (lambda: rule().loss(*batch()[:2], batch()[2] + 12, *batch()[3:]), ValueError, "index"),
        (lambda: rule().loss(*batch()[:2], batch()[2][1:], *batch()[3:]), ValueError, "index"),
        (lambda: rule().loss(*batch()[:2], batch()[2].double(), *batch()[3:]), TypeError, "index"),
        (lambda: rule().loss(*batch()[:4], []), ValueError, "x_strong"),
        (lambda: rule().loss(*batch()[:4], batch()[4][1:]), ValueError, "x_strong"),
        (lambda: graph_propagate(*graph(1)), ValueError, "features"),
        (lambda: graph_propagate(graph()[0], graph(5)[1]), ValueError, "labels"),
        (lambda: edge_edge_loss(drawn(2, 3), drawn(2, 4)), ValueError, "strong and weak"),
        (lambda: node_edge_loss(drawn(2, 3), drawn(4, 3), drawn(2, 3)), ValueError, "node_probs"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()
