"""Open-set retrieval: identities, where a further term acts, and what is searched on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.open_set_retrieval import Embedding, Identities, binomial, clean, wrong_identities


class Constant(nn.Module):
    """A term that is zero whatever the embeddings."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return 0 * embeddings.sum()


def numbers(entrant: Embedding, **options) -> dict[str, float]:
    return {k: v for k, v in clean.run(Trial(**options), entrant).metrics.items() if k != "seconds"}


def test_identities_are_classes_in_three_rotations():
    images = torch.zeros(6, 1, 9, 9)
    images[:, :, 4, 1] = 1.0
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    found = Identities.of(images, y, torch.Generator().manual_seed(0))
    assert torch.equal(found.y // 3, y)
    some = found.only([4, 1])
    assert set(some.y.tolist()) <= {0, 1}
    assert len(some.y) == int(((found.y == 4) | (found.y == 1)).sum())


def test_a_term_of_zero_changes_nothing():
    assert numbers(Embedding(loss=binomial)) == numbers(Embedding(loss=binomial, penalty=lambda plan: Constant()))


def test_a_term_on_the_layer_alone_does_not_reach_the_layers_below():
    class Watch(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            reached.append(_leaves(embeddings.grad_fn))
            return embeddings.square().mean()

    reached: list[int] = []
    clean.run(Trial(), Embedding(loss=binomial, penalty=lambda plan: Watch(), layer_alone=True))
    assert set(reached) == {2}  # the layer's weight and bias
    reached.clear()
    clean.run(Trial(), Embedding(loss=binomial, penalty=lambda plan: Watch()))
    assert min(reached) > 2


def _leaves(node, seen=None) -> int:
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return 0
    seen.add(node)
    return int(hasattr(node, "variable")) + sum(_leaves(before, seen) for before, _ in node.next_functions)


def test_the_search_sees_other_identities_than_training_and_no_test():
    class Count(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            largest.append(int(labels.max()))
            return embeddings.square().mean()

    largest: list[int] = []
    result = clean.run(Trial(searching=True), Embedding(loss=lambda plan: Count()))
    assert max(largest) == 15  # 16 of the 20 seen identities
    assert result.score is not None
    assert not result.metrics


def test_a_share_of_the_labels_is_wrong():
    class Keep(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            kept.append(labels)
            return 0 * embeddings.sum()

    def seen(task) -> Tensor:
        kept.clear()
        task.run(Trial(), Embedding(loss=lambda plan: Keep()))
        return torch.cat(kept)

    kept: list[Tensor] = []
    right, wrong = seen(clean), seen(wrong_identities)
    assert abs(float((right != wrong).float().mean()) - 0.4) < 0.06
