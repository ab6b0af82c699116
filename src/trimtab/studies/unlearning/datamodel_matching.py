"""Does matching what a datamodel predicts bring a classifier nearer to a retrained one than ascent and fine-tuning?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.unlearning import (
    LinearDatamodel,
    datamodel_matching,
    klom,
    margins,
    membership_auc,
    oracle_matching,
    predict_without,
    ridge_influences,
    subset_masks,
)

_CLASSES, _HIDDEN, _BATCH = 10, 16, 32
_RATES = (3e-4, 1e-3, 5e-3)
# The matched set is 5 retained samples and 20 repetitions for each one to forget, as the authors have it on CIFAR-10.
_REPEATS = {"retain_multiplier": 5.0, "forget_multiplier": 20.0}


class Stack(nn.Module):
    """Many networks of one hidden layer at once: (batch, 64), or (batch, models, 64), to (batch, models, classes)."""

    def __init__(self, models: int, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(inputs: int, outputs: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(models, inputs, outputs, generator=generator) * 2 - 1) / inputs**0.5)

        self.first, self.second = drawn(64, _HIDDEN), drawn(_HIDDEN, _CLASSES)
        self.first_bias = nn.Parameter(torch.zeros(models, _HIDDEN))
        self.second_bias = nn.Parameter(torch.zeros(models, _CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,mih->bmh" if x.ndim == 2 else "bmi,mih->bmh", x, self.first) + self.first_bias
        return torch.einsum("bmh,mhc->bmc", hidden.relu(), self.second) + self.second_bias


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over models, which then do not know of one another; the mean over samples."""
    flat = targets if targets.ndim == 2 else targets[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), flat.flatten(), reduction="sum") / len(logits)


