"""FWSVD: does weighing rows by Fisher information keep more of a language model than a plain SVD of equal rank?

The paper compresses BERT-sized models on GLUE by a third of their parameters or so; here a transformer of 110,000
weights on characters keeps a quarter or a half of its matrices, every one at the same share. A window of 32 characters
is one sample of the Fisher information, on 256 windows. The paper's code was not released; the rows and the root follow
its formula as public work applies it. Quantised rivals keep 4 or 8 of 16 bits a weight. Rank by rank, both hidden
layers of a network on small Fashion-MNIST images are factorised, by the Fisher information of a thousand images; a rank
of 64 or more would save nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import nets
from trimtab.compress.fwsvd import Rows, compress_linear, fisher_information, linear_layers, row_importance
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.compress_transformer import (
    Commission,
    Shrinking,
    block_layers,
    to_a_half,
    to_a_quarter,
    window_losses,
)
from trimtab.studies.tools import baselines
from trimtab.studies.tools.images import Images, some_clothes
from trimtab.studies.tools.trained_once import trained_once
from trimtab.studies.tools.training import Training, accuracy, fitted

RANKS = (2, 4, 6, 8, 12, 16, 24)
Importance = dict[str, Tensor]


# --- a language model -------------------------------------------------------------------------------------------------


def fwsvd(commission: Commission, rows: Rows = "input", per_sample: bool = True) -> nn.Module:
    """Fisher information of 256 training windows, each a sample."""
    model, layers = commission.model, block_layers(commission.model)
    x, y = commission.calibration(commission.trial.pick(smoke=16, laptop=256, paper=4_000))
    batches = list(zip(x.split(32), y.split(32), strict=True))
    fisher = fisher_information(model, window_losses, batches, layers, per_sample=per_sample)
    importance = {name: row_importance(found, rows) for name, found in fisher.items()}
    return compress_linear(model, importance, ratio=commission.share, layers=layers, rows=rows)[0]


def by_outputs(commission: Commission) -> nn.Module:
    """The other sum."""
    return fwsvd(commission, rows="output")


def by_batches(commission: Commission) -> nn.Module:
    """Squares of the gradients of whole batches."""
    return fwsvd(commission, per_sample=False)


# --- a network on images, rank by rank --------------------------------------------------------------------------------


def trained_further(trial: Trial, images: Images, network: nn.Module, epochs: int, lr: float) -> None:
    """In place, by Adam."""
    adam, samples = Training(optimizer=baselines.adam), (images.x, images.y)
    fitted(trial, adam, network, samples, num_classes=images.num_classes, epochs=epochs, lr=lr, batch_size=64)


def trained(trial: Trial, images: Images) -> nn.Module:
    """Two hidden layers of 128."""
    network = trial.seeded(lambda: nets.mlp(images.x[0].numel(), (128, 128), images.num_classes)).to(trial.device)
    epochs = trial.pick(smoke=2, laptop=10, paper=50)
    key = f"fwsvd images {len(images.x)} for {epochs} epochs seed {trial.seed}"
    return trained_once(trial, network, lambda: trained_further(trial, images, network, epochs, 2e-3), key=key).eval()


def unweighted(network: nn.Module, images: Images, layers: list[str]) -> None:
    """All rows count alike."""
    return


def by_fisher(rows: Rows, network: nn.Module, images: Images, layers: list[str]) -> Importance:
    """What the loss of a thousand training images says."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    batches = list(zip(images.x[:1000].split(100), images.y[:1000].split(100), strict=True))
    fisher = fisher_information(network, losses, batches, layers)
    return {name: row_importance(found, rows) for name, found in fisher.items()}


