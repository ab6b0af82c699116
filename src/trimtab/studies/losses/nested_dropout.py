"""Do ordered and cut features, alone and with Co-teaching, keep wrong labels out?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from trimtab import losses
from trimtab.nets import Classifier
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.noisy_selection import (
    LR,
    Bench,
    NoisySelection,
    Setting,
    Trained,
    chosen_weight_decay,
    trained_alone,
)
from trimtab.studies.training import predict

symmetric = NoisySelection(kind="symmetric", rate=0.4)
pair_flip = NoisySelection(kind="asymmetric", rate=0.3)

# Four settings for every arm. Those of the networks' pairs are a forget rate and a learning rate.
RATES: tuple[Setting, ...] = ((0.3,), (0.5,), (0.7,), (0.9,))
SIGMAS: tuple[Setting, ...] = ((5.0,), (10.0,), (30.0,), (100.0,))
FROM_SCRATCH: tuple[Setting, ...] = ((0.2, LR), (0.2, LR / 3), (0.4, LR), (0.4, LR / 3))
FROM_TRAINED: tuple[Setting, ...] = ((0.2, LR / 100), (0.2, LR / 5), (0.4, LR / 100), (0.4, LR / 5))


class Cut(NamedTuple):
    """A network whose feature layer ends in nested dropout, and its parts."""

    network: Classifier
    trunk: nn.Module
    layer: losses.NestedDropout


def nested_network(bench: Bench, sigma: float, which: int = 0) -> Cut:
    """A new network with nested dropout in front of its head."""
    network = bench.network(which)
    trunk = network.features
    layer = losses.NestedDropout(network.feature_dim, sigma, generator=bench.trial.generator(10 + which))
    network.features = nn.Sequential(trunk, layer.to(bench.trial.device))
    return Cut(network, trunk, layer)


def choose_length(bench: Bench, *cuts: Cut) -> float:
    """Cut the networks, which vote, at the length where they do best on the held-out images."""
    features = [predict(cut.trunk, bench.x_held) for cut in cuts]
    length = losses.select_truncation(
        losses.truncated_accuracy(features, [cut.network.head for cut in cuts], bench.y_held)
    )
    for cut in cuts:
        cut.layer.set_truncation(length)
    return float(length)


def dropout(bench: Bench, setting: Setting) -> Trained:
    """Dropout in front of the head; the setting is its rate."""
    weight_decay, network = chosen_weight_decay(bench), bench.network()
    network.features = nn.Sequential(network.features, nn.Dropout(setting[0]))
    with torch.random.fork_rng():  # torch's dropout draws from the global state
        torch.manual_seed(bench.trial.seed)
        return trained_alone(bench, network, weight_decay=weight_decay)


def nested(bench: Bench, setting: Setting) -> Trained:
    """Nested dropout; the setting is its width, and after every epoch the length is chosen anew."""
    weight_decay = chosen_weight_decay(bench)
    cut = nested_network(bench, setting[0])
    return trained_alone(bench, cut.network, weight_decay=weight_decay, after_epoch=lambda: choose_length(bench, cut))


def nested_as_published(bench: Bench, setting: Setting) -> Trained:
    """The same with the authors' weight decay."""
    cut = nested_network(bench, setting[0])
    return trained_alone(bench, cut.network, weight_decay=5e-4, after_epoch=lambda: choose_length(bench, cut))


def taught(
    bench: Bench, rule: losses.CoTeaching, epochs: int, after_epoch: Callable[[], float] = lambda: float("nan")
) -> Trained:
    """Run a rule for two networks, their learning rates annealed as those of one are."""
    batch = min(128, len(bench.y))
    steps, order, seconds, features = len(bench.y) // batch, bench.trial.generator(3), 0.0, float("nan")
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(held, epochs * steps) for held in rule.optimizers]
    for epoch in range(epochs):
        rule.set_epoch(epoch)
        started = time.process_time()
        for index in torch.randperm(len(bench.y), generator=order)[: steps * batch].to(bench.x.device).view(-1, batch):
            rule.step(bench.x[index], bench.y[index])
            for schedule in schedules:
                schedule.step()
        seconds += time.process_time() - started
        features = after_epoch()
        bench.watch(rule.predict)
    return Trained(rule.predict, seconds, features)


def optimizers(networks: Sequence[nn.Module], lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """One for each network."""
    return [
        torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay) for network in networks
    ]


def co_teaching(bench: Bench, setting: Setting) -> Trained:
    """Two new networks."""
    forget_rate, lr = setting
    weight_decay = chosen_weight_decay(bench)
    networks = [bench.network(which) for which in range(2)]
    rule = losses.CoTeaching(
        networks,
        optimizers(networks, lr, weight_decay),
        forget_rate=forget_rate,
        rampup_epochs=bench.epochs // 6,
    )
    return taught(bench, rule, bench.epochs)


