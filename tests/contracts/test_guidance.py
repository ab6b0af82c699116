"""What every guidance rule keeps: off is exactly the unguided model, and it goes into every sampler.

A new rule joins with one line in MEMBERS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    AnalyticGMM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CountNFE,
    Denoiser,
    DistilledGuidance,
    GradientFreeClassifierGuidance,
    LinearAG,
    OffTheShelfGuidance,
    PolicyGuidance,
    Split,
    VPLinear,
    degrade,
    deis,
    deis_rk,
    fit_linear_guidance,
    grids,
    ipndm,
    record_guidance,
)
from trimtab.diffusion.denoiser import reset
from trimtab.diffusion.prediction import PREDICTIONS
from trimtab.diffusion.schedules import per_sample


class Member(NamedTuple):
    """A rule `(denoiser, cond, uncond, **setting)`, a setting at work and the one that switches it off.

    Switched off it is the conditional model, or the unconditional one. A rule with a view of its own (a classifier's,
    or what a network has learned) changes what it is given even where the condition changes nothing. A recorded one is
    made for the sampler that it is run by, and takes it as `sampler`.
    """

    rule: Callable[..., Any]
    on: dict[str, Any]
    off: dict[str, Any]
    off_is_conditional: bool = True
    own_view: bool = False
    recorded: bool = False


def classify(x: Tensor, t: Tensor | None = None) -> Tensor:
    """Eight classes by the signs of coordinates, for samples of any shape."""
    return x.flatten(1)[:, :8] if x.shape[1:] != (16,) else 4 * (x @ CORNERS.double().T)


def policy(denoiser: Any, cond: Any, uncond: Any = None, *, scale: float) -> PolicyGuidance:
    """The scale in the first half of the evaluations that the longest run makes, none in the second."""
    return PolicyGuidance(denoiser, cond, uncond, scales=[scale] * 40 + [1.0] * 35)


def linear(
    denoiser: Any, cond: Any, uncond: Any = None, *, scale: float, sampler: Callable[..., Tensor] = deis
) -> LinearAG:
    return LinearAG(denoiser, cond, uncond, coefficients=coefficients(sampler), scale=scale)


@functools.cache
def coefficients(sampler: Callable[..., Tensor]) -> Tensor:
    recorded = record_guidance(model(), LABELS, lambda guided: sampler(guided, noise(), TIMES), scale=4.0)
    return fit_linear_guidance(*recorded)


class Student:
    """A denoiser told the scale, which knows by heart what guidance adds in 16 dimensions."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    schedule = property(lambda self: self.denoiser.schedule)
    prediction = property(lambda self: self.denoiser.prediction)

    def reset(self) -> None:
        reset(self.denoiser)

    def __call__(self, x: Tensor, t: Tensor, cond: Any, scale: Tensor) -> Tensor:
        value = self.denoiser(x, t, cond)
        if x.shape[1:] != (16,):
            return value
        teacher = model(self.prediction)
        return value + per_sample(scale - 1, x) * (teacher(x, t, cond) - teacher(x, t))


def distilled(denoiser: Any, cond: Any, uncond: Any = None, *, scale: float) -> DistilledGuidance:
    return DistilledGuidance(Student(denoiser), cond, scale)


# Eight classes at corners of a cube in 16 dimensions: far enough from two that lengths and spreads mean something.
CORNERS = torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
MEMBERS: dict[str, Member] = {
    "cfg": Member(ClassifierFreeGuidance, on={"scale": 4.0}, off={"scale": 1.0}),
    "cfg-rescale": Member(
        ClassifierFreeGuidance, on={"scale": 4.0, "rescale": 0.7}, off={"scale": 1.0, "rescale": 0.7}
    ),
    "apg": Member(AdaptiveProjectedGuidance, on={"scale": 4.0}, off={"scale": 1.0}),
    "apg-uncond": Member(
        AdaptiveProjectedGuidance,
        on={"scale": 4.0, "base": "uncond", "momentum": 0.0},
        off={"scale": 1.0, "base": "uncond"},
    ),
    "adaptive": Member(AdaptiveGuidance, on={"scale": 4.0}, off={"scale": 1.0}),
    "cfgpp": Member(CFGPlusPlus, on={"scale": 0.8}, off={"scale": 0.0}, off_is_conditional=False),
    "classifier": Member(
        ClassifierGuidance,
        on={"scale": 1.0, "classifier": classify},
        off={"scale": 0.0, "classifier": classify},
        own_view=True,
    ),
    "elucd": Member(
        OffTheShelfGuidance,
        on={"scale": 1.0, "classifier": classify},
        off={"scale": 0.0, "classifier": classify},
        own_view=True,
    ),
    "gfcg": Member(
        GradientFreeClassifierGuidance,
        on={"scale": 4.0, "classifier": classify},
        off={"scale": 0.0, "classifier": classify},
    ),
    "policy": Member(policy, on={"scale": 4.0}, off={"scale": 1.0}),
    "linear-ag": Member(linear, on={"scale": 4.0}, off={"scale": 1.0}, recorded=True),
    "distilled": Member(distilled, on={"scale": 4.0}, off={"scale": 1.0}, own_view=True),
}
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": functools.partial(deis, order=0),
    "deis-t3": deis,
    "deis-rho3": functools.partial(deis, variable="rho"),
    "deis-kutta3": deis_rk,
    "ipndm": ipndm,
}
every_rule = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)

