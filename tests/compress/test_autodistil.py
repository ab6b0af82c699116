from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.compress import (
    BANDS,
    ElasticTransformer,
    Subnet,
    SubspaceSpec,
    Transformer,
    attention_relation_loss,
    distil_subnets,
    parameter_count,
    partition_space,
    rank_students,
    relation_scores,
    sandwich,
    slice_parameters,
    soft_target_loss,
)

SPEC = SubspaceSpec((1, 2, 4), (4, 8), (1, 2), (1.0, 2.0))
TOKENS = torch.randint(10, (3, 6), generator=torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def elastic(causal: bool = False) -> ElasticTransformer:
    torch.manual_seed(0)
    return ElasticTransformer(SPEC, 10, 6, head_dim=4, causal=causal).double()


def size(subnet: Subnet) -> int:
    return parameter_count(subnet, 10, 6, head_dim=4)


def test_soft_targets_are_the_divergence_with_the_squared_temperature() -> None:
    own, other = drawn(2, 3, 5), drawn(2, 3, 5, seed=1)
    target = (other / 2).softmax(-1)
    expected = 4 * (target * (target.log() - (own / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(soft_target_loss(own, other, 2.0), expected)


def test_the_relation_loss_is_its_formula() -> None:
    own, other, heads = drawn(3, 2, 5, 6), drawn(3, 2, 5, 8, seed=1), 2
    expected = torch.zeros((), dtype=torch.float64)
    for which in range(3):
        for b in range(2):
            for a in range(heads):
                x, y = own[which, b, :, 3 * a : 3 * a + 3], other[which, b, :, 4 * a : 4 * a + 4]
                mine, theirs = (x @ x.T / 3**0.5).softmax(1), (y @ y.T / 2.0).softmax(1)
                expected += (theirs * (theirs / mine).log()).sum() / (heads * 5) / 2
    torch.testing.assert_close(attention_relation_loss(own, other, heads), expected)
    squares = relation_scores(own.flatten(0, 1), 2) - relation_scores(other.flatten(0, 1), 2)
    torch.testing.assert_close(attention_relation_loss(own, other, 2, kind="mse"), 3 * squares.square().mean())


def test_equal_projections_cost_nothing_and_rotated_heads_change_nothing() -> None:
    own, other = drawn(3, 2, 5, 8), drawn(3, 2, 5, 8, seed=1)
    assert attention_relation_loss(other, other, 2) == 0
    rotation = torch.linalg.qr(drawn(4, 4, seed=2))[0]
    turned = (own.unflatten(-1, (2, 4)) @ rotation).flatten(-2)
    torch.testing.assert_close(attention_relation_loss(turned, other, 2), attention_relation_loss(own, other, 2))


def test_gradients_go_to_the_student_alone_and_agree_with_differences() -> None:
    own, other = drawn(3, 1, 3, 4).requires_grad_(), drawn(3, 1, 3, 4, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    for kind in ("kl", "mse"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: attention_relation_loss(x, other, 2, mask, kind=kind), own)
    attention_relation_loss(own, other, 2).backward()
    assert other.grad is None


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_padding_counts_for_nothing(kind: str) -> None:
    own, other = drawn(3, 2, 5, 8), drawn(3, 2, 5, 8, seed=1)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    found = attention_relation_loss(own, other, 2, mask, kind=kind)  # type: ignore[arg-type]
    short = attention_relation_loss(own[:, :1, :3], other[:, :1, :3], 2, kind=kind)  # type: ignore[arg-type]
    whole = attention_relation_loss(own[:, 1:], other[:, 1:], 2, kind=kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found, (short + whole) / 2)
    changed = own.clone()
    changed[:, 0, 3:] = 1e3
    torch.testing.assert_close(attention_relation_loss(changed, other, 2, mask, kind=kind), found)  # type: ignore[arg-type]


def test_relations_are_taken_in_single_precision() -> None:
    own, other = drawn(3, 2, 5, 8).bfloat16(), drawn(3, 2, 5, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_relation_loss(own, other, 2)
    torch.testing.assert_close(found, attention_relation_loss(own.float(), other.float(), 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((drawn(3, 2, 5, 6), drawn(3, 2, 5, 8), 4), ValueError, "relation_heads must"),
        ((drawn(3, 2, 5, 8), drawn(3, 2, 4, 8), 2), ValueError, "teacher_projections must"),
        ((drawn(2, 2, 5, 8), drawn(2, 2, 5, 8), 2), ValueError, "projections must"),
        ((drawn(3, 0, 5, 8), drawn(3, 0, 5, 8), 2), ValueError, "at least one"),
        ((drawn(3, 2, 5, 8).long(), drawn(3, 2, 5, 8), 2), TypeError, "floating"),
        ((drawn(3, 2, 5, 8), drawn(3, 2, 5, 8), 2, torch.ones(2, 4, dtype=torch.bool)), ValueError, "mask must"),
        ((drawn(3, 2, 5, 8), drawn(3, 2, 5, 8), 2, torch.ones(2, 5)), TypeError, "mask must"),
    ],
)
def test_bad_projections_are_refused(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_relation_loss(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("subnet", [SPEC.largest, Subnet(2, 4, 1, 2.0), Subnet(3, 8, 2, 1.0)])
def test_a_student_is_the_same_inside_and_outside(subnet: Subnet) -> None:
    student = elastic(causal=True)
    student.set_subnet(subnet)
    plain = student.extract(subnet)
    for projections in (False, True):
        torch.testing.assert_close(student(TOKENS, projections), plain(TOKENS, projections), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in plain.parameters()) == size(subnet)
    with torch.no_grad():
        plain.head.bias.add_(1.0)
    assert not torch.equal(plain.head.bias, student.whole.head.bias)


def test_the_largest_student_is_the_whole_and_parts_share_its_storage() -> None:
    student = elastic()
    torch.testing.assert_close(student(TOKENS), student.whole(TOKENS))
    whole = {p.untyped_storage().data_ptr() for p in student.whole.parameters()}
    for value in student.shared(Subnet(2, 4, 1, 1.0)).values():
        assert value.untyped_storage().data_ptr() in whole
    names = student.shared(Subnet(2, 4, 1, 1.0))
    torch.testing.assert_close(
        names["layers.1.mlp.inner.0.weight"], student.whole.layers[2].mlp.inner[0].weight[:4, :4], rtol=0, atol=0
    )


def test_only_a_students_part_of_the_weights_gets_gradients() -> None:
    student = elastic()
    student.set_subnet(Subnet(2, 4, 1, 1.0))
    F.cross_entropy(student(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    gradient = student.whole.layers[2].attention.inner.query.weight.grad
    assert gradient[:4, :4].abs().sum() > 0
    assert gradient[4:].abs().sum() == gradient[:, 4:].abs().sum() == 0
    assert student.whole.layers[1].mlp.norm.weight.grad is None


def test_weights_come_from_a_teacher() -> None:
    torch.manual_seed(1)
    teacher = Transformer(10, 6, depth=8, hidden=12, heads=3, head_dim=4, mlp=20).double()
    student = elastic()
    student.inherit(teacher)
    wanted = slice_parameters(teacher, student.whole)
    torch.testing.assert_close(dict(student.whole.named_parameters()), wanted, rtol=0, atol=0)
    torch.testing.assert_close(
        student.whole.layers[3].mlp.inner[0].weight, teacher.layers[6].mlp.inner[0].weight[:16, :8], rtol=0, atol=0
    )
    for smaller in (Transformer(10, 6, 2, 8, 2, 4, 16), Transformer(10, 6, 4, 8, 1, 4, 16)):
        with pytest.raises(ValueError, match="target must"):
            student.inherit(smaller.double())


def test_too_large_students_are_refused_and_the_old_one_stays() -> None:
    student = elastic()
    student.set_subnet(Subnet(2, 4, 1, 1.0))
    for wrong in (Subnet(5, 4, 1, 1.0), Subnet(2, 9, 1, 1.0), Subnet(2, 4, 3, 1.0), Subnet(2, 8, 2, 2.5)):
        with pytest.raises(ValueError, match="must be at most"):
            student.set_subnet(wrong)
    assert student.subnet == Subnet(2, 4, 1, 1.0)


def test_gradients_of_a_step_are_the_sum_of_its_students() -> None:
    torch.manual_seed(1)
    teacher = Transformer(10, 6, 2, 8, 2, 4, 16, causal=False).double()
    student, subnets = elastic(), [SPEC.largest, Subnet(1, 4, 1, 1.0)]
    losses = distil_subnets(student, teacher, TOKENS, subnets, 2)
    found = student.whole.layers[3].attention.inner.key.weight.grad
    other = elastic()
    total = torch.zeros((), dtype=torch.float64)
    for subnet in subnets:
        other.set_subnet(subnet)
        total = total + attention_relation_loss(other(TOKENS, True), teacher(TOKENS, True), 2)
    total.backward()
    torch.testing.assert_close(found, other.whole.layers[3].attention.inner.key.weight.grad)
    torch.testing.assert_close(losses.sum(), total.detach())
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(ValueError, match="subnets must"):
        distil_subnets(student, teacher, TOKENS, [], 2)


def test_the_search_ranks_those_within_the_limit_and_changes_nothing() -> None:
    student = elastic()
    teacher = student.extract(Subnet(2, 8, 2, 2.0))
    before = copy.deepcopy(student.state_dict())
    limit = size(Subnet(2, 8, 2, 2.0))
    found = rank_students(student, teacher, TOKENS, SPEC.subnets(), 2, size=size, limit=limit)
    assert found[0].subnet.heads == 2
    assert found[0].loss == pytest.approx(0, abs=1e-12)  # depth 2, hidden 8, 2 heads: the teacher itself
    assert [r.loss for r in found] == sorted(r.loss for r in found)
    assert {r.subnet for r in found} == {s for s in SPEC.subnets() if size(s) <= limit}
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert student.subnet == SPEC.largest
    with pytest.raises(ValueError, match="limit must"):
        rank_students(student, teacher, TOKENS, SPEC.subnets(), 2, size=size, limit=10)


def test_bands_are_those_of_the_authors() -> None:
    for name, (low, high) in {"base": (39e6, 79e6), "small": (12e6, 28e6), "tiny": (4.4e6, 10.6e6)}.items():
        # Without the head. Theirs are somewhat smaller: they count projections as wide as the tokens.
        sizes = [parameter_count(s, 30522, 512) - 30523 * s.hidden for s in BANDS[name].subnets()]
        assert len(sizes) == 256
        assert low < min(sizes) < 1.3 * low
        assert high < max(sizes) < 1.3 * high


def test_sandwiches_hold_both_ends_and_others_at_random() -> None:
    subnets = SPEC.subnets()
    first = sandwich(subnets, size, generator=torch.Generator().manual_seed(3))
    assert first == sandwich(subnets, size, generator=torch.Generator().manual_seed(3))
    assert (first[0], size(first[1])) == (SPEC.largest, min(map(size, subnets)))
    assert len(set(first)) == 4
    generator = torch.Generator().manual_seed(0)
    seen = {s for _ in range(150) for s in sandwich(subnets, size, generator=generator)}
    assert seen == set(subnets)
    assert sandwich(subnets[:1], size) == subnets[:1]
    for wrong, n in (([], 4), (subnets, 1)):
        with pytest.raises(ValueError, match="must be"):
            sandwich(wrong, size, n)


def test_a_space_is_cut_by_size() -> None:
    bands = partition_space(SPEC.subnets(), 5, size)
    assert sorted(map(len, bands)) == [4, 5, 5, 5, 5]
    for band, following in itertools.pairwise(bands):
        assert max(map(size, band)) <= min(map(size, following))
    assert {s for band in bands for s in band} == set(SPEC.subnets())
    with pytest.raises(ValueError, match="bands must"):
        partition_space(SPEC.subnets(), 25, size)


def test_state_and_copies() -> None:
    student = elastic()
    student.set_subnet(Subnet(2, 4, 1, 1.0))
    student(TOKENS)
    other = copy.deepcopy(student)
    other.load_state_dict(student.state_dict())
    assert torch.equal(other(TOKENS), student(TOKENS))
    assert {name.split(".")[0] for name in student.state_dict()} == {"whole"}


@pytest.mark.parametrize("values", [(0, 4, 1, 1.0), (1, 4, 1, 0.0), (1, 2.5, 1, 1.0)])
def test_bad_students_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises((ValueError, TypeError), match="must be"):
        Subnet(*values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads must"):
        SubspaceSpec((1,), (4,), (), (1.0,))


def test_an_interrupted_ranking_leaves_the_student_as_it_was() -> None:
    student, teacher = elastic(), elastic()
    before = student.subnet
    others = [subnet for subnet in SPEC.subnets() if subnet != before]
    with pytest.raises(ValueError, match="relation_heads"):
        rank_students(student, teacher, TOKENS, others, 3, size=size, limit=1e9)
    assert student.subnet == before
