"""What every object with state keeps: a call that is refused leaves all that it holds as it was, to the bit.

A new class joins by one entry in MEMBERS, or by one in another suite of this folder that tests the same; the last
test finds those that are in none.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

import trimtab
from trimtab import (
    catalog,
    compress,
    diffusion,
    domain,
    federated,
    finetune,
    generative,
    losses,
    optim,
    robust,
    solvers,
    unlearning,
)

NAN = float("nan")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def flattened(held: Any, place: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """All that an object holds: tensors, arrays, states of generators, numbers, each with its place."""
    seen = set() if seen is None else seen
    if isinstance(held, Tensor):
        yield place, (held.detach().clone().numpy(), str(held.dtype))
        if held.is_leaf and held.grad is not None:
            yield f"{place}.grad", held.grad.clone().numpy()
    elif isinstance(held, np.ndarray):
        yield place, held.copy()
    elif isinstance(held, torch.Generator):
        yield place, held.get_state().numpy()
    elif isinstance(held, np.random.Generator):
        yield place, repr(held.bit_generator.state)
    elif isinstance(held, np.random.RandomState):
        yield place, repr(held.get_state())
    elif (
        isinstance(held, type) or inspect.isroutine(held) or isinstance(held, bool | int | float | complex | str | None)
    ):
        yield place, repr(held) if isinstance(held, float) else held
    elif id(held) not in seen:
        seen.add(id(held))
        if isinstance(held, dict):
            # An optimizer's state is by parameter: its order tells which.
            parts = [(str(n) if isinstance(key, Tensor) else str(key), v) for n, (key, v) in enumerate(held.items())]
            parts.sort(key=lambda part: part[0])  # the same settings in another order are the same
        elif isinstance(held, list | tuple | set | frozenset):
            parts = [(str(n), value) for n, value in enumerate(held)]
        else:
            parts = list(getattr(held, "__dict__", {}).items())
        yield place, (type(held).__name__, [name for name, _ in parts])
        for name, value in parts:
            yield from flattened(value, f"{place}.{name}", seen)


def assert_the_same(now: Any, before: dict[str, Any], after: str, leave: str | None = None) -> None:
    found = dict(flattened(now))
    assert found.keys() == before.keys()
    for place, value in found.items():
        if leave is not None and place.endswith(leave):
            continue
        np.testing.assert_equal(value, before[place], err_msg=f"{place} after {after}")


Calls = list[Callable[[Any], Any]]


class Member(NamedTuple):
    make: Callable[[], Any]
    """Builds the object and brings it into the middle of its life."""
    refused: Calls
    """Calls of it that must be refused."""


# --- estimators -------------------------------------------------------------------------------------------------------


def table() -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(0).normal(size=(200, 3))
    X = X[np.abs(X @ [1, -1, 0.5]) > 0.2]
    return X, np.where(X @ [1, -1, 0.5] > 0, 1, 0)


X, Y = table()
HOLED = np.where(np.random.default_rng(1).random((12, 3)) < 0.2, np.nan, X[:12])
HOLED[0] = X[0]
OUTPUTS, LABELS, LOSSES = drawn(40, 4), torch.arange(40) % 2, drawn(40).abs()
POINTS = drawn(30, 2)
SUBSETS = torch.rand(40, 6, generator=seeded()) < 0.5


def fits(*arguments: Any) -> Callable[[Any], Any]:
    return lambda estimator: estimator.fit(*arguments)


def spoilt(array: np.ndarray, value: float = NAN) -> np.ndarray:
    array = array.copy()
    array[3, 1] = value
    return array


CLASSIFIER: Calls = [
    fits(spoilt(X), Y),
    fits(spoilt(X, np.inf), Y),
    fits(X, Y[:-1]),
    fits(X, np.zeros_like(Y)),
    fits(X[:, 0], Y),
    fits(X[:, :2], np.zeros_like(Y)),
    lambda model: model.predict(X[:, :2]),
    lambda model: model.predict(spoilt(X)),
]
GRAPH: Calls = [fits(spoilt(X)), fits(X[:1]), fits(X[:, :1]), fits(X * [1, 1, 0]), fits(X[:, :2] * [1, 0])]

ESTIMATORS: dict[str, Member] = {
    **{
        kind.__name__: Member(lambda kind=kind: kind().fit(X, Y), CLASSIFIER)
        for kind in (
            optim.LogisticGD,
            optim.NormalizedLogisticGD,
            optim.BatchPerceptron,
            optim.NormalizedBatchPerceptron,
        )
    },
    "NaiveBayesProbe": Member(
        lambda: losses.NaiveBayesProbe().fit(X, Y), [*CLASSIFIER[:3], fits(spoilt(X)[:, :2], Y), *CLASSIFIER[6:]]
    ),
    "HalfspaceTesterLearner": Member(
        lambda: solvers.HalfspaceTesterLearner(n_iter=20, on_reject="ignore", random_state=0).fit(X, Y), CLASSIFIER
    ),
    "SupervisedDictionary": Member(lambda: solvers.SupervisedDictionary(xi=0.1).fit(X, Y), CLASSIFIER),
    "RSSLinearClassifier": Member(
        lambda: domain.RSSLinearClassifier(n_iter=5).fit(X, Y, X),
        [*CLASSIFIER, fits(X, Y, spoilt(X)), fits(X, Y, X[:, :2])],
    ),
    "AggregateRidge": Member(
        lambda: losses.AggregateRidge(0.5).fit(X, X[: len(X) // 4, 0], np.arange(len(X)) % (len(X) // 4)),
        [
            fits(spoilt(X), X[:10, 0], np.arange(len(X)) % 10),
            fits(X, X[:10, 0] * NAN, np.arange(len(X)) % 10),
            fits(X, X[:10, 0], np.arange(len(X))),
            fits(X, X[:10, 0], np.arange(len(X)) - 1),
            fits(X[:, :2], X[:10, 0] * NAN, np.arange(len(X)) % 10),
            lambda model: model.predict(X[:, :2]),
        ],
    ),
    "CoLiDE": Member(lambda: solvers.CoLiDE("equal", max_iter=50, warm_iter=20).fit(X), GRAPH),
    "TopoSwaps": Member(lambda: solvers.TopoSwaps(random_state=0).fit(X), GRAPH),
    "MatrixCompletion": Member(
        lambda: solvers.MatrixCompletion(1, random_state=0, max_iter=5, tol=0.5).fit(HOLED),
        [
            fits(np.where(np.isnan(HOLED), HOLED, np.inf)),
            fits(HOLED * NAN),
            fits(HOLED[:, 0]),
            fits(HOLED[:, :2] * NAN),
            lambda model: model.transform(HOLED[:, :2]),
        ],
    ),
    "PrivateGSD": Member(
        lambda: solvers.PrivateGSD([3, (0.0, 1.0)], max_generations=5, random_state=0).fit([[0, 0.5], [2, 0.25]]),
        [fits([[3, 0.5]]), fits([[0, 1.5]]), fits([[0.0, NAN]]), fits([[0, 0.5, 1]]), lambda model: model.sample(0)],
    ),
    "MongeMap": Member(
        lambda: solvers.MongeMap(max_iter=2, batch_size=20, random_state=0).fit(POINTS, POINTS + 1),
        [
            fits(POINTS * NAN, POINTS),
            fits(POINTS, POINTS[:, :1]),
            fits(POINTS[:, :1].numpy(), POINTS),
            fits(POINTS, POINTS[:1]),
            lambda model: model.transform(POINTS[:, :1]),
            lambda model: model.transform(POINTS * NAN),
        ],
    ),
    "USEFUL": Member(
        lambda: optim.USEFUL(n_init=1).fit(OUTPUTS, LABELS, LOSSES),
        [
            fits(OUTPUTS * NAN, LABELS, LOSSES),
            fits(OUTPUTS, LABELS[1:], LOSSES),
            fits(OUTPUTS, LABELS.float(), LOSSES),
            fits(OUTPUTS, LABELS, LOSSES / 0),
            fits(OUTPUTS, LABELS.index_fill(0, torch.tensor(0), 9), LOSSES),
        ],
    ),
    "LinearDatamodel": Member(
        lambda: unlearning.LinearDatamodel().fit(SUBSETS, OUTPUTS[:, :, None]),
        [
            fits(SUBSETS * 2, OUTPUTS[:, :, None]),
            fits(SUBSETS[:10], OUTPUTS[:, :, None]),
            fits(SUBSETS, OUTPUTS[:, :, None] * NAN),
            fits(SUBSETS, OUTPUTS[:, 0]),
            lambda model: model.predict_without(OUTPUTS[0, :, None], [9]),
            lambda model: model.predict_without(OUTPUTS[0], [0]),
        ],
    ),
    "KSubspaces": Member(
        lambda: diffusion.KSubspaces(2, dim=1, random_state=0).fit(X),
        [
            fits(spoilt(X)),
            fits(spoilt(X, np.inf)),
            fits(X[:1]),
            fits(X[:, 0]),
            fits(X[:, :0]),
            lambda model: model.predict(X[:, :2]),
            lambda model: model.transform(spoilt(X)),
        ],
    ),
}


# --- learners, minimisers, rules --------------------------------------------------------------------------------------


def learner(kind: str) -> Any:
    x0, domain, numbers = torch.zeros(2), optim.Ball(1.0), {"diameter": 2.0, "gradient_bound": 2.0}
    made = {
        "OptimisticOMD": lambda: optim.OptimisticOMD(x0, domain, optim.ConvexRate(**numbers)),
        "OptimisticNewton": lambda: optim.OptimisticNewton(x0, domain, exp_concavity=0.1, **numbers),
        "DynamicOMD": lambda: optim.DynamicOMD(x0, domain, horizon=100, smoothness=1.0, **numbers),
    }[kind]()
    for step in range(3):
        made.update(drawn(2, seed=step))
    return made


GRADIENTS: Calls = [
    lambda held: held.update(torch.tensor([1.0, NAN])),
    lambda held: held.update(torch.tensor([1.0, float("inf")])),
    lambda held: held.update(torch.ones(3)),
    lambda held: held.update(torch.ones(2, dtype=torch.float64)),
    lambda held: held.update(np.ones(2)),
]
HINTS: Calls = [
    lambda held: held.update(torch.ones(2), torch.tensor([1.0, NAN])),
    lambda held: held.update(torch.ones(2), torch.ones(3)),
    lambda held: held.update(torch.ones(2), torch.ones(2, dtype=torch.float64)),
]


def bowl(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def minimiser(kind: Callable[..., Any], **options: Any) -> Any:
    made = kind(**options, generator=seeded(1))
    for _ in range(3):
        made.step(bowl)
    return made


ENERGIES: Calls = [
    lambda held: held.step(lambda x: bowl(x) * NAN),
    lambda held: held.step(lambda x: bowl(x).sum()),
    lambda held: held.step(lambda x: bowl(x)[:-1]),
]


def guided(kind: Callable[..., Any], **options: Any) -> Any:
    schedule = diffusion.VPLinear() if hasattr(diffusion, "VPLinear") else None
    made = kind(
        diffusion.Denoiser(lambda x, t, cond: x * (0.5 if cond is None else 0.7), schedule, prediction="x0"),
        "class",
        **options,
    )
    made.reset()
    made(drawn(4, 3), torch.full((4,), 0.5))
    return made


def adele() -> losses.ADELE:
    made = losses.ADELE(3)
    curves = losses.LearningCurve(0.8, 0.9, 1.0), losses.LearningCurve(0.7, 0.9, 3.0)
    for epoch in range(1, 8):
        made.update([0.9, *(float(curve.value(epoch)) for curve in curves)])
    return made


def black_box_defense() -> robust.BlackBoxDefense:
    """Once trained on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        query = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        held = robust.BlackBoxDefense(query, nn.Conv2d(1, 1, 3, padding=1), method="rge", q=2)
    held.loss(drawn(4, 1, 4, 4), generator=seeded())["total"].backward()
    return held


