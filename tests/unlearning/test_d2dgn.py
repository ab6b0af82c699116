from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from trimtab.unlearning import D2DGN, bernoulli_kl, sample_non_edges, untrained_copy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def layers(self, x: Tensor, edge_index: Tensor) -> list[Tensor]:
        def sent(h: Tensor) -> Tensor:
            return h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])

        hidden = self.first(sent(x)).tanh()
        return [hidden, self.second(sent(hidden))]

    def decode(self, h: Tensor, pairs: Tensor) -> Tensor:
        return (h[pairs[0]] * h[pairs[1]]).sum(1)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


X = drawn(6, 4)
ONCE = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 5]])
EDGES = torch.cat([ONCE, ONCE.flip(0)], 1)
GONE = ONCE[:, 1:2]
NONE = torch.tensor([[0, 1], [3, 4]])


def made(student: nn.Module | None = None, destroyer: nn.Module | None = None, **options: Any) -> D2DGN:
    student = net(2) if student is None else student
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return D2DGN(net(0), net(1) if destroyer is None else destroyer, student, optimizer, **options)


def test_the_divergence_is_pytorchs() -> None:
    p, q = drawn(3, 4), drawn(3, 4, seed=1)
    torch.testing.assert_close(bernoulli_kl(p, q), kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)))
    assert bernoulli_kl(p, p).abs().max() < 1e-7
    assert (bernoulli_kl(p, q) > 0).all()
    assert bernoulli_kl(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])).isfinite().all()


def test_non_edges_are_none_of_the_edges() -> None:
    found = sample_non_edges(6, EDGES, 500, generator=seeded())
    taken = {(int(u), int(v)) for u, v in EDGES.T}
    assert found.shape == (2, 500)
    assert all(u != v and (u, v) not in taken for u, v in found.T.tolist())
    assert len({(min(u, v), max(u, v)) for u, v in found.T.tolist()}) == 15 - 6
    assert sample_non_edges(6, EDGES, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="edge_index"):
        sample_non_edges(2, torch.tensor([[0], [1]]), 1)


def test_an_untrained_copy_is_the_generators() -> None:
    state = torch.get_rng_state()
    one, again = (untrained_copy(net(), generator=seeded(3)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.first.weight, again.first.weight)
    assert not torch.equal(one.first.weight, net().first.weight)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match="reset_parameters"):
        untrained_copy(Own())


