"""Losses that remember samples, `loss(logits, targets, index)`, under `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

# Beside a checkpoint's model.safetensors.
_FILE = "criterion.pt"


class IndexedDataset(Dataset[dict[str, Any]]):
    """A dataset of dictionaries, each with its position as `index`.

    A `datasets.Dataset` does not need it: `dataset.add_column("index", range(len(dataset)))`.

    Args:
        dataset: of dictionaries, with a length.

    Example:
        >>> IndexedDataset([{"labels": 3}, {"labels": 5}])[1]
        {'labels': 5, 'index': 1}
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[position], "index": position}


class IndexedTrainerMixin:
    """Lets `transformers.Trainer` train with a loss that remembers samples: put it before `Trainer` among the bases.

    In training, the model's `logits` meet `labels` and `index` in the criterion; its `set_epoch`, where it has one, is
    called as epochs begin. Evaluation uses the model's own loss, for its samples have no place in the memory. The
    criterion's memory is saved with each checkpoint, and read again where training is resumed. Move the criterion to
    the device that its memory is to live on, as in any loop; on several processes give it `repeats="mean"`, since
    `Trainer` fills up the last batches with samples that came before.

    Args:
        args, kwargs: as `Trainer` takes them; the data have a column `index`, for instance by `IndexedDataset`.
        criterion: the loss, a module called `criterion(logits, labels, index)`.

    Raises:
        ValueError: `args.remove_unused_columns` is set, by which `Trainer` drops `index`, or a batch has no `index`.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> from trimtab.losses import ELR, IndexedDataset, IndexedTrainerMixin
        >>> class NoisyLabelTrainer(IndexedTrainerMixin, Trainer):
        ...     pass
        >>> data = IndexedDataset([{"input_ids": [1, 2, 3], "labels": i % 2} for i in range(8)])
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> trainer = NoisyLabelTrainer(
        ...     BertForSequenceClassification(BertConfig(vocab_size=9, **size)),
        ...     TrainingArguments(tempfile.mkdtemp(), max_steps=3, remove_unused_columns=False, report_to=[]),
        ...     train_dataset=data,
        ...     criterion=ELR(num_samples=len(data), num_classes=2),
        ... )
    """

    args: Any
    state: Any

    def __init__(self, *args: Any, criterion: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError("args.remove_unused_columns must be False, or index does not reach the loss, got True")
        self.criterion = criterion
        # The criterion's mean is over a batch; by this Trainer takes the mean over those of one step.
        self.model_accepts_loss_kwargs = False
        self._epoch: int | None = None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The criterion's loss in training mode, and the model's own in evaluation."""
        inputs = dict(inputs)
        index = inputs.pop("index", None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        if index is None:
            raise ValueError(f"train_dataset must have a column index, got {sorted(inputs)}")
        set_epoch = getattr(self.criterion, "set_epoch", None)
        if (epoch := int(self.state.epoch or 0)) != self._epoch and set_epoch is not None:
            set_epoch(epoch)
        self._epoch = epoch
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.criterion(outputs.logits, labels, index)
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model as `Trainer` saves it, and the criterion's memory beside it."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.args.should_save:
            torch.save(self.criterion.state_dict(), Path(output_dir or self.args.output_dir) / _FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        saved = torch.load(Path(resume_from_checkpoint) / _FILE, weights_only=True, map_location="cpu")
        self.criterion.load_state_dict(saved)