def ibp_loss() -> robust.IBPLoss:
    """In the middle of the rise."""
    held = robust.IBPLoss(0.1)
    held.set_progress(0.25)
    return held


def memory() -> losses.SampleMemory:
    made = losses.SampleMemory(6, 2)
    made.update(torch.tensor([0, 3]), lambda rows: rows + 1)
    return made


def nets(*inner: Callable[[], nn.Module]) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), *(part() for part in inner), nn.Linear(8, 3))
            for _ in range(2)
        ]


def trained(kind: Callable[..., Any], *inner: Callable[[], nn.Module], **options: Any) -> Any:
    networks = nets(*inner)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in networks]
    made = kind(networks, optimizers, **options)
    made.step(BATCH, CLASSES, *([torch.arange(6)] if kind is losses.ELRPlus else []))
    return made


BATCH, CLASSES = drawn(6, 4), torch.arange(6) % 3


def steps(*arguments: Any) -> Callable[[Any], Any]:
    return lambda rule: rule.step(*arguments)


def loads(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    return lambda held: held.load_state_dict(change(copy.deepcopy(held.state_dict())))


def foreign(network: int) -> Callable[[dict[str, Any]], Any]:
    """A state whose parts before this one fit, with other numbers, and this one does not."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        for net in state["networks"]:
            for value in net.values():
                value += 1
        state["networks"][network]["0.weight"] = torch.zeros(2, 2)
        return state

    return change


RULE: Calls = [
    steps(BATCH, CLASSES.float()),
    steps(BATCH, CLASSES[:-1]),
    steps(BATCH, CLASSES + 2),
    steps(BATCH, CLASSES - 1),
    steps(BATCH, CLASSES.index_fill(0, torch.tensor(2), -100)),
    lambda rule: rule.set_epoch(-1),
    lambda rule: rule.set_epoch(NAN),
]
STATES: Calls = [
    loads(lambda state: {}),
    loads(foreign(0)),
    loads(foreign(1)),
    loads(lambda state: {**foreign(0)(state), "networks": state["networks"][:1]}),
    loads(lambda state: {**state, "optimizers": [{"state": {}, "param_groups": []}] * 2}),
]


class Maker(nn.Linear):
    """Images from noise."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).view(-1, 1, 4, 4)


class Critic(nn.Linear):
    """Tells images apart by their pixels."""

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def score(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        return self(features)[:, 0]


def adversary(read: bool = False) -> generative.GAN:
    augment = generative.DiffAugment(("light",))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maker, critic, head = Maker(2, 16), Critic(16, 1), generative.AugSelfHead(16, augment.counts)
    groups = maker.parameters(), [*critic.parameters(), *(head.parameters() if read else [])]
    optimizers = [torch.optim.SGD(group, lr=0.1, momentum=0.9) for group in groups]
    options = {"augment": augment, "discriminator_steps": 2, "generator": seeded(8)}
    if read:
        made = generative.AugSelfGAN(maker, critic, head, optimizers, 2, **options)
    else:
        made = generative.GAN(maker, critic, optimizers, 2, **options)
    made.step(drawn(6, 1, 4, 4))
    return made


ADVERSARIAL: Calls = [
    steps(drawn(1, 1, 4, 4)),
    steps(drawn(6, 1, 4, 4).long()),
    steps(drawn(6, 1, 4, 4), torch.arange(6.0)),
    steps(drawn(6, 1, 4, 4), torch.arange(5)),
    loads(lambda state: {}),
    loads(lambda state: {**state, "optimizers": state["optimizers"][:1]}),
    loads(lambda state: {**state, "discriminator": {"weight": torch.ones(1, 16)}}),
    loads(lambda state: {**state, "generator": torch.zeros(3, dtype=torch.uint8)}),
]


TOKENS = torch.arange(12).view(3, 4) % 2
MARGINAL_STATES: Calls = [
    loads(lambda state: {}),
    loads(lambda state: spoil(state, "samples", state["samples"][:1])),
    loads(lambda state: spoil(state, "marginals", {})),
    loads(lambda state: spoil(state, "optimizer", {"state": {}, "param_groups": []})),
]


def tokens_sum(tokens: Tensor) -> Tensor:
    return tokens.sum(1).float()


def marginal_rule(kind: Callable[..., Any], *target: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scores = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
        marginal = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(16, 1))
    held = generative.Marginals(scores, marginal, mask_id=2)
    rule = kind(held, torch.optim.Adam(held.parameters()), 4, *target, samples=4, gibbs_steps=2, generator=seeded(5))
    rule.step_marginals(TOKENS) if kind is generative.MarginalLikelihood else rule.gibbs()
    return rule


def self_play() -> diffusion.SelfPlay:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
    rule = diffusion.SelfPlay(
        model,
        torch.optim.Adam(model.parameters()),
        lambda ours, reference, x: (ours(x) - reference(x))[:, 0],
        lambda reference, count: torch.ones(count, 2),
    )
    rule.step(drawn(6, 2))
    return rule


class Halves(nn.Module):
    """A network of two halves, with its bottleneck between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return self.inward(x), None

    def decode(self, features: Tensor, rest: None, t: Tensor) -> Tensor:
        return self.outward(features)


IMAGES = drawn(4, 1, 4, 4)


def phasic_adapter() -> diffusion.PhasicAdapter:
    schedule = diffusion.Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = diffusion.ContentFused(Halves(), diffusion.ContentFusion(2), schedule)
    adam = torch.optim.Adam(denoiser.parameters())
    rule = diffusion.PhasicAdapter(denoiser, adam, features=lambda x: x.flatten(1), shots=IMAGES + 1, source=IMAGES)
    rule.step(IMAGES, IMAGES + 1, generator=seeded(9))
    return rule


def moved(state: dict[str, Any]) -> dict[str, Any]:
    """The same parts with other numbers, so that one that was taken before another was refused would show."""
    return {
        name: moved(part) if isinstance(part, dict) else part + 1 if isinstance(part, Tensor | int) else part
        for name, part in state.items()
    }


def moved_but(**parts: Any) -> Callable[[Any], Any]:
    return loads(lambda state: {**moved(state), **parts})


def bias_free_unet() -> diffusion.BiasFreeUNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = diffusion.BiasFreeUNet(base=2, depth=1)
    made(IMAGES)  # in training, which moves the running deviations
    return made


def dynamic_conv() -> compress.DynamicConv:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = compress.DynamicConv(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), 0.8)
    made(drawn(2, 3, 4, 4))
    return made


def guidance_adapters() -> diffusion.GuidanceAdapters:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nets()[0]
        return diffusion.adapt_to_guidance(network, {"0": 8}, hidden=4)


def trajectory_matcher() -> compress.TrajectoryMatcher:
    """In the middle of distilling, with images in batches."""
    model, x = nets()[0][2:], drawn(6, 8)
    paths = torch.stack([compress.train_expert(model, x, CLASSES, epochs=4, generator=seeded(i)) for i in range(2)])
    made = compress.TrajectoryMatcher(model, paths, x, CLASSES, steps=4, batch_size=2, generator=seeded(3))
    made.step()
    return made


def self_tuner() -> optim.SelfTuner:
    hparams = optim.HyperParameters({"rate": optim.HyperParameter(0.3, 0.0, 0.9)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        model = optim.convert_to_stn(net, hparams, dropout={"2": "rate"})
        made = optim.SelfTuner(model, hparams, warmup=0, generator=seeded(2))
        made.epoch([(BATCH, CLASSES)] * 4, [(BATCH, CLASSES)])
    return made


def spoil(state: dict[str, Any], part: str, value: Any) -> dict[str, Any]:
    for name in ("model", "hparams"):
        for tensor in state[name].values():
            tensor += 1
    return {**state, part: value}


def mesa() -> optim.MESA:
    made = optim.MESA(nets()[0], start_epoch=0)
    made.set_epoch(1)
    made.update()
    return made


def newton() -> optim.GradientNormalizedNewton:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    made = optim.GradientNormalizedNewton([weight])
    made.step(lambda: weight.pow(4).sum())
    return made


def udc() -> solvers.UDC:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return solvers.UDC.for_problem(solvers.TSP, 5, 8)


TOURS = solvers.TSP.random(1, 12, generator=seeded(3))
FEW = solvers.TSP.random(1, 4, generator=seeded(3))
GENERATOR = seeded(4)

PIXELS = drawn(1, 3, 4, 4).softmax(1)


def selector() -> domain.InstanceAdaptiveSelector:
    made = domain.InstanceAdaptiveSelector(3)
    made(PIXELS)
    return made


def masked() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
    finetune.apply_adapter(model, finetune.MaskTuningConfig(target_modules=["0"]))
    return model


def mask_tuner() -> finetune.MaskTuner:
    """Once stepped, on its own model."""
    model = masked()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    made = finetune.MaskTuner(model, optimizer, generator=seeded(3))
    made.step(model(BATCH).square().mean(), model(BATCH).sum())
    return made


def decay_annealing() -> finetune.WeightDecayAnnealing:
    made = finetune.WeightDecayAnnealing(torch.optim.AdamW([torch.ones(2)], weight_decay=0.1), T_max=5)
    made.step()
    return made


def dr_tune() -> finetune.DRTune:
    """With two batches stored."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held = finetune.DRTune(nn.Linear(4, 5), nn.Linear(5, 3), queue_size=16)
    for _ in range(2):
        held.loss(BATCH, CLASSES)["total"].backward()
    return held


def gradient_routing() -> finetune.GradientRouting:
    """Once stepped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
    gates = finetune.insert_gates(model, ["0"], generator=seeded(2))
    optimizers = torch.optim.Adam(gates, lr=0.1), torch.optim.Adam([model[0].weight, model[0].bias], lr=0.1)
    made = finetune.GradientRouting(*optimizers, model)
    made.step(lambda: model(BATCH).square().mean())
    return made


def gradient_steering() -> finetune.GradientSteering:
    weight = torch.ones(2, requires_grad=True)
    made = finetune.GradientSteering(torch.optim.Adam([weight], lr=0.1))

    def closure() -> Tensor:
        made.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    made.step(closure)
    return made


def small_classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 3)
        )


def quantised_rule(kind: type) -> Any:
    """A rule that trains a quantised network, after a step."""
    network = small_classifier()
    if kind is compress.EQNet:
        model = compress.prepare_elastic(network, IMAGES, (2, 4))
        made = compress.EQNet(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), generator=seeded(1))
    else:
        model = compress.prepare_quantized(network, IMAGES, 4)
        made = compress.GAQAT(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    made.step(IMAGES, torch.arange(4) % 3)
    return made


def data_free() -> compress.AdaDFQ:
    teacher = small_classifier().eval()
    quantisers = {"weight": compress.MinMaxWeight, "inputs": compress.MinMaxActivation}
    student = compress.prepare_quantized(teacher, IMAGES, 4, **quantisers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maker = compress.ConditionalGenerator((1, 4, 4), 3, latent=3, width=2)
    optimizers = (torch.optim.SGD(held.parameters(), lr=0.01, momentum=0.9) for held in (student, maker))
    made = compress.AdaDFQ(teacher, student, maker, *optimizers, generator=seeded(1))
    made.step(4)
    return made


def architecture_search() -> compress.QuantNAS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = {str(size): compress.QuantNoiseConv2d(1, 1, size) for size in (1, 3)}
        model = nn.Sequential(compress.MixedOp(convs), nn.BatchNorm2d(1))
    groups = compress.weight_parameters(model), [op.logits for op in compress.mixed_ops(model)]
    optimizers = (torch.optim.SGD(group, lr=0.01, momentum=0.9) for group in groups)
    made = compress.QuantNAS(model, *optimizers, epochs=4, generator=seeded(1))
    made.step((IMAGES, IMAGES), (IMAGES, IMAGES))
    return made


def scale_freezer() -> compress.ScaleFreezer:
    """In its second window."""
    made = compress.ScaleFreezer([2, 1], window=2)
    for _ in range(3):
        made.combine(torch.ones(3), -torch.ones(3))
    return made


QUANTISED: Calls = [
    steps(IMAGES, torch.zeros(4)),
    steps(IMAGES, torch.arange(3)),
    steps(IMAGES[:0], torch.arange(0)),
    loads(lambda state: {}),
    moved_but(model={}),
    moved_but(optimizer={"state": {}, "param_groups": []}),
]


class Prompted(nn.Linear):
    """Predicts the noise of images of 16 pixels, whatever the prompt."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return super().forward(x.flatten(1) + cond[:, None]).view_as(x)


def concept_domain_correction() -> unlearning.ConceptDomainCorrection:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = Prompted(16, 16), nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    optimizers = [torch.optim.Adam(part.parameters()) for part in networks]
    made = unlearning.ConceptDomainCorrection(
        *networks, optimizers, torch.linspace(0.9, 0.1, 5), warmup=0, generator=seeded(8)
    )
    made.step(drawn(4, 1, 4, 4), torch.zeros(4), torch.ones(4), drawn(4, 1, 4, 4), torch.ones(4))
    return made


def of_prompts(*arguments: Any) -> Callable[[Any], Any]:
    return lambda held: held.step(*arguments)


def adapt_then_unlearn() -> unlearning.AdaptThenUnlearn:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = nn.Linear(3, 4), nn.Linear(4, 1)
    optimizers = [torch.optim.Adam(part.parameters()) for part in networks]
    made = unlearning.AdaptThenUnlearn(*networks, optimizers, 3, generator=seeded(8))
    made.step(BATCH)
    return made


class OneLayer(nn.Linear):
    """A graph network of one layer."""

    def layers(self, x: Tensor, edge_index: Tensor) -> list[Tensor]:
        return [self(x + torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]))]

    def decode(self, h: Tensor, pairs: Tensor) -> Tensor:
        return (h[pairs[0]] * h[pairs[1]]).sum(1)


