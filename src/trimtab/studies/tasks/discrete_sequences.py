"""Models of short discrete sequences: samples against evaluations, likelihood against evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.diffusion import ancestral
from trimtab.generative import any_order_log_prob, any_order_loss
from trimtab.nets import MADE, MaskedMLP
from trimtab.ops.ordering import draw, scores_of
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.markov import MarkovChain
from trimtab.studies.tools.sample_quality import frechet_distance, knn_recall

Sample = Callable[[int, int, torch.Generator], Tensor]
"""Maps a number of sequences, the network evaluations that each may cost, and randomness to tokens."""
LogProb = Callable[[Tensor, torch.Generator], Tensor]
"""Maps tokens to log-probabilities, or bounds from below that hold on average."""


@dataclass(frozen=True)
class Fitted:
    """What a contestant has learnt.

    Attributes:
        sample: makes sequences.
        log_prob: tells how likely sequences are.
        networks: whose evaluations count.
        fewest: evaluations below which it makes no samples.
    """

    sample: Sample
    log_prob: LogProb
    networks: Sequence[nn.Module]
    fewest: int = 1


@dataclass(frozen=True)
class Lesson:
    """What a contestant learns from.

    Attributes:
        tokens: sequences.
        num_values: values of a token.
        steps: training steps of `batch_size` sequences through a network that its training may take.
        trial: source of random draws, of the setting, and of trained parts that are kept.
    """

    tokens: Tensor
    num_values: int
    steps: int
    trial: Trial
    batch_size: int = 128

    @property
    def length(self) -> int:
        """Of the sequences."""
        return self.tokens.shape[1]

    def network(self, kind: type[MaskedMLP] | type[MADE], stream: int = 0) -> MaskedMLP | MADE:
        """A new network of the size that all have."""
        return self.trial.seeded(lambda: kind(self.length, self.num_values), stream)

    def optimizer(self, parameters: Any, lr: float | None = None) -> torch.optim.Optimizer:
        """AdamW at the setting's rate, or another."""
        rate = float(self.trial.setting.get("lr", 2e-3)) if lr is None else lr
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)

    def batches(self, steps: int, stream: int = 0) -> Iterator[Tensor]:
        """Batches of random sequences."""
        generator = self.trial.generator(100 + stream)
        for _ in range(steps):
            yield self.tokens[torch.randint(len(self.tokens), (self.batch_size,), generator=generator)]

    def train(
        self, network: nn.Module, loss: Callable[[Tensor], Tensor], steps: int, stream: int = 0, lr: float | None = None
    ) -> nn.Module:
        """Train a network by a loss of batches, the rate annealed to 0; it is given back in eval mode."""
        descend(self.optimizer(network.parameters(), lr), loss, self.batches(steps, stream), anneal=steps)
        return network.eval()

    def kept(self, what: str, network: nn.Module, train: Callable[[], nn.Module]) -> nn.Module:
        """A trained network that contestants share: trained once for a seed and a setting, and read back."""

        def weights() -> dict[str, Tensor]:
            return train().state_dict()

        at = f"{self.length} x {self.num_values}, {len(self.tokens)} sequences, {self.steps} steps"
        key = f"{what}, {at}, seed {self.trial.seed}, {dict(self.trial.setting)}"
        network.load_state_dict(self.trial.cached(weights, key=key))
        return network.eval()


def masked_network(lesson: Lesson, steps: int | None = None) -> MaskedMLP:
    """A masked model, trained in the count form."""
    network, generator = lesson.network(MaskedMLP), lesson.trial.generator(1)
    steps = lesson.steps if steps is None else steps

    def train() -> nn.Module:
        return lesson.train(
            network, lambda batch: any_order_loss(network, batch, network.mask_id, generator=generator).mean(), steps
        )

    lesson.kept(f"masked model of {steps} steps", network, train)
    return network  # type: ignore[return-value]


def autoregressive_network(lesson: Lesson, steps: int | None = None) -> MADE:
    """A model that goes from left to right, trained by maximum likelihood."""
    network = lesson.network(MADE)
    steps = lesson.steps if steps is None else steps

    def train() -> nn.Module:
        return lesson.train(network, lambda batch: -sequence_log_prob(network, batch).mean(), steps)

    lesson.kept(f"autoregressive model of {steps} steps", network, train)
    return network  # type: ignore[return-value]


def sequence_log_prob(network: nn.Module, tokens: Tensor) -> Tensor:
    """The log-likelihood of sequences under a model that goes from left to right."""
    scores: Tensor = network(tokens).log_softmax(2)
    return scores.gather(2, tokens.unsqueeze(2)).squeeze(2).sum(1)


