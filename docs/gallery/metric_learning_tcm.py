"""Learn a metric with pytorch-metric-learning's parts and ours.

UNPG takes the ArcFace head of pytorch-metric-learning, and TCM stands beside it in `MultipleLosses` with a miner of its
own, alone or with a memory of past batches. The embedding learns the digits 0 to 4 and is tested on 5 to 9: how many
find a digit of their own class first, and how far thresholds differ between classes (OPIS).
"""

import torch
from pytorch_metric_learning.losses import ArcFaceLoss, CrossBatchMemory, MultipleLosses
from pytorch_metric_learning.miners import MultiSimilarityMiner

import trimtab
from trimtab.metric import ThresholdConsistentMarginLoss, UNPGLoss, opis, recall_at_k

data = trimtab.data.load("digits")
seen, unseen = data.y_train < 5, data.y_test >= 5
x, y = data.x_train[seen], data.y_train[seen]
recall = {}


class Memory(CrossBatchMemory):
    """`CrossBatchMemory` refuses losses that are not on its list."""

    @staticmethod
    def supported_losses():
        return ["ThresholdConsistentMarginLoss"]


for name in ("ArcFace + UNPG", "with TCM", "with TCM over a memory"):
    torch.manual_seed(0)
    model = trimtab.nets.mlp(64, num_classes=16)
    head = UNPGLoss(ArcFaceLoss(num_classes=5, embedding_size=16, margin=20, scale=16))
    tcm, miner = ThresholdConsistentMarginLoss(), MultiSimilarityMiner()
    criterion = {
        "ArcFace + UNPG": head,
        "with TCM": MultipleLosses([head, tcm], miners=[None, miner]),
        "with TCM over a memory": MultipleLosses([head, Memory(tcm, embedding_size=16, memory_size=256, miner=miner)]),
    }[name]
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-3)
    for _ in range(15):
        for index in torch.randperm(len(y)).split(64):
            loss = criterion(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        embeddings, labels = model.eval()(data.x_test[unseen]), data.y_test[unseen]
    recall[name] = recall_at_k(embeddings, labels)
    print(f"{name}: recall@1 {recall[name]:.1%}, threshold inconsistency {float(opis(embeddings, labels)):.4f}")