RING = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])


def d2dgn() -> unlearning.D2DGN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        preserver, destroyer, student = (OneLayer(4, 2) for _ in range(3))
    made = unlearning.D2DGN(preserver, destroyer, student, torch.optim.Adam(student.parameters()))
    made.step(made.delete_edges(BATCH, RING, RING[:, :1], generator=seeded()))
    return made


PAIRS = {"image": drawn(6, 4), "text": drawn(6, 5)}
THREE = {name: x[:3] for name, x in PAIRS.items()}, torch.arange(3)


def creamfl_server() -> Any:
    server = federated.CreamFLServer({"image": nn.Linear(4, 3), "text": nn.Linear(5, 3)})
    server.share(PAIRS)
    return server


def creamfl_client() -> Any:
    client = federated.CreamFLClient({"text": nn.Linear(5, 3)})
    client.begin(creamfl_server().shared, PAIRS)
    return client


HOLDERS: dict[str, Member] = {
    "CreamFLServer": Member(
        creamfl_server,
        [
            steps(*THREE),  # no client has sent anything
            lambda server: server.receive([{"image": drawn(5, 3)}]),
            lambda server: server.receive([{"sound": drawn(6, 3)}]),
            lambda server: server.share({"image": PAIRS["image"]}),
            lambda server: server.load_state_dict({"odd.image": drawn(6, 3)}),
        ],
    ),
    "CreamFLClient": Member(
        creamfl_client,
        [
            steps({"image": PAIRS["image"][:3]}, torch.arange(3)),
            steps(THREE[0], torch.arange(4)),
            lambda client: client.begin({"text": drawn(6, 3)}, PAIRS),
            lambda client: client.begin({"image": drawn(6, 3), "sound": drawn(6, 3)}, PAIRS),
            lambda client: client.begin({"image": drawn(6, 3), "text": drawn(6, 3)}, {"image": PAIRS["image"]}),
            lambda client: client.upload({"image": PAIRS["image"]}),
            lambda client: client.load_state_dict({"odd.text": drawn(6, 3)}),
        ],
    ),
    "ConceptDomainCorrection": Member(
        concept_domain_correction,
        [
            of_prompts(drawn(4, 1, 4, 4), torch.zeros(3), torch.ones(4), drawn(4, 1, 4, 4), torch.ones(4)),
            of_prompts(drawn(4, 1, 4, 4), torch.zeros(4), torch.ones(4), drawn(4, 1, 4, 4), torch.ones(3)),
            of_prompts(drawn(4, 1, 4, 4).long(), torch.zeros(4), torch.ones(4), drawn(4, 1, 4, 4), torch.ones(4)),
            of_prompts(drawn(0, 1, 4, 4), torch.zeros(0), torch.ones(0), drawn(4, 1, 4, 4), torch.ones(4)),
            loads(lambda state: {}),
            moved_but(discriminator={}),
            moved_but(optimizers=[]),
            moved_but(steps_done=-1),
        ],
    ),
    "AdaptThenUnlearn": Member(
        adapt_then_unlearn,
        [
            lambda held: held.step(BATCH.long()),
            lambda held: held.step(BATCH[:0]),
            lambda held: held.step(BATCH, z=drawn(6, 3)),
            loads(lambda state: {}),
            moved_but(discriminator={}),
            moved_but(optimizers=[]),
            moved_but(steps_done=-1),
        ],
    ),
    "D2DGN": Member(
        d2dgn,
        [
            lambda held: held.delete_edges(BATCH, RING + 1, RING[:, :1], generator=GENERATOR),
            lambda held: held.delete_edges(BATCH, RING, RING[0], generator=GENERATOR),
            lambda held: held.delete_edges(BATCH, RING, RING[:, :1], retained=RING, generator=GENERATOR),
            lambda held: held.delete_nodes(BATCH, RING, torch.tensor([6])),
            loads(lambda state: {}),
            moved_but(student={}),
            moved_but(optimizer={"state": {}, "param_groups": []}),
        ],
    ),
    "EQNet": Member(lambda: quantised_rule(compress.EQNet), QUANTISED),
    "GAQAT": Member(lambda: quantised_rule(compress.GAQAT), [*QUANTISED, moved_but(freezer={})]),
    "AdaDFQ": Member(
        data_free,
        [
            steps(1),
            lambda held: held.step(noise=torch.zeros(4, 3)),
            lambda held: held.step(noise=torch.zeros(4, 2), labels=torch.zeros(4, dtype=torch.int64)),
            lambda held: held.step(noise=torch.zeros(4, 3), labels=torch.zeros(4)),
            loads(lambda state: {}),
            moved_but(student={}),
            moved_but(maker={}),
            moved_but(student_optimizer={"state": {}, "param_groups": []}),
            moved_but(maker_optimizer={"state": {}, "param_groups": []}),
        ],
    ),
    "QuantNAS": Member(
        architecture_search,
        [
            steps((IMAGES, IMAGES[:2]), (IMAGES, IMAGES)),
            steps((IMAGES, IMAGES), (IMAGES[:0], IMAGES[:0])),
            lambda held: held.set_epoch(4),
            loads(lambda state: {}),
            moved_but(model={}),
            moved_but(weight_optimizer={"state": {}, "param_groups": []}),
            moved_but(alpha_optimizer={"state": {}, "param_groups": []}),
        ],
    ),
    "GradientDisorder": Member(
        lambda: scale_freezer().signs, [lambda held: held.update(torch.zeros(2)), loads(lambda state: {})]
    ),
    "ScaleFreezer": Member(
        scale_freezer,
        [
            lambda held: held.combine(torch.ones(3), torch.ones(2)),
            lambda held: held.combine(torch.ones(2), torch.ones(2)),
            loads(lambda state: {}),
            loads(lambda state: {**moved(state), "frozen": torch.zeros(3, dtype=torch.bool)}),
        ],
    ),
    "GradientRouting": Member(
        gradient_routing,
        [
            loads(lambda state: {}),
            loads(lambda state: {**state, "main": {"state": {}, "param_groups": []}}),
            loads(lambda state: {**state, "gate": {"state": {}, "param_groups": []}}),
        ],
    ),
    "GradientSteering": Member(
        gradient_steering,
        [
            lambda held: held.step(),
            loads(lambda state: {"state": {}, "param_groups": []}),
        ],
    ),
    "DRTune": Member(
        dr_tune,
        [
            lambda held: held.loss(BATCH, CLASSES.float()),
            lambda held: held.loss(BATCH, CLASSES[:-1]),
            lambda held: held.loss(BATCH[:0], CLASSES[:0]),
            lambda held: held.warmup([(BATCH, CLASSES.float())]),
            loads(lambda state: {}),
            loads(lambda state: {**moved(state), "head.weight": torch.zeros(2, 5)}),
            loads(lambda state: {name: value for name, value in state.items() if name != "_extra_state"}),
        ],
    ),
    "MaskTuner": Member(
        mask_tuner,
        [
            lambda held: held.step(torch.tensor(1.0)),
            lambda held: held.step(torch.ones(2, requires_grad=True) * 2),
            lambda held: held.step(held.masks[0].sum(), torch.tensor(1.0)),
            loads(lambda state: {}),
            loads(lambda state: {**state, "generator": torch.zeros(3, dtype=torch.uint8)}),
            loads(lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}}),
        ],
    ),
    "WeightDecayAnnealing": Member(
        decay_annealing,
        [
            loads(lambda state: {}),
            loads(lambda state: {**state, "starts": [0.1, 0.2]}),
            loads(lambda state: {**state, "steps": -1}),
        ],
    ),
    "InstanceAdaptiveSelector": Member(
        selector,
        [
            lambda held: held(PIXELS[:, :2]),
            lambda held: held(PIXELS[0]),
            lambda held: held(PIXELS * 2),
            lambda held: held(PIXELS * NAN),
            loads(lambda state: {}),
            loads(lambda state: {**moved(state), "confidence": torch.zeros(4)}),
        ],
    ),
    **{
        kind: Member(
            lambda kind=kind: learner(kind),
            GRADIENTS
            + ([] if kind == "DynamicOMD" else HINTS)
            + ([lambda held: held.update(torch.full((2,), 1e30))] if kind == "OptimisticNewton" else []),
        )
        for kind in ("OptimisticOMD", "OptimisticNewton", "DynamicOMD")
    },
    "CBO": Member(lambda: minimiser(optim.CBO, particles=drawn(5, 2)), ENERGIES),
    "ConsensusHopping": Member(lambda: minimiser(optim.ConsensusHopping, start=drawn(2), n_particles=5), ENERGIES),
    "ADELE": Member(
        adele,
        [
            lambda held: held.update([0.5, 0.5]),
            lambda held: held.update([0.5, 0.5, NAN]),
            lambda held: held.update([0.5, 0.5, 1.5]),
            lambda held: held.correct(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 4, 2, 2)),
            loads(lambda state: {}),
            loads(lambda state: {**state, "history": [[0.5, 0.5]]}),
            loads(lambda state: {"history": state["history"][:3], "started": {7: 1}}),
            loads(lambda state: {"history": state["history"][:3], "started": {1: 9}}),
            loads(lambda state: {"history": [[0.5, 0.5, NAN]], "started": {}}),
        ],
    ),
    "BlackBoxDefense": Member(
        black_box_defense,
        [
            lambda held: held.loss(IMAGES.long(), generator=GENERATOR),
            lambda held: held.loss(IMAGES[:0], generator=GENERATOR),
            lambda held: held.loss(IMAGES, torch.zeros(7, dtype=torch.int64), generator=GENERATOR),
            lambda held: held.loss(IMAGES, noise=IMAGES[:1], generator=GENERATOR),
            loads(lambda state: {}),
        ],
    ),
    "IBPLoss": Member(
        ibp_loss,
        [
            lambda held: held.set_progress(1.5),
            lambda held: held(nn.Identity(), drawn(4, 2), torch.zeros(3, dtype=torch.int64)),
            lambda held: held(nn.Identity(), drawn(4, 2), torch.zeros(4)),
            loads(lambda state: {}),
        ],
    ),
    "SampleMemory": Member(
        memory,
        [
            lambda held: held.update(torch.tensor([0, 6]), lambda rows: rows + 1),
            lambda held: held.update(torch.tensor([0, 0]), lambda rows: rows + 1),
            lambda held: held.update(torch.tensor([0.0]), lambda rows: rows + 1),
            lambda held: held.update(torch.tensor([0]), lambda rows: rows[:, :1] + 1),
            loads(lambda state: {"rows": torch.ones(3, 2)}),
        ],
    ),
    "CoTeaching": Member(lambda: trained(losses.CoTeaching), RULE + STATES),
    "NestedCoTeaching": Member(
        lambda: trained(losses.NestedCoTeaching, lambda: losses.NestedDropout(8, generator=seeded(5))), RULE + STATES
    ),
    "ELRPlus": Member(
        lambda: trained(losses.ELRPlus, num_samples=6, num_classes=3, generator=seeded(6)),
        [
            steps(BATCH, CLASSES.float(), torch.arange(6)),
            steps(BATCH, CLASSES + 2, torch.arange(6)),
            steps(BATCH, CLASSES - 1, torch.arange(6)),
            steps(BATCH, CLASSES, torch.arange(6) + 1),
            steps(BATCH, CLASSES, torch.zeros(6, dtype=torch.int64)),
            steps(BATCH, CLASSES, torch.arange(6).float()),
            *STATES,
        ],
    ),
    "SelfTuner": Member(
        self_tuner,
        [
            loads(lambda state: {}),
            loads(lambda state: spoil(state, "hparams", {})),
            loads(lambda state: spoil(state, "optimizer", {"state": {}, "param_groups": []})),
            loads(lambda state: spoil(state, "hyper_optimizer", {"state": {}, "param_groups": []})),
            loads(lambda state: spoil(state, "epochs", -1)),
            loads(lambda state: spoil(state, "steps", "many")),
        ],
    ),
    "MESA": Member(
        mesa,
        [
            lambda held: held(drawn(6, 3)[0], BATCH),
            lambda held: held(drawn(6, 2), BATCH),
        ],
    ),
    "GradientNormalizedNewton": Member(
        newton,
        [
            lambda held: held.step(lambda: torch.tensor(1.0)),
            lambda held: held.step(lambda: sum(held.param_groups[0]["params"]).sum().detach()),
            loads(lambda state: {}),
            loads(lambda state: {"state": {}, "param_groups": []}),
        ],
    ),
    "AdaptiveProjectedGuidance": Member(
        lambda: guided(diffusion.AdaptiveProjectedGuidance, scale=4.0), [lambda held: held(drawn(4, 2), torch.zeros(3))]
    ),
    "GAN": Member(adversary, ADVERSARIAL),
    "AugSelfGAN": Member(
        lambda: adversary(read=True),
        [*ADVERSARIAL, loads(lambda state: {name: part for name, part in state.items() if name != "head"})],
    ),
    "MarginalLikelihood": Member(
        lambda: marginal_rule(generative.MarginalLikelihood),
        [
            lambda held: held.step_conditionals(TOKENS.float()),
            lambda held: held.step_conditionals(TOKENS[0]),
            lambda held: held.step_marginals(TOKENS.float()),
            lambda held: held.step_marginals(TOKENS[0]),
            *MARGINAL_STATES,
        ],
    ),
    "MarginalKL": Member(lambda: marginal_rule(generative.MarginalKL, tokens_sum), MARGINAL_STATES),
    "MarginalFM": Member(
        lambda: marginal_rule(generative.MarginalFM, tokens_sum),
        [
            lambda held: held.step(TOKENS.float()),
            lambda held: held.step(TOKENS[0]),
            loads(lambda state: spoil(state, "log_partition", torch.zeros(3))),
            *MARGINAL_STATES,
        ],
    ),
    "SelfPlay": Member(
        self_play,
        [
            lambda held: held.step(TOKENS),
            lambda held: held.step(drawn(6, 3)),
            loads(lambda state: {}),
            loads(lambda state: spoil(state, "reference", {})),
            loads(lambda state: spoil(state, "optimizer", {"state": {}, "param_groups": []})),
        ],
    ),
    "PhasicAdapter": Member(
        phasic_adapter,
        [
            lambda held: held.step(IMAGES, IMAGES[:2], generator=GENERATOR),
            lambda held: held.step(IMAGES.long(), IMAGES.long(), generator=GENERATOR),
            lambda held: held.step(IMAGES[0], IMAGES[0], generator=GENERATOR),
            lambda held: held.step(IMAGES, IMAGES, t=torch.zeros(3), generator=GENERATOR),
            loads(lambda state: {}),
            moved_but(denoiser={}),
            moved_but(directional={"direction": torch.zeros(3)}),
            moved_but(optimizer={"state": {}, "param_groups": []}),
        ],
    ),
    "BiasFreeNorm": Member(
        lambda: diffusion.BiasFreeNorm(2),
        [
            lambda held: held(IMAGES),
            lambda held: held(IMAGES.expand(4, 3, 4, 4)),
            lambda held: held(drawn(2, 4, 4)),
        ],
    ),
    "BiasFreeUNet": Member(
        bias_free_unet,
        [
            lambda held: held(IMAGES[..., :3]),
            lambda held: held(IMAGES[0]),
            lambda held: held(IMAGES.expand(4, 3, 4, 4)),
        ],
    ),
    "GuidanceAdapters": Member(
        guidance_adapters,
        [
            lambda held: held.load_adapter_state_dict({}),
            lambda held: held.load_adapter_state_dict({**moved(held.adapter_state_dict()), "0.last.bias": drawn(3)}),
        ],
    ),
    "TrajectoryMatcher": Member(
        trajectory_matcher,
        [
            lambda held: held.step(expert=2),
            lambda held: held.step(start=2),
            lambda held: held.step(noise=torch.zeros(3)),
            loads(lambda state: {}),
            loads(lambda state: {**moved(state), "images": torch.zeros(2, 2)}),
            loads(lambda state: {**moved(state), "optimizer": {"state": {}, "param_groups": []}}),
        ],
    ),
    "DynamicConv": Member(dynamic_conv, [lambda held: held(IMAGES), lambda held: held(drawn(2, 3, 4))]),
    "UDC": Member(
        udc,
        [
            lambda held: held.loss(TOURS, samples=1, generator=GENERATOR),
            lambda held: held.loss(TOURS, candidates=1, generator=GENERATOR),
            lambda held: held.loss(TOURS, rounds=-1, generator=GENERATOR),
            lambda held: held.loss(FEW, generator=GENERATOR),
            lambda held: held.solve(TOURS, samples=0, generator=GENERATOR),
        ],
    ),
}

