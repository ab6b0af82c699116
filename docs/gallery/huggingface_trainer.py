"""Train with SAM and with ELR under Hugging Face's Trainer.

Two mixins let `transformers.Trainer` train with an optimizer that looks at the gradient twice, and with a loss that
remembers samples by their index. The model is a tiny BERT from a config; a third of the labels are wrong.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from trimtab.losses import ELR, IndexedDataset, IndexedTrainerMixin
from trimtab.optim import SAM, TwoPassTrainerMixin


class SharpnessAwareTrainer(TwoPassTrainerMixin, Trainer):
    """Takes SAM and the like in `optimizers`."""


class NoisyLabelTrainer(IndexedTrainerMixin, Trainer):
    """Takes a loss of (logits, labels, index) as `criterion`."""


torch.manual_seed(0)
tokens = torch.randint(1, 20, (192, 8))
right = (tokens[:, 0] > 10).long()
labels = torch.where(torch.rand(192) < 1 / 3, 1 - right, right)
train = IndexedDataset([{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)])
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
settings = {"per_device_train_batch_size": 32, "num_train_epochs": 8, "report_to": [], "disable_tqdm": True}
accuracy = {}

for name in ("SAM", "ELR"):
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    arguments = TrainingArguments(tempfile.mkdtemp(), remove_unused_columns=name == "SAM", **settings)
    if name == "SAM":
        sam = SAM(optimizer, rho=0.05, model=model)
        trainer = SharpnessAwareTrainer(model, arguments, train_dataset=train, optimizers=(sam, None))
    else:
        criterion = ELR(num_samples=len(train), num_classes=2)
        trainer = NoisyLabelTrainer(
            model, arguments, train_dataset=train, optimizers=(optimizer, None), criterion=criterion
        )
    trainer.train()
    accuracy[name] = (model.eval()(tokens).logits.argmax(1) == right).float().mean().item()
    print(f"{name}: {accuracy[name]:.1%} of the right labels are found")
