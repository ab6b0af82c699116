"""Train on wrong labels.

Two of five training labels are drawn at random. Cross-entropy learns them by heart; early-learning regularisation (ELR)
remembers what the network said of each sample before, and holds it to that.
"""

import torch

import trimtab
from trimtab.losses import ELR, symmetric_noise

data = trimtab.data.load("digits")
noisy = symmetric_noise(data.y_train, 0.4, 10, generator=torch.Generator().manual_seed(0)).targets
accuracy = {}

for name in ("cross-entropy", "ELR"):
    torch.manual_seed(0)
    model = trimtab.nets.mlp(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    elr = ELR(num_samples=len(noisy), num_classes=10)
    for _ in range(60):
        for index in torch.randperm(len(noisy)).split(64):
            logits, labels = model(data.x_train[index]), noisy[index]
            loss = elr(logits, labels, index) if name == "ELR" else torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy[name] = (model(data.x_test).argmax(1) == data.y_test).float().mean().item()
    print(f"{name}: {accuracy[name]:.1%} of the test digits are right")
