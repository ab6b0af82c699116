"""Train with SAF and AdaBelief in a plain loop.

Two lines change: AdaBelief is an optimizer as any other, and SAF's loss holds the predictions to those of a few epochs
ago. That makes for flat minima, as SAM does, without a second pass over each batch.
"""

import torch

import trimtab
from trimtab.optim import AdaBelief, TrajectoryLoss, sam_sharpness

data = trimtab.data.load("digits")
sharpness, accuracy = {}, {}
for name in ("cross-entropy", "SAF"):
    torch.manual_seed(0)
    model = trimtab.nets.mlp(64)
    optimizer = AdaBelief(model.parameters(), lr=1e-3)
    criterion = TrajectoryLoss(len(data.y_train), 10, lam=0.8 if name == "SAF" else 0.0, start_epoch=3, lag=2)
    for epoch in range(15):
        criterion.set_epoch(epoch)
        for index in torch.randperm(len(data.y_train)).split(64):
            loss = criterion(model(data.x_train[index]), data.y_train[index], index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    on_training_data = lambda model=model: torch.nn.functional.cross_entropy(model(data.x_train), data.y_train)
    sharpness[name] = sam_sharpness(on_training_data, model.parameters(), rho=0.5)
    accuracy[name] = (model(data.x_test).argmax(1) == data.y_test).float().mean().item()
    print(f"{name}: {accuracy[name]:.1%} right, the loss rises by {sharpness[name]:.4f} half a step uphill")