@torch.no_grad()
def by_activations(network: nn.Module, images: Images, layers: list[str]) -> Importance:
    """The root mean square of what comes into each layer, on the same images."""
    sizes = Importance()

    def watch(name: str, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sizes[name] = arguments[0].square().mean(0).sqrt()

    handles = [network.get_submodule(name).register_forward_pre_hook(partial(watch, name)) for name in layers]
    network(images.x[:1000])
    for handle in handles:
        handle.remove()
    return sizes


def swept(weigh: Callable[[nn.Module, Images, list[str]], Importance | None], rows: Rows, trial: Trial) -> Result:
    """Both hidden layers at each rank: the accuracy at once, and after one epoch more."""
    images = some_clothes(trial)
    network = trained(trial, images)
    layers = [name for name in linear_layers(network) if name != "head"]
    importance = weigh(network, images, layers)
    whole = sum(float(layer.weight.detach().square().sum()) for layer in linear_layers(network, layers).values())
    at_once, later, errors = [], [], []
    for n, rank in enumerate(RANKS):
        small, report = compress_linear(network, importance, rank=rank, layers=layers, rows=rows)
        at_once.append(accuracy(small, images.x_test, images.y_test))
        errors.append(sum(report.errors.values()) / whole)
        tuned = copy.deepcopy(small)
        trained_further(trial, images, tuned, 1, 1e-3)
        later.append(accuracy(tuned, images.x_test, images.y_test))
        trial.report((n + 1) / len(RANKS))
    return Result(
        {
            "accuracy": sum(at_once) / len(RANKS),
            "accuracy_4": at_once[RANKS.index(4)],
            "tuned_accuracy": sum(later) / len(RANKS),
            "weight_error": sum(errors) / len(RANKS),
            "whole_accuracy": accuracy(network, images.x_test, images.y_test),
        },
        {
            "accuracy": Curve(list(RANKS), at_once, "rank"),
            "tuned_accuracy": Curve(list(RANKS), later, "rank"),
            "weight_error": Curve(list(RANKS), errors, "rank"),
        },
    )


sweep = Experiment(
    name="rank by rank",
    arms={
        "FWSVD": partial(swept, partial(by_fisher, "input"), "input"),
        "rows are outputs": partial(swept, partial(by_fisher, "output"), "output"),
        "activation-weighted": partial(swept, by_activations, "input"),
        "unweighted": partial(swept, unweighted, "input"),
    },
    metrics={
        "accuracy": Metric("accuracy at once, mean over ranks (%)", percent=True),
        "accuracy_4": Metric("accuracy at once at rank 4 (%)", percent=True),
        "tuned_accuracy": Metric("accuracy after an epoch more, mean over ranks (%)", percent=True),
        "weight_error": Metric("squared error of the weights, mean over ranks (%)", best="min", percent=True),
        "whole_accuracy": Metric("accuracy of the whole network (%)", percent=True),
    },
    reads=("digits", "fashion_mnist"),
    cost=3.0,
)

study = Study(
    paper="fwsvd",
    entrants={"FWSVD": Shrinking(compress=fwsvd)},
    controls={
        "FWSVD, rows are outputs": Shrinking(compress=by_outputs),
        "FWSVD, gradients of batches": Shrinking(compress=by_batches),
    },
    on=[to_a_quarter, to_a_half],
    experiments=[sweep],
    headline=Claim("FWSVD", below="plain SVD", on="one_shot_loss", by=0.1, at=to_a_quarter),
    claims=[
        Claim("FWSVD", below="plain SVD", on="test_loss", by=0.01, at=to_a_quarter),
        Claim("FWSVD", below="activation-weighted SVD", on="one_shot_loss", at=to_a_quarter),
        Claim("FWSVD", below="FWSVD, rows are outputs", on="one_shot_loss", at=to_a_quarter),
        Claim("FWSVD", below="FWSVD, gradients of batches", on="one_shot_loss", at=to_a_quarter),
        Claim("FWSVD", below="plain SVD", on="one_shot_loss", by=0.02, at=to_a_half),
        Claim("FWSVD", below="magnitude pruning", on="one_shot_loss", at=to_a_half),
        Claim("FWSVD", below="round to nearest", on="test_loss", at=to_a_quarter),
        Claim("FWSVD", beats="unweighted", on="accuracy", by=0.01, at=sweep),
        Claim("FWSVD", beats="unweighted", on="tuned_accuracy", at=sweep),
        Claim("FWSVD", beats="activation-weighted", on="accuracy", at=sweep),
        Claim("FWSVD", beats="rows are outputs", on="accuracy", at=sweep),
    ],
)
