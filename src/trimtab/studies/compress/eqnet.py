"""EQ-Net: is one network, cut to the bits that are wanted, as good as one trained for just these bits?

The paper trains ResNets and MobileNets on ImageNet for 120 epochs; here a CNN of 15,000 weights, trained on
Fashion-MNIST before, is made elastic in 75 steps of three passes each, 225 passes, for 2, 3, 4 and 8 bits together. LSQ
takes 150 passes for each number of bits, 600 for all of them. Every contestant takes the better of two rates, of which
0.001 is the authors'; mixed bits are cut from a network trained at that one. Steps by output channel and symmetric
forms are cut out, with the statistics of batch normalisation taken anew; the weights of both losses are the authors'.
LSQ by channel has the same steps, so that the headline does not rest on them. Where several cuts share a trained
network, its time counts for the first of them. Mixed bits are chosen by a predictor fitted to 40 sub-networks on 1,000
held-out images; by chance is the best of 40 by an unfitted one. One trial run of a seed outside of the study looked at
EQ-Net's time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from trimtab import compress
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.compress_classifier import CompressClassifier, Compression, four_bits, two_bits
from trimtab.studies.tools.compressing import CompressionData, Target, fine_tune
from trimtab.studies.tools.trained_once import trained_once
from trimtab.studies.tools.training import accuracy

BITS = (2, 3, 4, 8)
"""What one network serves; four networks of LSQ would take four times the steps."""


def supernet(
    model: Classifier, data: CompressionData, ends: int, trial: Trial, *, alpha: float = 0.5, distribution: float = 1.0
) -> nn.Module:
    """Train one network for all numbers of bits, in half of LSQ's steps of three passes each."""
    lr = float(trial.setting.get("lr", 1e-3))
    small = compress.prepare_elastic(model, data.sample, BITS, ends=ends)
    steps, images = max(1, data.steps // 2), data.images

    def train() -> None:
        optimizer = torch.optim.Adam(small.parameters(), lr=lr)
        rule = compress.EQNet(small, optimizer, alpha=alpha, distribution=distribution, generator=trial.generator(5))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = trial.generator(11)
        for _ in range(steps):
            index = torch.randint(len(images.y), (data.batch_size,), generator=order).to(images.y.device)
            rule.step(images.x[index], images.y[index])
            schedule.step()

    return trained_once(trial, small, train, key=f"eqnet {data.key} {ends} {alpha} {distribution} {lr}")


def elastic(
    model: Classifier,
    data: CompressionData,
    target: Target,
    trial: Trial,
    *,
    alpha: float = 0.5,
    distribution: float = 1.0,
    per_channel: bool = True,
) -> nn.Module:
    """The sub-network of the target's bits, its statistics taken anew."""
    small = supernet(model, data, target.ends, trial, alpha=alpha, distribution=distribution)
    compress.set_config(small, compress.uniform_config(small, target.bits, per_channel=per_channel))
    compress.recalibrate_bn(small, data.images.x[:1024].split(256))
    return small.eval()


def learned_by_channel(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """LSQ with a step for each output channel, as EQ-Net is cut, for the target's bits alone."""
    weight = partial(compress.LSQWeight, per_channel=True)
    small = compress.prepare_quantized(model, data.sample, target.bits, weight=weight, ends=target.ends)
    fine_tune(small, data, trial)
    return small


MEAN_BITS = 3.0


def mixed(trial: Trial, *, how: str) -> Result:
    """Cut a sub-network of three bits on average from the elastic one, and test it."""
    images = four_bits.images(trial)
    small = supernet(four_bits.trained(images, trial), four_bits.data(images, trial), 8, trial)
    draws = trial.generator(9)

    def cut(config: compress.ElasticConfig, x: Tensor, y: Tensor) -> float:
        compress.set_config(small, config)
        compress.recalibrate_bn(small, images.x[:512].split(256))
        return accuracy(small, x, y)

    layers = len(compress.elastic_layers(small))
    predictor = trial.seeded(lambda: compress.AccuracyPredictor(layers, BITS, hidden=100))
    rounds = 0
    if how == "searched":
        count, rounds = trial.pick(smoke=(4, 2), laptop=(40, 30), paper=(1000, 500))
        configs = [compress.sample_config(small, generator=draws) for _ in range(count)]
        held = images.x_held[:1000], images.y_held[:1000]
        reached = torch.tensor([cut(config, *held) for config in configs])
        compress.fit_predictor(predictor, configs, reached, steps=trial.pick(smoke=20, laptop=300, paper=3000))
    if how == "uniform":
        config = compress.uniform_config(small, int(MEAN_BITS))
    else:
        config, _ = compress.search_config(predictor, MEAN_BITS, population=40, rounds=rounds, generator=draws)
    return Result({"accuracy": cut(config, images.x_test, images.y_test), "mean_bits": config.mean_bits})


mixed_bits = Experiment(
    "three bits on average",
    {
        "bits searched for": partial(mixed, how="searched"),
        "the same bits everywhere": partial(mixed, how="uniform"),
        "bits by chance": partial(mixed, how="random"),
    },
    {"accuracy": Metric("test accuracy (%)", percent=True), "mean_bits": Metric("bits on average", best=None)},
    reads=("fashion_mnist",),
    cost=5.0,
)


def other_bits(task: CompressClassifier) -> str:
    """Why it cannot enter a variant."""
    return "" if task.bits in (2, 3, 4, 8) else "its one network is trained for 2, 3, 4 and 8 bits"


study = Study(
    paper="eqnet",
    entrants={"EQ-Net": Compression(compress=elastic, unfit=other_bits)},
    controls={
        "LSQ by channel": Compression(compress=learned_by_channel),
        "EQ-Net without guidance": Compression(compress=partial(elastic, alpha=0.0)),
        "EQ-Net without the shape of weights": Compression(compress=partial(elastic, distribution=0.0)),
        "EQ-Net per tensor": Compression(compress=partial(elastic, per_channel=False)),
    },
    on=[four_bits, two_bits],
    experiments=[mixed_bits],
    headline=Claim("EQ-Net", beats="LSQ by channel", on="accuracy", by=-0.01, at=four_bits),
    claims=[
        Claim("EQ-Net", beats="round to nearest", on="accuracy", by=0.01, at=four_bits),
        Claim("LSQ by channel", beats="EQ-Net", on="accuracy", at=two_bits),
        Claim("EQ-Net", beats="round to nearest", on="accuracy", by=0.1, at=two_bits),
        Claim("EQ-Net", beats="EQ-Net without guidance", on="accuracy", at=two_bits),
        Claim("EQ-Net", beats="EQ-Net without the shape of weights", on="accuracy", at=two_bits),
        Claim("EQ-Net", beats="EQ-Net per tensor", on="accuracy", at=two_bits),
        Claim("EQ-Net", beats="filter pruning", on="accuracy", at=four_bits),
        Claim("bits searched for", beats="the same bits everywhere", on="accuracy", at=mixed_bits),
        Claim("bits searched for", beats="bits by chance", on="accuracy", by=0.01, at=mixed_bits),
    ],
)
