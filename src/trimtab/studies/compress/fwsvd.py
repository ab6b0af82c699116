"""FWSVD: does weighing rows by Fisher information keep more of a language model than a plain SVD of equal rank?"""

from __future__ import annotations

from torch import nn

from trimtab.compress.fwsvd import Rows, compress_linear, fisher_information, row_importance
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.compress_transformer import (
    Commission,
    Shrinking,
    block_layers,
    to_a_half,
    to_a_quarter,
    window_losses,
)


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


study = Study(
    paper="fwsvd",
    entrants={"FWSVD": Shrinking(compress=fwsvd)},
    controls={
        "FWSVD, rows are outputs": Shrinking(compress=by_outputs),
        "FWSVD, gradients of batches": Shrinking(compress=by_batches),
    },
    on=[to_a_quarter, to_a_half],
    headline=Claim("FWSVD", below="plain SVD", on="one_shot_loss", by=0.1, at=to_a_quarter),
    claims=[
        Claim("plain SVD", below="FWSVD", on="weight_error", by=0.01, at=to_a_quarter),
        Claim("FWSVD", below="plain SVD", on="test_loss", by=0.01, at=to_a_quarter),
        Claim("FWSVD", below="activation-weighted SVD", on="one_shot_loss", at=to_a_quarter),
        Claim("FWSVD", below="FWSVD, rows are outputs", on="one_shot_loss", at=to_a_quarter),
        Claim("FWSVD", below="FWSVD, gradients of batches", on="one_shot_loss", at=to_a_quarter),
        Claim("FWSVD", below="plain SVD", on="one_shot_loss", by=0.02, at=to_a_half),
        Claim("FWSVD", below="magnitude pruning", on="one_shot_loss", at=to_a_half),
        Claim("FWSVD", below="round to nearest", on="test_loss", at=to_a_quarter),
    ],
    notes=(
        "The paper compresses BERT-sized models on GLUE by a third of their parameters or so; here a transformer of "
        "110,000 weights on characters keeps a quarter or a half of its matrices, every one at the same share. A "
        "window of 32 characters is one sample of the Fisher information, on 256 windows. The paper's code was not "
        "released; the rows and the root follow its formula as public work applies it. Quantised rivals keep 4 or 8 of "
        "16 bits a weight."
    ),
)
