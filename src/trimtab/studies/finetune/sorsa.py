"""SORSA: faster and better than LoRA and PiSSA at equal rank, with singular vectors that hardly move."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from trimtab.finetune import SORSAConfig, apply_adapter, orthonormality_penalty
from trimtab.nets import Classifier
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.finetune_transfer import FinetuneTransfer, hidden_layers, linear_probe, lora

transfer = FinetuneTransfer()


def sorsa(model: Classifier) -> None:
    """Rank 8, as for the baselines."""
    apply_adapter(model, SORSAConfig(r=8, target_modules=hidden_layers(model)))


def regulariser(model: nn.Module, lr: float) -> Tensor:
    """As the authors train: gamma = 4e-4, over the base learning rate."""
    return 4e-4 / lr * orthonormality_penalty(model)


study = Study(
    paper="sorsa",
    arms={
        "linear probe": transfer.tune(linear_probe),
        "full fine-tuning": transfer.tune(),
        "LoRA": transfer.tune(lora),
        "PiSSA": transfer.tune(partial(lora, init="pissa")),
        "SORSA without regulariser": transfer.tune(sorsa),
        "SORSA": transfer.tune(sorsa, regulariser),
    },
    claims=[
        Claim(
            "SORSA",
            below="LoRA",
            on="steps_to_loss",
            text="SORSA reaches a training loss of 0.1 in fewer steps than LoRA",
        ),
        Claim("SORSA", below="PiSSA", on="steps_to_loss", text="SORSA reaches it in fewer steps than PiSSA"),
        Claim("SORSA", beats="LoRA", on="target_accuracy"),
        Claim("SORSA", beats="PiSSA", on="target_accuracy"),
        Claim("SORSA", beats="full fine-tuning", on="target_accuracy"),
        Claim("SORSA", beats="full fine-tuning", on="retention", text="SORSA forgets less than full fine-tuning"),
        Claim(
            "SORSA",
            below="SORSA without regulariser",
            on="vector_drift",
            text="The regulariser keeps the singular vectors nearer to where they began",
        ),
        Claim(
            "SORSA",
            below="LoRA",
            on="vector_drift",
            text="SORSA moves the singular vectors of its weights less than LoRA",
        ),
    ],
    seeds={"laptop": 5},
    log="y",
    leaderboard=["linear probe", "full fine-tuning", "LoRA", "PiSSA", "SORSA"],
    notes=(
        "The paper fine-tunes Llama 2 7B on mathematics with rank 128; here an MLP goes from upright to rotated digits "
        "with rank 8 (gamma 4e-4 as in the paper). The learning rate of every arm comes from one grid, on validation "
        "data; speed, drift and retention are those of the run so chosen, and hang on its learning rate. LoRA and "
        "PiSSA are peft's."
    ),
)