MEMBERS = {**ESTIMATORS, **HOLDERS}
SETS_MODES = ("CoTeaching", "NestedCoTeaching", "MESA")  # each call puts their networks into the mode that it needs


@pytest.mark.parametrize("name", MEMBERS)
def test_a_refused_call_leaves_all_that_is_held_bit_equal(name: str) -> None:
    member = MEMBERS[name]
    held = member.make()
    before, draws = dict(flattened(held)), GENERATOR.get_state()
    globally = torch.get_rng_state()
    for number, call in enumerate(member.refused):
        with pytest.raises((ValueError, TypeError, KeyError, IndexError, RuntimeError)):
            call(held)
        assert_the_same(held, before, f"call {number}", leave=".training" if name in SETS_MODES else None)
    assert torch.equal(GENERATOR.get_state(), draws)
    assert torch.equal(torch.get_rng_state(), globally)


FITTED: dict[str, tuple[Any, ...]] = {
    "RSSLinearClassifier": (X, Y, X),
    "AggregateRidge": (X, X[: len(X) // 4, 0], np.arange(len(X)) % (len(X) // 4)),
    "MatrixCompletion": (HOLED,),
    "PrivateGSD": ([[0, 0.5], [2, 0.25]],),
    "MongeMap": (POINTS, POINTS + 1),
    **dict.fromkeys(("CoLiDE", "TopoSwaps", "KSubspaces"), (X,)),
}
"""What an estimator is fitted to; samples and labels of two classes where nothing stands here."""
ENDLESS = {("SupervisedDictionary", "radius")}  # infinity is no bound at all


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_refuses_hyper_parameters_that_are_no_numbers(name: str) -> None:
    held = ESTIMATORS[name].make()
    if not isinstance(held, BaseEstimator):
        pytest.skip("its constructor has refused them")
    before = dict(flattened(held))
    for parameter, value in held.get_params().items():
        if parameter == "random_state" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for bad in (NAN,) if (name, parameter) in ENDLESS else (NAN, np.inf):
            held.set_params(**{parameter: bad})
            with pytest.raises((ValueError, TypeError), match=parameter):
                held.fit(*FITTED.get(name, (X, Y)))
        held.set_params(**{parameter: value})
    assert_the_same(held, before, "hyper-parameters that are none")


# --- nobody is forgotten ----------------------------------------------------------------------------------------------

STATELESS = {
    "KeepMask": "a mask, which nothing changes",
    "MaskPredictor": "weights alone",
    "ElasticTransformer": "weights alone, and the student that is set, which its own tests try",
    "Transformer": "weights alone",
    **dict.fromkeys(("AccuracyPredictor", "AdaptiveDeviation", "ElasticQuantizer", "MixedOp"), "weights alone"),
    **dict.fromkeys(("ConditionalGenerator", "LSQActivation", "LSQWeight", "QuantNoiseConv2d"), "weights alone"),
    "MinMaxActivation": "takes every tensor of numbers",
    "MinMaxWeight": "holds nothing",
    **dict.fromkeys(("PackedLayer", "PackedWeight"), "fixed numbers alone"),
    "Marginals": "weights alone",
    **dict.fromkeys(("ConditionCritics", "DiversifiedTranslator"), "weights alone"),
    **dict.fromkeys(("PartDiscriminator", "PoseAugmenter", "PoseDA"), "weights alone, and checks before it draws"),
    "RSSLoss": "holds nothing",
    **dict.fromkeys(("TabularEncoder", "TabularTokenizer"), "weights alone"),
    **dict.fromkeys(("ScalarQuantizer", "VectorQuantizer", "MultiScaleQuantizer"), "weights alone"),
    **dict.fromkeys(
        ("AutoregressiveProbe", "HierarchicalMaskedAR", "QuantizedAutoencoder", "Tokenizer1D"), "weights alone"
    ),
    **dict.fromkeys(
        ("ConsistencyPreconditioned", "ContentFused", "ContentFusion", "LowRankDenoiser", "NonScalingLayerNorm"),
        "weights alone",
    ),
    **dict.fromkeys(("CrossAttentionAdapter", "LoRALinear", "OffsetAdapter"), "weights alone"),
    "FourierFeatures": "fixed numbers alone",
    **dict.fromkeys(
        ("DenoisingAutoencoderLoss", "ReconstructionContractiveLoss"), "holds nothing, and checks before it draws"
    ),
    "MaskedDiffusionLoss": "holds nothing, and checks before it draws",
    "HyperParameters": "the tuner's parameters; nothing in them moves in a call",
    "SmoothAdversarialCompSumLoss": "holds a generator alone, and checks before it draws",
    "FiLMFusion": "weights alone",
    "GatedFusion": "weights alone",
    "SharedHeadFusion": "weights alone",
    "SumFusion": "weights alone",
    "CosineClassifier": "weights alone",
    "FeatureGate": "weights alone",
    "SinkhornAggregator": "weights alone",
    "MetricLearningHead": "weights alone",
    "StableMax": "holds nothing",
    **dict.fromkeys(("DiscriminativeFeatureEnhancement", "ShrinkMatchHead"), "weights alone"),
    "SSSLoss": "holds nothing",
    "MongeGap": "holds nothing",
    "PatchDiscriminator": "weights alone",
    **dict.fromkeys(("ElasticPenalty", "RepulsionLoss"), "buffers that nothing moves"),
    "ResidualMLP": "weights alone",
    "HeatmapGNN": "a part of UDC",
    "PathConstructor": "a part of UDC",
    "SparseRouter": "holds nothing",
    **dict.fromkeys(
        ("BinaryMask", "LoRAWeight", "LowRank", "SoMAWeight", "SORSAWeight", "SparseScatter"), "a parametrization"
    ),
    "AugSelfHead": "weights alone",
    "SignSupermask": "HideNseek's parametrization, of a fixed weight",
    "RuleOptimizer": "a base",
    "TwoPassOptimizer": "a base",
    **dict.fromkeys(("Ball", "Box", "Simplex", "EntropicSimplex", "Unconstrained"), "a set; its steps are functions"),
    **dict.fromkeys(("STNLinear", "STNConv1d", "STNConv2d", "STNConv3d"), "weights alone"),
    **dict.fromkeys(("STNDropout", "STNDropout2d"), "holds nothing"),
}
"""Classes with `fit`, `forward`, `step`, `update` or `load_state_dict` that no suite need try, and why."""

CALLS = ("fit", "forward", "step", "update", "load_state_dict")


def holders() -> Iterator[str]:
    for area in catalog.Catalog().areas:
        if (Path(trimtab.__file__).parent / area / "__init__.py").is_file():
            module = importlib.import_module(f"trimtab.{area}")
            for name in dir(module):
                if inspect.isclass(found := getattr(module, name)) and any(hasattr(found, call) for call in CALLS):
                    yield name


def test_every_class_with_state_is_in_a_suite() -> None:
    suites = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    forgotten = [name for name in set(holders()) - STATELESS.keys() if not re.search(rf"\b{name}\b", suites)]
    assert not forgotten