def masked_log_prob(network: MaskedMLP, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The log-likelihood in a random order: on average a bound from below, in an evaluation a token."""
    return any_order_log_prob(network, tokens, network.mask_id, generator=generator)


def blank(network: MaskedMLP | MADE, count: int) -> Tensor:
    """Sequences of which nothing is known."""
    return torch.full((count, network.length), network.mask_id)


@torch.no_grad()
def left_to_right(network: MADE, count: int, generator: torch.Generator) -> Tensor:
    """Samples of a model that goes from left to right, in an evaluation a token."""
    tokens = blank(network, count)
    for place in range(network.length):
        tokens[:, place] = draw(network(tokens)[:, place], generator=generator)
    return tokens


@torch.no_grad()
def most_confident_first(network: MaskedMLP, count: int, evaluations: int, generator: torch.Generator) -> Tensor:
    """Draw all masked positions, keep those whose draw is most probable, as many as a cosine schedule says, and repeat.

    Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022, arXiv 2202.04200, without its temperature.
    """
    tokens, length = blank(network, count), network.length
    steps = min(evaluations, length)
    for step in range(1, steps + 1):
        scores = scores_of(network, tokens, network.mask_id).log_softmax(2)
        drawn, hidden = draw(scores, generator=generator), tokens == network.mask_id
        confidence = scores.gather(2, drawn.unsqueeze(2)).squeeze(2).masked_fill(~hidden, math.inf)
        left = math.floor(length * math.cos(math.pi / 2 * step / steps)) if step < steps else 0
        left = min(left, int(hidden[0].sum()) - 1)
        kept = confidence.argsort(1, descending=True).argsort(1) < length - left
        tokens = torch.where(kept & hidden, drawn, tokens)
    return tokens


def autoregressive(lesson: Lesson) -> Fitted:
    """From left to right."""
    network = autoregressive_network(lesson)
    return Fitted(
        lambda count, evaluations, generator: left_to_right(network, count, generator),
        lambda tokens, generator: sequence_log_prob(network, tokens),
        [network],
        fewest=lesson.length,
    )


def masked_ancestral(lesson: Lesson) -> Fitted:
    """Masked diffusion with the usual sampler, of as many steps as evaluations."""
    network = masked_network(lesson)
    return Fitted(
        lambda count, evaluations, generator: ancestral(
            network, blank(network, count), network.mask_id, steps=evaluations, generator=generator
        ),
        partial(masked_log_prob, network),
        [network],
    )


def masked_confident(lesson: Lesson) -> Fitted:
    """A masked model that reveals first what it is surest of."""
    network = masked_network(lesson)
    return Fitted(partial(most_confident_first, network), partial(masked_log_prob, network), [network])


@dataclass(frozen=True, kw_only=True)
class SequenceModel(Entrant):
    """What a contestant of discrete sequences brings.

    Attributes:
        fit: learns from a lesson, within its steps.
    """

    fit: Callable[[Lesson], Fitted]


@dataclass(frozen=True)
class DiscreteSequences(Task[SequenceModel]):
    """Model discrete sequences: real ones, digits of 8 x 8 black or white pixels, or those of a Markov chain.

    All have networks of one width and depth and the same number of training steps, 1,000 of 128 sequences; a contestant
    may divide them between networks, and chooses among four settings: two of each were added when most of the first lay
    at an end. Samples are judged by the Fréchet distance of their moments, all pairs of
    positions included, to those of the data (for the chain exact), at an evaluation a token and at a quarter of that;
    likelihoods on sequences that nobody has seen. An evaluation is a call of a network for a batch.

    Attributes:
        source: "digits" or "chain".
    """

    source: str = "digits"

    name: ClassVar[str] = "discrete-sequences"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "frechet": Metric("Frechet distance of samples, an evaluation a token", best="min"),
        "frechet_few": Metric("Frechet distance of samples, an evaluation for four tokens", best="min"),
        "nll": Metric("held-out negative log-likelihood (nats per token)", best="min"),
        "likelihood_evaluations": Metric("evaluations for a likelihood", best="min"),
        "precision": Metric("precision of samples (%)", percent=True),
        "recall": Metric("recall of samples (%)", percent=True),
        "surprise": Metric("surprise of samples, above the data's (nats per token)", best=None),
    }
    accepts: ClassVar[type[SequenceModel]] = SequenceModel
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 10}
    cost: ClassVar[float] = 4.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"binary digits": binary_digits, "Markov chain": markov_chain}

    @classmethod
    def references(cls) -> Mapping[str, SequenceModel]:
        return {
            "autoregressive": SequenceModel(fit=autoregressive),
            "masked, ancestral": SequenceModel(fit=masked_ancestral),
            "masked, most confident first": SequenceModel(fit=masked_confident),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("digits",) if self.source == "digits" else ()

    def run(self, trial: Trial, entrant: SequenceModel) -> Result:
        lesson, unseen, truth = lesson_of(trial, self.source)
        fitted = entrant.fit(lesson)
        trial.report(0.7)
        count = trial.pick(smoke=100, laptop=1000, paper=10_000)
        budgets = [lesson.length // share for share in (8, 4, 2, 1)]
        budgets = [evaluations for evaluations in budgets if evaluations >= fitted.fewest]
        made = {}
        for evaluations in budgets[-1:] if trial.searching else budgets:
            used, made[evaluations] = counted(
                fitted.networks, partial(fitted.sample, count, evaluations, trial.generator(3))
            )
            if used > evaluations:
                raise RuntimeError(f"a sample may cost {evaluations} evaluations, and took {used}")
        frechet = {evaluations: truth.frechet(tokens) for evaluations, tokens in made.items()}
        if trial.searching:
            return Result(score=-frechet[lesson.length])
        with torch.no_grad():
            used, log_prob = counted(fitted.networks, partial(fitted.log_prob, unseen, trial.generator(4)))
        few = lesson.length // 4
        return Result(
            {
                "frechet": frechet[lesson.length],
                **({"frechet_few": frechet[few]} if few in frechet else {}),
                "nll": float(-log_prob.double().mean()) / lesson.length,
                "likelihood_evaluations": float(used),
                **truth.further(made[lesson.length], unseen),
            },
            curves={"frechet": Curve(budgets, list(frechet.values()), x_label="evaluations")},
            pictures={"samples": truth.picture(made[lesson.length][:40])},
        )


@dataclass(frozen=True)
class Truth:
    """What samples are judged by.

    Attributes:
        mean, cov: of the data's indicators.
        num_values: values of a token.
        chain: where the data are its.
    """

    mean: Tensor
    cov: Tensor
    num_values: int
    chain: MarkovChain | None = None

    def frechet(self, tokens: Tensor) -> float:
        """The Fréchet distance of the moments of samples to the data's."""
        return frechet_distance(indicators(tokens, self.num_values), self.mean, self.cov)

    def further(self, tokens: Tensor, unseen: Tensor) -> dict[str, float]:
        """How precise samples are and how much they cover; for a chain, how surprising they are."""
        if self.chain is not None:
            surprise = float(-self.chain.log_prob(tokens).mean()) - self.chain.entropy
            return {"surprise": surprise / tokens.shape[1]}
        own, other = (indicators(part, self.num_values) for part in (tokens, unseen))
        return {"precision": knn_recall(other, own), "recall": knn_recall(own, other)}

    def picture(self, tokens: Tensor) -> Picture:
        """Digits in a grid; sequences of a chain as rows."""
        if self.chain is None:
            return Picture.grid(tokens.view(-1, 8, 8).float())
        return Picture.of(tokens / (self.num_values - 1))


def indicators(tokens: Tensor, num_values: int) -> Tensor:
    """Indicators of all values but the last (of all but the first, where there are two), flat."""
    if num_values == 2:
        return tokens.double()
    return F.one_hot(tokens, num_values)[:, :, :-1].flatten(1).double()


def counted(networks: Sequence[nn.Module], act: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """How often networks are called in an act, and what it gives."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [network.register_forward_hook(count) for network in networks]
    try:
        found = act()
    finally:
        for hook in hooks:
            hook.remove()
    return calls, found


def lesson_of(trial: Trial, source: str) -> tuple[Lesson, Tensor, Truth]:
    """The lesson of a run, the sequences that nobody sees, and what samples are judged by.

    While settings are tried, digits are judged by a part of the training set that is held out for that.
    """
    steps = trial.pick(smoke=20, laptop=1000, paper=20_000)
    if source == "chain":
        chain = MarkovChain.random(6, length=24)
        tokens = chain.sample(trial.pick(smoke=500, laptop=20_000, paper=100_000), generator=trial.generator(10))
        unseen = chain.sample(trial.pick(smoke=100, laptop=1000, paper=5000), generator=trial.generator(11))
        return Lesson(tokens, 6, steps, trial), unseen, Truth(*chain.moments, 6, chain)
    data = load("digits")
    train, test = ((part.flatten(1) >= 0.5).long() for part in (data.x_train, data.x_test))
    if trial.searching:
        train, test = train[: 3 * len(train) // 4], train[3 * len(train) // 4 :]
    held = test.double()
    return Lesson(train, 2, steps, trial), test, Truth(held.mean(0), torch.cov(held.T), 2)


binary_digits = DiscreteSequences()
markov_chain = DiscreteSequences(source="chain")