def nested_co_teaching(bench: Bench, setting: Setting) -> Trained:
    """Two networks with nested dropout, of the width that one alone chooses, for two thirds of the time; then both."""
    forget_rate, lr = setting
    weight_decay, (sigma,) = chosen_weight_decay(bench), bench.chosen(nested, SIGMAS)
    second_stage = max(1, bench.epochs // 3)
    cuts = [nested_network(bench, sigma, which) for which in range(2)]
    networks = [cut.network for cut in cuts]

    def first_stage() -> dict[str, Any]:
        quiet, epochs = bench.quiet(), bench.epochs - second_stage
        seconds = 0.0
        for which, network in enumerate(networks):
            done = trained_alone(quiet, network, weight_decay=weight_decay, epochs=epochs, which=which)
            seconds += done.seconds
        return {"seconds": seconds, "networks": [network.state_dict() for network in networks]}

    # The same for all settings of the second stage.
    first = bench.cached(first_stage, f"nested dropout, {sigma} and {weight_decay}, two thirds")
    for network, state in zip(networks, first["networks"], strict=True):
        network.load_state_dict(state)
    cuts[0].layer.generator = bench.trial.generator(12)  # whether or not the first stage was read back
    choose_length(bench, *cuts)
    rule = losses.NestedCoTeaching(networks, optimizers(networks, lr, weight_decay), forget_rate=forget_rate)
    done = taught(bench, rule, second_stage, lambda: choose_length(bench, *cuts))
    return done._replace(seconds=done.seconds + first["seconds"])


study = Study(
    paper="nested_dropout",
    arms={
        "cross-entropy": symmetric.train(),
        "Dropout": symmetric.train(dropout, RATES),
        "nested dropout": symmetric.train(nested, SIGMAS),
        "Co-teaching": symmetric.train(co_teaching, FROM_SCRATCH),
        "nested Co-teaching": symmetric.train(nested_co_teaching, FROM_TRAINED),
        "cross-entropy, weight decay 5e-4": symmetric.train(settings=((5e-4,),)),
        "nested dropout, weight decay 5e-4": symmetric.train(nested_as_published, SIGMAS),
        "cross-entropy, pair flip": pair_flip.train(),
        "Dropout, pair flip": pair_flip.train(dropout, RATES),
        "nested dropout, pair flip": pair_flip.train(nested, SIGMAS),
        "Co-teaching, pair flip": pair_flip.train(co_teaching, FROM_SCRATCH),
        "nested Co-teaching, pair flip": pair_flip.train(nested_co_teaching, FROM_TRAINED),
    },
    claims=[
        Claim("nested dropout", beats="cross-entropy", on="final_accuracy", by=0.02),
        Claim(
            "nested dropout, weight decay 5e-4",
            beats="cross-entropy, weight decay 5e-4",
            on="final_accuracy",
            by=0.02,
        ),
        Claim("nested dropout", at_most=32, on="features"),
        Claim("nested dropout", beats="Dropout", on="final_accuracy"),
        Claim("nested Co-teaching", beats="nested dropout", on="final_accuracy"),
        Claim("nested Co-teaching", beats="Co-teaching", on="final_accuracy"),
        Claim("nested dropout, pair flip", beats="cross-entropy, pair flip", on="final_accuracy", by=0.02),
        Claim("nested Co-teaching, pair flip", beats="Co-teaching, pair flip", on="final_accuracy"),
    ],
    leaderboard=["cross-entropy", "Dropout", "nested dropout", "Co-teaching", "nested Co-teaching"],
    notes=(
        "4,000 Fashion-MNIST images at half of the resolution; symmetric noise draws 40 % of the labels anew, pair "
        "flips move 30 % to the next class. A fifth of the images is held out with its wrong labels, and all "
        "choices are made on them: the weight decay, one of four for cross-entropy alone and then the same for every "
        "arm; then one of four dropout rates, widths of the distribution of lengths, or pairs of a forget rate and a "
        "learning rate (nested Co-teaching takes the width that nested dropout chose); and the kept length. Two arms "
        "have the authors' weight decay instead, for in a first look (one seed) a strong weight decay did on its own "
        "much of what nested dropout is for. Small CNN with 128 features, SGD, 20 epochs for every network, so that "
        "pairs, which vote, cost twice as much; nested Co-teaching has 14 epochs alone and 6 together. The paper takes "
        "the networks of its second stage from their best epoch on clean validation images; here all are taken as they "
        "end, and no clean label is seen before the test."
    ),
)
