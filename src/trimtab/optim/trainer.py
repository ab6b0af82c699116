"""Sharpness-aware minimisation and its kin under `transformers.Trainer`, which steps an optimizer without a closure."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from trimtab.optim.two_pass import TwoPassOptimizer, frozen_norm_stats


class TwoPassTrainerMixin:
    """Lets `transformers.Trainer` train with a two-pass optimizer: put it before `Trainer` among the bases.

    After the last backward pass of a step, of one batch or of several accumulated ones, the weights are perturbed, the
    same batches are evaluated again and the weights go home; `Trainer` then clips the second gradient and steps the
    base optimizer, by whose groups and state schedulers and checkpoints go. Running statistics of batch normalisation
    are those of the first pass; dropout draws new masks in the second. Logged losses are those of the first pass.

    Args:
        args, kwargs: as `Trainer` takes them, with the optimizer in `optimizers=(optimizer, scheduler or None)`.

    Raises:
        TypeError: the optimizer is no `TwoPassOptimizer`, or asks its closure for more than the loss, as TRAM.
        ValueError: the training is in float16, whose gradients are scaled, or under FSDP or DeepSpeed, whose weights
            are in pieces; bfloat16 and distributed data-parallel training are fine.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from trimtab.optim import SAM, TwoPassTrainerMixin
        >>> class SharpnessAwareTrainer(TwoPassTrainerMixin, Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         return (model(inputs["x"]) - inputs["labels"]).square().mean()
        >>> model = nn.Linear(2, 1)
        >>> trainer = SharpnessAwareTrainer(
        ...     model,
        ...     TrainingArguments(tempfile.mkdtemp(), max_steps=3, remove_unused_columns=False, report_to=[]),
        ...     train_dataset=[{"x": torch.ones(2), "labels": torch.zeros(1)}] * 8,
        ...     optimizers=(SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05), None),
        ... )
        >>> trainer.optimizer  # the base steps; trainer.two_pass is SAM
        SGD (...
    """

    args: Any
    accelerator: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.optimizer, TwoPassOptimizer):
            raise TypeError(f"optimizers must begin with a TwoPassOptimizer, got {type(self.optimizer).__name__}")
        if type(self.optimizer).ascend is not TwoPassOptimizer.ascend:
            raise TypeError(
                "optimizers must begin with one whose closure returns the loss alone, "
                f"got {type(self.optimizer).__name__}"
            )
        unfit = {
            "fp16": self.args.fp16,
            "fsdp": getattr(self, "is_fsdp_enabled", False),
            "deepspeed": getattr(self, "is_deepspeed_enabled", False),
        }
        for name, on in unfit.items():
            if on:
                raise ValueError(f"args must be without {name} for {type(self.optimizer).__name__}, got it switched on")
        self.two_pass: TwoPassOptimizer = self.optimizer
        self.optimizer = self.two_pass.base
        self._batches: list[Any] = []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of every trainer; batches of a step that an interrupt has cut off count no more."""
        self._batches = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The first pass of a batch; with the last one of a step, also the second pass of all of them."""
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        except BaseException:
            self._batches = []  # with its gradients, the step that was begun is given up
            raise
        self._batches.append(inputs)
        if self.accelerator.sync_gradients:
            batches, self._batches = self._batches, []
            self.two_pass.perturb()
            try:
                model.zero_grad()
                with frozen_norm_stats(model):
                    for i, batch in enumerate(batches, 1):
                        with nullcontext() if i == len(batches) else self.accelerator.no_sync(model):
                            super().training_step(model, batch, num_items_in_batch)  # type: ignore[misc]
            finally:
                self.two_pass.restore()
        return loss