SCHEDULE = VPLinear()
CLASSES = AnalyticGMM.isotropic(CORNERS.double(), std=0.3, labels=torch.arange(8))
LABELS = torch.arange(8).repeat(4)
STEPS = 25
TIMES = grids.power(SCHEDULE, STEPS)


def model(kind: Any = "eps") -> Any:
    return degrade(CLASSES.denoiser(SCHEDULE, kind), class_blur=0.4)


def noise(count: int = 32) -> Tensor:
    return SCHEDULE.prior(count, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conditional(kind: Any = "eps") -> Denoiser:
    inner = model(kind)
    return Denoiser(lambda x, t: inner(x, t, LABELS), SCHEDULE, kind)


def unguided(member: Member, kind: Any = "eps") -> Denoiser:
    """What the rule is when it is switched off."""
    inner = model(kind)
    return conditional(kind) if member.off_is_conditional else Denoiser(lambda x, t: inner(x, t), SCHEDULE, kind)


def parts(value: Tensor | Split) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, Split) else (value,)


@every_rule
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_off_is_exactly_the_unguided_model(member: Member, kind: Any) -> None:
    t = torch.full((32,), 0.4, dtype=torch.float64)
    off, plain = member.rule(model(kind), LABELS, **member.off), unguided(member, kind)
    assert torch.equal(off(noise(), t), plain(noise(), t))
    assert torch.equal(deis(off, noise(), TIMES), deis(plain, noise(), TIMES))


@every_rule
def test_off_costs_nothing(member: Member) -> None:
    counted = CountNFE(model())
    deis(member.rule(counted, LABELS, **member.off), noise(), TIMES)
    assert counted.count == STEPS
    deis(member.rule(counted, LABELS, **member.on), noise(), TIMES)
    assert counted.count <= 2 * STEPS


@every_rule
def test_equal_predictions_leave_nothing_to_do(member: Member) -> None:
    """Where the condition changes nothing, neither does guidance."""
    if member.own_view:
        pytest.skip("a classifier, or what a network has learned, has its own view")
    t = torch.full((32,), 0.4, dtype=torch.float64)
    plain = CLASSES.denoiser(SCHEDULE, "x0")
    guided = member.rule(Denoiser(lambda x, t, cond: plain(x, t), SCHEDULE, "x0"), LABELS, **member.on)
    torch.testing.assert_close(parts(guided(noise(), t))[0], plain(noise(), t))


@every_rule
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_composes_with_every_sampler(member: Member, sampler: Callable[..., Tensor]) -> None:
    setting = member.on | ({"sampler": sampler} if member.recorded else {})
    guided = member.rule(model(), LABELS, **setting)
    runs = [sampler(guided, noise(), TIMES) for _ in range(2)]
    assert torch.equal(*runs)
    assert bool(torch.isfinite(runs[0]).all())
    if member.recorded and sampler is deis_rk:
        pytest.skip("estimates feed the estimates within a step, which the rule's docstring warns of")
    plain = sampler(conditional(), noise(), TIMES)

    def accuracy(x: Tensor) -> float:
        return float((CLASSES.class_log_posterior(x).argmax(1) == LABELS).double().mean())

    assert accuracy(runs[0]) > accuracy(plain)


@every_rule
def test_has_the_form_of_the_denoiser_it_wraps(member: Member) -> None:
    guided = member.rule(model("v"), LABELS, **member.on)
    assert guided.schedule is SCHEDULE
    assert guided.prediction == "v"
    counted = CountNFE(guided)
    deis(counted, noise(), TIMES)
    assert counted.count == STEPS


@every_rule
def test_reset_reaches_what_is_wrapped(member: Member) -> None:
    counted = CountNFE(model())
    guided = member.rule(counted, LABELS, **member.on)
    guided(noise(), torch.full((32,), 0.4, dtype=torch.float64))
    guided.reset()
    assert counted.count == 0


@every_rule
def test_samples_are_independent_and_any_shape_goes(member: Member) -> None:
    images = Denoiser(
        lambda x, t, cond: x * (0.5 if cond is None else 0.7) + (0 if cond is None else 0.1), SCHEDULE, prediction="x0"
    )
    x, t = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    labels = torch.tensor([2, 0, 7])
    whole, one = (
        member.rule(images, cond, **member.on)(x[s], t[s])
        for cond, s in ((labels, slice(None)), (labels[1:2], slice(1, 2)))
    )
    for all_rows, row in zip(parts(whole), parts(one), strict=True):
        assert all_rows.shape == x.shape
        torch.testing.assert_close(row, all_rows[1:2])


@every_rule
def test_bad_input(member: Member) -> None:
    with pytest.raises(TypeError, match="denoiser"):
        member.rule(torch.nn.Identity(), LABELS, **member.on)
    with pytest.raises(ValueError, match="scales? must be .*finite"):
        member.rule(model(), LABELS, **(member.on | {"scale": float("nan")}))


@every_rule
def test_a_refused_call_leaves_the_run_as_it_was(member: Member) -> None:
    """What a rule remembers within a run is not touched by input of another shape."""
    rules = [member.rule(model(), LABELS, **member.on) for _ in range(2)]
    x, t = noise(), torch.full((32,), 0.5, dtype=torch.float64)
    for rule in rules:
        rule.reset()
        rule(x, t)
    with pytest.raises((ValueError, RuntimeError)):
        rules[0](x[:, :3], t)
    first, second = (parts(rule(0.9 * x, t - 0.1)) for rule in rules)
    assert all(map(torch.equal, first, second))