@pytest.mark.parametrize("knowledge", ["response", "feature"])
def test_the_loss_of_edges_by_hand(knowledge: str) -> None:
    rule = made(knowledge=knowledge, alpha=0.3)
    request = rule.delete_edges(X, EDGES, GONE, negatives=NONE)
    found = rule.loss(request)
    kept = torch.cat([ONCE[:, [0, 2, 3, 4, 5]], NONE], 1)
    gone = torch.cat([GONE, NONE], 1)
    messages = EDGES[:, [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]]
    student = rule.student.layers(X, messages)
    expected = []
    for teacher, pairs in ((net(0), kept), (net(1), gone)):
        told = teacher.layers(X, EDGES)
        scores = [
            (teacher.decode(h, pairs), rule.student.decode(own, pairs)) for h, own in zip(told, student, strict=True)
        ]
        if knowledge == "response":
            wanted, own = scores[-1]
            expected.append(kl_divergence(Bernoulli(logits=wanted), Bernoulli(logits=own)).mean())
        else:
            expected.append(sum((wanted - own).square().mean() for wanted, own in scores))
    torch.testing.assert_close(found["retained"], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["deleted"], expected[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["total"], 0.3 * found["retained"] + 0.7 * found["deleted"])
    found["total"].backward()
    assert all(p.grad is None for part in (rule.preserver, rule.destroyer) for p in part.parameters())
    assert all(p.grad is not None for p in rule.student.parameters())


@pytest.mark.parametrize("knowledge", ["response", "feature"])
def test_the_loss_of_nodes_by_hand(knowledge: str) -> None:
    rule = made(knowledge=knowledge)
    deleted, retained = torch.tensor([2]), torch.tensor([0, 1, 3, 4, 5])
    found = rule.loss(rule.delete_nodes(X, EDGES, deleted))
    student = rule.student.layers(X, EDGES[:, (EDGES != 2).all(0)])
    for name, teacher, nodes in (("retained", net(0), retained), ("deleted", net(1), deleted)):
        told = teacher.layers(X, EDGES)
        if knowledge == "response":
            wanted = kl_divergence(Categorical(logits=told[-1][nodes]), Categorical(logits=student[-1][nodes])).mean()
        else:
            wanted = sum((a[nodes] - b[nodes]).square().mean() for a, b in zip(told, student, strict=True))
        torch.testing.assert_close(found[name], wanted)


def test_a_student_that_is_the_preserver_and_nothing_to_delete() -> None:
    rule = made(student=net(0))
    found = rule.step(rule.delete_edges(X, EDGES, EDGES[:, :0], generator=seeded()))
    assert all(value.abs() < 1e-6 for value in found.values())
    same = made(student=net(0), destroyer=net(0), message_graph="original", knowledge="feature")
    before = copy.deepcopy(same.student.state_dict())
    assert same.step(same.delete_edges(X, EDGES, GONE, negatives=NONE))["total"] == 0
    assert all(torch.equal(part, before[name]) for name, part in same.student.state_dict().items())


@pytest.mark.parametrize(("alpha", "silent"), [(1.0, "destroyer"), (0.0, "preserver")])
def test_a_teacher_of_weight_nought_is_not_heard(alpha: float, silent: str) -> None:
    students = []
    for seed in (5, 6):
        rule = made(alpha=alpha)
        setattr(rule, silent, net(seed))
        rule.step(rule.delete_edges(X, EDGES, GONE, negatives=NONE))
        students.append(rule.student)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


def test_names_of_nodes_are_nothing() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # the new name of each node
    moved = torch.empty_like(X)
    moved[order] = X
    rule = made()
    one = rule.loss(rule.delete_edges(X, EDGES, GONE, negatives=NONE))["total"]
    other = rule.loss(rule.delete_edges(moved, order[EDGES], order[GONE], negatives=order[NONE]))["total"]
    torch.testing.assert_close(one, other)


def test_deleted_edges_carry_no_messages_in_either_direction() -> None:
    request = made().delete_edges(X, EDGES, GONE.flip(0), negatives=NONE)
    assert request.messages.shape[1] == 10
    assert not ((request.messages[0] == 1) & (request.messages[1] == 2)).any()
    assert request.retained.shape[1] == 5 + 2
    whole = made(message_graph="original").delete_edges(X, EDGES, GONE, negatives=NONE)
    assert torch.equal(whole.messages, EDGES)
    one_way = made().delete_edges(X, ONCE.flip(0), GONE, negatives=NONE)
    assert one_way.retained.shape[1] == 5 + 2


def test_what_is_retained_is_every_edge_once_and_loops_among_them() -> None:
    loop, backward = torch.tensor([[3], [3]]), torch.tensor([[5], [2]])  # the last only in one direction
    request = made().delete_edges(X, torch.cat([EDGES, loop, backward], 1), GONE, negatives=NONE)
    pairs = request.retained[:, : -NONE.shape[1]].T.tolist()
    assert sorted(map(tuple, pairs)) == [(0, 1), (0, 5), (2, 3), (3, 3), (3, 4), (4, 5), (5, 2)]


def test_it_learns_of_both() -> None:
    rule = made(alpha=0.5)
    rule.optimizer = torch.optim.Adam(rule.student.parameters(), lr=0.02)
    request = rule.delete_edges(X, EDGES, GONE, negatives=NONE[:, :0])
    found = [rule.step(request) for _ in range(150)]
    assert found[-1]["retained"] < 0.3 * found[0]["retained"]
    assert found[-1]["total"] < 0.3 * found[0]["total"]


def test_it_resumes() -> None:
    rule, again = made(), made(destroyer=net(7))
    request = rule.delete_edges(X, EDGES, GONE, negatives=NONE)
    rule.step(request)
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    other = again.delete_edges(X, EDGES, GONE, negatives=NONE)
    assert torch.equal(rule.step(request)["total"], again.step(other)["total"])


def test_bad_input_is_named() -> None:
    rule = made()
    with pytest.raises(ValueError, match="retained"):
        rule.delete_edges(X, EDGES, GONE, retained=ONCE[:, :2].flip(0))
    with pytest.raises(ValueError, match="deleted"):
        rule.delete_edges(X, EDGES, GONE[0])
    with pytest.raises(ValueError, match="edge_index"):
        rule.delete_edges(X, EDGES + 3, GONE)
    with pytest.raises(ValueError, match="negatives"):
        rule.delete_edges(X, EDGES, GONE, negatives=NONE.float())
    with pytest.raises(ValueError, match="retained"):
        rule.delete_nodes(X, EDGES, torch.tensor([2]), retained=torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="deleted"):
        rule.delete_nodes(X, EDGES, torch.tensor([9]), retained=torch.tensor([1]))
    with pytest.raises(ValueError, match="logit_q"):
        bernoulli_kl(torch.zeros(2), torch.zeros(3))
    for options in ({"alpha": 1.1}, {"knowledge": "all"}, {"message_graph": "none"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            made(**options)


def test_an_edge_that_there_is_not_cannot_be_forgotten() -> None:
    with pytest.raises(ValueError, match="deleted must be edges of edge_index"):
        made().delete_edges(X, EDGES, NONE[:, :1])
    assert made().delete_edges(X, ONCE, GONE.flip(0)).messages.shape == (2, 5)  # the other way round it is one
