"""What every rule that distils a diffusion model keeps to: its teacher, its generator, its state, and what it refuses.

A rule has a `student`, gives losses for a loop of the user's own, and may have an `update_target()`. A new one joins by
one line in MEMBERS.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    CTM,
    DCM,
    CTMPreconditioned,
    DualExpert,
    EDMPreconditioned,
    GuidedDistillation,
    ScaleConditioned,
    ScaleEmbedding,
    grids,
    shifted_levels,
)
from trimtab.nets import DenoisingMLP

COND = torch.arange(12) % 3


def network(**options: Any) -> DenoisingMLP:
    """Four numbers, three classes; awake, since a new network says zero."""
    net = DenoisingMLP(4, 3, hidden=16, blocks=2, **options)
    for layer in (net.outward, *(block.second for block in net.blocks)):
        nn.init.normal_(layer.weight, std=0.3)
    return net


def guided_distillation(generator: torch.Generator, halved: bool) -> GuidedDistillation:
    teacher = EDMPreconditioned(network())
    told = ScaleConditioned(copy.deepcopy(teacher.net), {"noise_level": ScaleEmbedding(16)})
    student = EDMPreconditioned(told)
    rule = GuidedDistillation(student, teacher, grids.karras(teacher.schedule, 4), generator=generator)
    if halved:
        rule.halve()
    return rule


def ctm(generator: torch.Generator, with_teacher: bool) -> CTM:
    student, teacher = CTMPreconditioned(network(conditions=1)), EDMPreconditioned(network())
    last = student.net.outward.weight
    return CTM(student, teacher if with_teacher else None, levels=6, last_layer=last, generator=generator)


def dcm(generator: torch.Generator, detail: bool) -> DCM:
    student, levels = network(), shifted_levels(8, shift=3.0)
    options: dict[str, Any] = {"levels": levels, "split": 5, "decay": 0.9, "temporal_weight": 0.0}
    both = DualExpert(student, float(levels[5]), ["blocks.*first"], ["outward"], rank=2) if detail else student
    return DCM(
        both, network().requires_grad_(False), "detail" if detail else "semantic", **options, generator=generator
    )


class Member(NamedTuple):
    build: Callable[..., Any]
    """Makes the rule from a generator, in one of two forms."""
    form: bool

    def losses(self, rule: Any, x0: Tensor) -> dict[str, Tensor]:
        """All losses of a batch, `total` among them."""
        return {"total": rule.loss(x0, COND)} if hasattr(rule, "loss") else rule.losses(x0, COND)


MEMBERS = {
    "guided distillation, stage one": Member(guided_distillation, False),
    "guided distillation, halved": Member(guided_distillation, True),
    "CTM": Member(ctm, True),
    "CTM without a teacher": Member(ctm, False),
    "DCM, semantic": Member(dcm, False),
    "DCM, detail": Member(dcm, True),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def built(member: Member, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return member.build(torch.Generator().manual_seed(seed), member.form)


def batch(step: int) -> Tensor:
    return 0.5 * torch.randn(12, 4, generator=torch.Generator().manual_seed(step))


def run(member: Member, rule: Any, steps: int, first: int = 0) -> list[float]:
    """Totals of so many steps."""
    optimizer = torch.optim.SGD([p for p in rule.student.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for step in range(first, first + steps):
        losses = member.losses(rule, batch(step))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        if hasattr(rule, "update_target"):
            rule.update_target()
        found.append(float(losses["total"].detach()))
    return found


def tensors(held: Any) -> list[Tensor]:
    """All tensors in a state, in order."""
    if isinstance(held, Tensor):
        return [held.clone()]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def test_resumes_bit_exactly(member: Member) -> None:
    rule = built(member)
    run(member, rule, 2)
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    again = built(member, seed=1)
    if rule.__dict__.get("teacher") is not None and not (member.build is guided_distillation and member.form):
        again.teacher.load_state_dict(rule.teacher.state_dict())  # it is the user's, and not in the state
    again.load_state_dict(torch.load(file, weights_only=True))
    assert run(member, again, 2, first=2) == run(member, rule, 2, first=2)


def test_the_generator_decides_all_that_is_drawn(member: Member) -> None:
    state = torch.random.get_rng_state()
    first, second, other = built(member), built(member), built(member)
    other.generator.manual_seed(5)
    assert run(member, first, 2) == run(member, second, 2) != run(member, other, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_teacher_stays_and_gets_no_gradients(member: Member) -> None:
    rule = built(member)
    if rule.teacher is None:
        assert all(not p.requires_grad for p in rule.target.parameters())
        return
    before = copy.deepcopy(rule.teacher.state_dict())
    run(member, rule, 2)
    assert all(torch.equal(value, before[name]) for name, value in rule.teacher.state_dict().items())
    assert all(p.grad is None for p in rule.teacher.parameters())


def test_everything_that_trains_gets_gradients(member: Member) -> None:
    rule = built(member)
    run(member, rule, 2)  # after a step, since adapters start with a factor of zero
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rule.student.parameters() if p.requires_grad)


def test_a_refused_batch_leaves_the_state_bit_equal(member: Member) -> None:
    rule = built(member)
    run(member, rule, 1)
    before = tensors(rule.state_dict())
    with pytest.raises(TypeError, match="x0 must be floating point"):
        member.losses(rule, batch(0).long())
    assert all(torch.equal(a, b) for a, b in zip(tensors(rule.state_dict()), before, strict=True))


def test_a_batch_of_one(member: Member) -> None:
    rule = built(member)
    x0 = batch(0)[:1]
    found = rule.loss(x0, COND[:1]) if hasattr(rule, "loss") else rule.losses(x0, COND[:1])["total"]
    assert found.isfinite()


def misfits(rule: Any) -> list[dict[str, Any]]:
    """States whose other parts have changed numbers, so that a part taken before the misfit would show."""

    def moved(held: Any) -> Any:
        if isinstance(held, dict):
            return {name: moved(part) for name, part in held.items()}
        return held + 1 if isinstance(held, Tensor) and held.is_floating_point() else copy.deepcopy(held)

    own = rule.state_dict()
    found: list[dict[str, Any]] = [{}, {name: moved(part) for name, part in own.items() if name != "generator"}]
    for name in ("student", "target", "teacher"):
        if isinstance(own.get(name), dict):
            last = list(own[name])[-1]
            found += [{**moved(own), name: {}}, {**moved(own), name: {**moved(own[name]), last: torch.zeros(99)}}]
    return found


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(member: Member) -> None:
    rule = built(member)
    run(member, rule, 1)
    before, teacher = tensors(rule.state_dict()), rule.teacher
    for state in misfits(rule):
        with pytest.raises(ValueError, match="state must"):
            rule.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(tensors(rule.state_dict()), before, strict=True))
        assert rule.teacher is teacher


def test_a_first_stage_does_not_come_back() -> None:
    """The teacher of stage one is the user's and not in the state; a rule past it has lost it."""
    first, later = (built(MEMBERS[f"guided distillation, {name}"]) for name in ("stage one", "halved"))
    with pytest.raises(ValueError, match="state must be of a later stage"):
        later.load_state_dict(first.state_dict())
    first.load_state_dict(later.state_dict())
    assert first.stage == 2
