"""Train with SAF and AdaBelief under Lightning.

AdaBelief is returned by `configure_optimizers` like any other optimizer. SAF's loss holds the predictions to those of a
few epochs ago: it is told the epoch, and takes the index of each sample from the data set. That makes for flat minima,
as SAM does, without a second pass over each batch.
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import trimtab
from trimtab.optim import AdaBelief, TrajectoryLoss, sam_sharpness

data = trimtab.data.load("digits")
train = TensorDataset(data.x_train, data.y_train, torch.arange(len(data.y_train)))


class Classifier(lightning.LightningModule):
    """A small network with SAF's loss of strength `lam`; without any it is cross-entropy."""

    def __init__(self, lam):
        super().__init__()
        self.model = trimtab.nets.mlp(64)
        self.criterion = TrajectoryLoss(len(train), 10, lam=lam, start_epoch=3, lag=2)

    def on_train_epoch_start(self):
        self.criterion.set_epoch(self.current_epoch)

    def training_step(self, batch, _):
        x, y, index = batch
        return self.criterion(self.model(x), y, index)

    def configure_optimizers(self):
        return AdaBelief(self.parameters(), lr=1e-3)


quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
sharpness, accuracy = {}, {}
for name, lam in {"cross-entropy": 0.0, "SAF": 0.8}.items():
    torch.manual_seed(0)
    classifier = Classifier(lam)
    trainer = lightning.Trainer(max_epochs=15, accelerator="cpu", **quiet)
    trainer.fit(classifier, DataLoader(train, batch_size=64, shuffle=True))
    model = classifier.model.eval()
    on_training_data = lambda model=model: torch.nn.functional.cross_entropy(model(data.x_train), data.y_train)
    sharpness[name] = sam_sharpness(on_training_data, model.parameters(), rho=0.5)
    accuracy[name] = (model(data.x_test).argmax(1) == data.y_test).float().mean().item()
    print(f"{name}: {accuracy[name]:.1%} right, the loss rises by {sharpness[name]:.4f} half a step uphill")