def train(masks: Tensor, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> Stack:
    """One network for each row of masks, trained on the samples in it, all from their own starts and orders."""
    stack = Stack(len(masks), generator)
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.01)
    drawn = torch.multinomial(masks.float(), steps * _BATCH, replacement=True, generator=generator)
    for rows in drawn.T.split(_BATCH):
        loss = cross_entropy(stack(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return stack


@dataclass(frozen=True)
class Work:
    """Samples, a set to forget, models trained on all, and models trained without it."""

    x: Tensor
    y: Tensor
    unseen: Tensor
    unseen_y: Tensor
    forget: Tensor
    trained: Stack
    retrained: Stack
    steps: int

    @property
    def retained(self) -> Tensor:
        left = torch.ones(len(self.x), dtype=torch.bool)
        left[self.forget] = False
        return left.nonzero()[:, 0]


def samples(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same digits in every run: one datamodel serves all."""
    data = load("digits")
    seen, unseen = trial.pick(smoke=(80, 40), laptop=(300, 200), paper=(1000, 500))
    x, other = data.x_train.flatten(1), data.x_test.flatten(1)
    return x[:seen], data.y_train[:seen], other[:unseen], data.y_test[:unseen]


def work(trial: Trial, stream: int) -> Work:
    """A cluster of one class is to be forgotten; which one, the seed and the stream say."""
    x, y, unseen, unseen_y = samples(trial)
    draws = trial.generator(stream)
    members = (y == (trial.seed + stream) % _CLASSES).nonzero()[:, 0]
    centre = x[members[torch.randint(len(members), (1,), generator=draws)]]
    count = trial.pick(smoke=3, laptop=15, paper=50)
    forget = members[torch.cdist(centre, x[members])[0].argsort()[:count]]
    models, steps = trial.pick(smoke=6, laptop=80, paper=200), trial.pick(smoke=10, laptop=150, paper=600)
    kept = torch.ones(models, len(x), dtype=torch.bool)

    def full() -> dict[str, Tensor]:
        return train(kept, x, y, steps, trial.generator(10)).state_dict()

    def partly() -> dict[str, Tensor]:
        return train(kept.index_fill(1, forget, False), x, y, steps, trial.generator(20 + stream)).state_dict()

    trained, retrained = (Stack(models, trial.generator(99)) for _ in range(2))
    key = f"stack of digit networks, seed {trial.seed}, trained on all"
    trained.load_state_dict(trial.cached(full, key=key))
    retrained.load_state_dict(trial.cached(partly, key=f"{key} but what is to be forgotten, stream {stream}"))
    unlearning_steps = trial.pick(smoke=4, laptop=60, paper=300)
    return Work(x, y, unseen, unseen_y, forget, trained, retrained, unlearning_steps)


def attribution(trial: Trial) -> Tensor:
    """What each training sample adds to the logits at all points, seen and unseen."""
    x, y, unseen, _ = samples(trial)

    def build() -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        masks = subset_masks(len(x), trial.pick(smoke=40, laptop=600, paper=4000), 0.7, generator=draws)
        stack = train(masks, x, y, trial.pick(smoke=10, laptop=150, paper=600), draws)
        with torch.no_grad():
            outputs = stack(torch.cat([x, unseen])).transpose(0, 1)
        return {"coef": LinearDatamodel(alpha=10.0).fit(masks, outputs).coef_.float()}

    return trial.cached(build, key="datamodel of digit networks")["coef"]


Unlearn = Callable[[Work, float, Trial], Callable[[Tensor], Tensor]]
"""Maps the work and a learning rate to what gives the logits of all points, seen and unseen."""


def descend(given: Work, rate: float, trial: Trial, loss: Callable[[Stack, Tensor, Tensor, int], Tensor]) -> Stack:
    """Adam on a loss of samples to forget and retained samples."""
    stack = Stack(len(given.trained.first), trial.generator(99))
    stack.load_state_dict(given.trained.state_dict())
    optimizer, draws = torch.optim.Adam(stack.parameters(), lr=rate), trial.generator(30)
    for step in range(given.steps):
        kept = given.retained[torch.randint(len(given.retained), (_BATCH,), generator=draws)]
        value = loss(stack, given.forget, kept, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return stack


def as_trained(given: Work, rate: float, trial: Trial) -> Stack:
    """Nothing is done."""
    return given.trained


def retrained_again(given: Work, rate: float, trial: Trial) -> Stack:
    """Retrained from other starts: what is left between two sets of models that mean the same."""
    masks = torch.ones(len(given.trained.first), len(given.x), dtype=torch.bool).index_fill(1, given.forget, False)
    steps = trial.pick(smoke=10, laptop=150, paper=600)
    return train(masks, given.x, given.y, steps, trial.generator(40))


def fine_tuning(given: Work, rate: float, trial: Trial) -> Stack:
    """Cross-entropy on retained samples."""
    return descend(given, rate, trial, lambda s, forget, kept, step: cross_entropy(s(given.x[kept]), given.y[kept]))


def ascent(given: Work, rate: float, trial: Trial) -> Stack:
    """Against the gradient of the loss on the forget set; a sixth of the steps, of which more only destroy."""

    def loss(stack: Stack, forget: Tensor, kept: Tensor, step: int) -> Tensor:
        value = cross_entropy(stack(given.x[forget]), given.y[forget])
        return -value if step < given.steps // 6 else 0 * value

    return descend(given, rate, trial, loss)


def scrub(given: Work, rate: float, trial: Trial) -> Stack:
    """Away from the trained model on the forget set, in turn with staying near it on retained samples."""
    teacher = frozen_copy(given.trained)

    def apart(stack: Stack, rows: Tensor) -> Tensor:
        own, other = (part(given.x[rows]).flatten(0, 1) for part in (stack, teacher))
        return tempered_kl(own, other, 4.0).sum() / len(rows)

    def loss(stack: Stack, forget: Tensor, kept: Tensor, step: int) -> Tensor:
        if step % 6 == 0 and step < 2 * given.steps // 3:
            return -apart(stack, forget)
        return 0.99 * cross_entropy(stack(given.x[kept]), given.y[kept]) + 0.001 * apart(stack, kept)

    return descend(given, rate, trial, loss)


def direct(given: Work, rate: float, trial: Trial) -> Callable[[Tensor], Tensor]:
    """The datamodel's own answer, of a model that is not there."""
    coef = attribution(trial)[:, :, None, :]
    return lambda x: predict_without(given.trained(x), coef, given.forget)


def _passes(given: Work) -> int:
    """Epochs that make about as many steps as the other methods take."""
    matched = round(sum(_REPEATS.values()) * len(given.forget))
    return max(1, given.steps // -(-matched // _BATCH))


def matching(given: Work, rate: float, trial: Trial) -> Stack:
    """Datamodel matching."""
    coef = attribution(trial)[:, : len(given.x), None, :]
    options: dict[str, Any] = {
        "epochs": _passes(given),
        "lr": rate,
        "batch_size": _BATCH,
        "generator": trial.generator(30),
    }
    return datamodel_matching(given.trained, given.x, coef, given.forget, **{**_REPEATS, **options})


def oracles(given: Work, rate: float, trial: Trial) -> Stack:
    """The same with the mean outputs of the retrained models themselves; not a method, for they are not there."""
    with torch.no_grad():
        means = given.retrained(given.x).mean(1, keepdim=True).expand(-1, len(given.trained.first), -1)
    options: dict[str, Any] = {
        "epochs": _passes(given),
        "lr": rate,
        "batch_size": _BATCH,
        "generator": trial.generator(30),
    }
    return oracle_matching(given.trained, given.x, means, given.forget, **{**_REPEATS, **options})


@torch.no_grad()
def judged(given: Work, answer: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Divergences of margins from retrained models', and accuracies."""
    points, truth = torch.cat([given.x, given.unseen]), torch.cat([given.y, given.unseen_y])
    logits, wanted = answer(points), given.retrained(points)
    models = truth[:, None].expand(logits.shape[:2])
    apart = klom(margins(logits, models).T, margins(wanted, models).T)
    right = (logits.argmax(-1) == models).double().mean(1)
    unseen = torch.arange(len(given.x), len(points))
    sets = {"forget": given.forget, "retain": given.retained, "validation": unseen}
    found = {f"klom_{name}": float(apart[rows].mean()) for name, rows in sets.items()}
    # What a member's loss betrays, of unlearned models and of retrained ones.
    losses = [F.cross_entropy(z.transpose(1, 2), models, reduction="none").mean(1) for z in (logits, wanted)]
    betrayed = [membership_auc(loss[given.forget], loss[unseen]) for loss in losses]
    return {
        "klom": sum(found.values()) / 3,
        **found,
        "klom_tail": float(apart[given.forget].quantile(0.95)),
        **{f"accuracy_{name}": float(right[rows].mean()) for name, rows in sets.items()},
        "membership": abs(betrayed[0] - betrayed[1]),
    }


def unlearn(trial: Trial, *, by: Unlearn, rates: tuple[float, ...] = _RATES) -> Result:
    """A run: the rate that does best on another set to forget, whose retrained models are known; then the set."""
    tuning = work(trial, 5) if len(rates) > 1 else None
    best = rates[0] if tuning is None else min(rates, key=lambda r: judged(tuning, by(tuning, r, trial))["klom"])
    given = work(trial, 0)
    return Result(judged(given, by(given, best, trial)))


_PENALTY = 1.0


@dataclass(frozen=True)
class Regression:
    """A ridge regression of classes on pixels, and the one without what is to be forgotten, both exact."""

    x: Tensor
    y: Tensor
    points: Tensor
    forget: Tensor
    trained: nn.Linear
    wanted: Tensor
    steps: int

    @property
    def retained(self) -> Tensor:
        """Positions of samples that stay."""
        left = torch.ones(len(self.x), dtype=torch.bool)
        left[self.forget] = False
        return left.nonzero()[:, 0]

    def errors(self, model: nn.Linear, rows: Tensor) -> Tensor:
        """Sum of squares."""
        found: Tensor = (model(self.x[rows]) - self.y[rows]).square().sum()
        return found

    def loss(self, model: nn.Linear) -> Tensor:
        """What the regression of retained samples minimises."""
        return self.errors(model, self.retained) + _PENALTY * model.weight.square().sum()


def regression(trial: Trial, stream: int) -> Regression:
    """A cluster of one class is to be forgotten, as from the networks."""
    x, targets, unseen, _ = samples(trial)
    x, points = (torch.cat([part, torch.ones(len(part), 1)], 1).double() for part in (x, torch.cat([x, unseen])))
    y = F.one_hot(targets, _CLASSES).double()
    members = (targets == (trial.seed + stream) % _CLASSES).nonzero()[:, 0]
    count = trial.pick(smoke=3, laptop=15, paper=50)
    centre = members[torch.randint(len(members), (1,), generator=trial.generator(stream))]
    forget = members[torch.cdist(x[centre], x[members])[0].argsort()[:count]]
    left = torch.ones(len(x), dtype=torch.bool).index_fill(0, forget, False)
    whole, rest = (
        torch.linalg.solve(x[rows].T @ x[rows] + _PENALTY * torch.eye(x.shape[1]).double(), x[rows].T @ y[rows])
        for rows in (torch.ones_like(left), left)
    )
    model = trial.seeded(lambda: nn.Linear(x.shape[1], _CLASSES, bias=False)).double()
    with torch.no_grad():
        model.weight.copy_(whole.T)
    return Regression(x, y, points, forget, model, points @ rest, trial.pick(smoke=5, laptop=50, paper=50))


Step = Callable[[Regression, nn.Linear], Tensor]


def _retained_loss(given: Regression, model: nn.Linear) -> Tensor:
    return given.loss(model)


def _against_forgotten(given: Regression, model: nn.Linear) -> Tensor:
    return -given.errors(model, given.forget)


def _descent_and_ascent(given: Regression, model: nn.Linear) -> Tensor:
    return given.loss(model) - given.errors(model, given.forget)


def by_steps(given: Regression, rate: float, trial: Trial, *, loss: Step) -> nn.Linear:
    """Adam on a loss of all samples at once, at a falling rate as in matching."""
    model = frozen_copy(given.trained).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    anneal = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    for _ in range(given.steps):
        value = loss(given, model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        anneal.step()
    return model


def by_matching(given: Regression, rate: float, trial: Trial) -> nn.Linear:
    """Datamodel matching with influences in closed form, all of its samples in a step."""
    coef = ridge_influences(given.x, given.y, given.x, _PENALTY)
    options: dict[str, Any] = {"epochs": given.steps, "lr": rate, "batch_size": len(given.x) * 20}
    draws = trial.generator(30)
    return datamodel_matching(given.trained, given.x, coef, given.forget, **_REPEATS, **options, generator=draws)


def regress(
    trial: Trial, *, by: Callable[[Regression, float, Trial], nn.Linear], rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
) -> Result:
    """A run: the rate that ends nearest on another set to forget, then the set itself."""

    @torch.no_grad()
    def left(given: Regression, rate: float) -> float:
        with torch.enable_grad():
            model = by(given, rate, trial)
        away, before = (part(given.points) - given.wanted for part in (model, given.trained))
        return float(away.norm() / before.norm())

    tuning, given = regression(trial, 5), regression(trial, 0)
    return Result({"left": left(given, min(rates, key=lambda rate: left(tuning, rate)))})


convex = Experiment(
    "forgetting from a ridge regression",
    {
        "datamodel matching": partial(regress, by=by_matching),
        "fine-tuning on retained": partial(regress, by=partial(by_steps, loss=_retained_loss)),
        "gradient ascent": partial(regress, by=partial(by_steps, loss=_against_forgotten)),
        "descent and ascent": partial(regress, by=partial(by_steps, loss=_descent_and_ascent)),
    },
    {"left": Metric("distance to the retrained outputs left after 50 steps (%)", best="min", percent=True)},
    reads=("digits",),
    cost=0.5,
)

digits = Experiment(
    "forgetting a cluster of digits",
    {
        "datamodel matching": partial(unlearn, by=matching),
        "DM-direct": partial(unlearn, by=direct, rates=(0.0,)),
        "oracle matching": partial(unlearn, by=oracles),
        "SCRUB": partial(unlearn, by=scrub),
        "gradient ascent": partial(unlearn, by=ascent),
        "fine-tuning on retained": partial(unlearn, by=fine_tuning),
        "as trained": partial(unlearn, by=as_trained, rates=(0.0,)),
        "retrained again": partial(unlearn, by=retrained_again, rates=(0.0,)),
    },
    {
        "klom": Metric("KL divergence of margins, mean of the three sets (nats)", best="min"),
        "klom_forget": Metric("KL divergence of margins, forget set (nats)", best="min"),
        "klom_retain": Metric("KL divergence of margins, retained set (nats)", best="min"),
        "klom_validation": Metric("KL divergence of margins, unseen samples (nats)", best="min"),
        "klom_tail": Metric("KL divergence of margins, 95th percentile of the forget set (nats)", best="min"),
        "accuracy_forget": Metric("accuracy on the forget set (%)", best=None, percent=True),
        "accuracy_retain": Metric("accuracy on retained samples (%)", percent=True),
        "accuracy_validation": Metric("accuracy on unseen samples (%)", percent=True),
        "membership": Metric("membership AUC, distance to the retrained models'", best="min"),
    },
    reads=("digits",),
    cost=3.0,
)

study = Study(
    paper="datamodel_matching",
    experiments=[digits, convex],
    headline=Claim("datamodel matching", below="SCRUB", on="klom", at=digits),
    claims=[
        Claim("datamodel matching", below="gradient ascent", on="klom", at=digits),
        Claim("datamodel matching", below="fine-tuning on retained", on="klom", at=digits),
        Claim("datamodel matching", below="SCRUB", on="klom_forget", at=digits),
        Claim("oracle matching", below="datamodel matching", on="klom_forget", at=digits),
        Claim("DM-direct", below="datamodel matching", on="klom", at=digits),
        Claim("datamodel matching", beats="as trained", on="accuracy_validation", by=-0.01, at=digits),
        Claim("datamodel matching", below="as trained", on="membership", at=digits),
        Claim("datamodel matching", below="fine-tuning on retained", on="left", times=2.0, at=convex),
        Claim("datamodel matching", below="descent and ascent", on="left", times=2.0, at=convex),
    ],
    notes="The paper unlearns ResNets on CIFAR-10 and a part of ImageNet, with datamodels of thousands of trainings; "
    "here networks of 16 hidden units see 300 digits of 8 x 8 pixels, a cluster of 15 of one class is forgotten, and "
    "the datamodel is a ridge regression (weight 10, tuned by nobody) over 600 trainings on 70 % of the samples. Each "
    "number compares 80 unlearned networks with 80 retrained ones, and `retrained again` is the floor that so few "
    "leave. All methods take about 60 steps of Adam, gradient ascent a sixth of it, at one of three learning rates, "
    "chosen on another forget set whose retrained networks are known, which favours all alike. SCRUB has its authors' "
    "weights for small sets, and a step away from the trained model in every six of the first two thirds. The same "
    "clusters are forgotten from a ridge regression on pixels, the convex case, in 50 steps of Adam over all samples; "
    "one run of it was seen before the results, and nothing was changed after it.",
)
