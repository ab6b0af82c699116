"""UNPG: the filter by hand, the loss against a concatenated softmax, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.metric import MarginSoftmaxLoss, UNPGLoss, pair_scores, unpg_loss, whisker_filter
from trimtab.studies.tools.peak_memory import peak_memory


def batch(seed: int, samples: int = 14, dim: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(classes, (samples,), generator=generator)


def head(kind: str = "arcface", dim: int = 5, classes: int = 4, scale: float = 16.0) -> MarginSoftmaxLoss:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MarginSoftmaxLoss(dim, classes, kind=kind, scale=scale).double()


def kept_similarities(embeddings: Tensor, labels: Tensor, whisker: float) -> Tensor:
    """The filtered negative pairs, as a vector of the length they have."""
    points = embeddings / embeddings.norm(dim=1, keepdim=True)
    pairs = [
        (points[i] * points[j]).sum()
        for i, j in itertools.combinations(range(len(labels)), 2)
        if labels[i] != labels[j]
    ]
    if not pairs:
        return embeddings.new_zeros(0)
    ordered = sorted(float(pair.detach()) for pair in pairs)
    first, third = ordered[int(0.25 * len(ordered))], ordered[int(0.75 * len(ordered))]
    reach = whisker * (third - first) if whisker < math.inf else math.inf
    return torch.stack([pair for pair in pairs if first - reach <= pair <= third + reach])


def concatenated(module: MarginSoftmaxLoss, embeddings: Tensor, labels: Tensor, whisker: float) -> Tensor:
    """The loss with a copy of the pairs in every row, as the paper draws it."""
    extra = module.scale * kept_similarities(embeddings, labels, whisker)
    logits = torch.cat([module.logits(embeddings, labels), extra.expand(len(labels), -1)], dim=1)
    return F.cross_entropy(logits, labels)


class TestFilter:
    def keeps(self, values: list[float], whisker: float) -> list[float]:
        tensor = torch.tensor(values)
        return tensor[whisker_filter(tensor, torch.ones(len(values), dtype=torch.bool), whisker)].tolist()

    def test_by_hand(self):
        assert self.keeps([0, 0, 0, 0, 1], 1.5) == [0, 0, 0, 0]
        # Quartiles at positions 2 and 6 of eight: 2 and 6, not interpolated; the box is 4 long.
        assert self.keeps([7, 0, 1, 2, 3, 4, 5, 6], 0.0) == [2, 3, 4, 5, 6]
        assert self.keeps([7, 0, 1, 2, 3, 4, 5, 6], 0.25) == [7, 1, 2, 3, 4, 5, 6]
        assert self.keeps([3.0], 0.0) == [3.0]

    def test_outliers_go_on_both_sides(self):
        assert self.keeps([-9, 1, 2, 3, 4, 5, 15], 1.5) == [1, 2, 3, 4, 5]

    def test_an_infinite_whisker_keeps_all(self):
        assert self.keeps([0, 0, 0, 0, 1], math.inf) == [0, 0, 0, 0, 1]

    def test_what_is_left_out_moves_no_quartile(self):
        values, among = torch.tensor([50.0, 0, 0, 0, 0, 1, -50]), torch.tensor([False] + [True] * 5 + [False])
        assert whisker_filter(values, among, 1.5).tolist() == [False] + [True] * 4 + [False] * 2
        assert not whisker_filter(values, torch.zeros(7, dtype=torch.bool), 1.5).any()

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.floats(0, 3))
    def test_the_box_itself_always_stays(self, values, whisker):
        kept = self.keeps(values, whisker)
        ordered = torch.tensor(values).sort().values.tolist()
        assert set(ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 1]) <= set(kept)


class TestLoss:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        samples=st.integers(1, 20),
        kind=st.sampled_from(["arcface", "cosface", "softmax"]),
        whisker=st.sampled_from([0.0, 0.5, 1.0, 1.5, math.inf]),
    )
    def test_equals_a_softmax_over_the_concatenation(self, seed, samples, kind, whisker):
        embeddings, labels = batch(seed, samples)
        module = head(kind)
        results = []
        for loss in (UNPGLoss(module, whisker), lambda x, y: concatenated(module, x, y, whisker)):
            leaf = embeddings.clone().requires_grad_()
            value = loss(leaf, labels)
            results.append((value.detach(), *torch.autograd.grad(value, (leaf, module.classifier.weight))))
        torch.testing.assert_close(*results)

    def test_by_hand(self):
        # Two orthogonal samples, each on its class weight: logits (s, 0), one pair of cosine 0.
        logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
        value = unpg_loss(logits, torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]), scale=3.0)
        assert value.tolist() == pytest.approx([math.log((math.exp(3) + 2) / math.exp(3))] * 2)

    def test_one_class_in_the_batch_is_the_head_alone(self):
        embeddings, _ = batch(0)
        labels = torch.full((14,), 2)
        module = head()
        for size in (14, 2, 1):
            leaf = embeddings[:size].clone().requires_grad_()
            value, alone = UNPGLoss(module)(leaf, labels[:size]), module(leaf, labels[:size])
            torch.testing.assert_close(value, alone)
            torch.testing.assert_close(torch.autograd.grad(value, leaf), torch.autograd.grad(alone, leaf))

    def test_pairs_only_add_and_a_longer_whisker_adds_more(self):
        embeddings, labels = batch(1, 20)
        module = head()
        values = [module(embeddings, labels).item()]
        values += [UNPGLoss(module, r)(embeddings, labels).item() for r in (0.0, 0.2, 0.5, math.inf)]
        assert values == sorted(values)
        assert len(set(values)) == len(values)

    def test_the_gradient_pushes_both_samples_of_a_pair_apart(self):
        embeddings = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0]], dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0, 1])
        logits = torch.zeros(2, 2, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(unpg_loss(logits, embeddings, labels).mean(), embeddings)
        moved = (embeddings - 1e-3 * gradient).detach()
        assert gradient.norm(dim=1).min() > 0
        assert pair_scores(moved, labels).similarity < pair_scores(embeddings, labels).similarity
        # An embedding's gradient is tangential, for its length does not matter.
        assert (gradient * embeddings).sum(1).abs().max() < 1e-12

    def test_an_outlier_is_not_pushed(self):
        # Five near-orthogonal classes, and a sixth near the first: that pair is filtered out.
        points = torch.eye(6, dtype=torch.float64) + 0.01 * batch(3, 6, 6)[0]
        points[5] = points[0] + 0.5 * points[1]
        labels, logits = torch.arange(6), torch.zeros(6, 6, dtype=torch.float64)
        apart = {}
        for whisker in (math.inf, 1.5):
            leaf = points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(unpg_loss(logits, leaf, labels, whisker=whisker).mean(), leaf)
            moved = pair_scores(points - 1e-4 * gradient, labels).similarity
            apart[whisker] = (pair_scores(points, labels).similarity - moved)[4].item()
        assert pair_scores(points, labels).similarity[4] > 0.85
        assert apart[math.inf] > 10 * abs(apart[1.5])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32_at_scale_64(self, dtype):
        embeddings, labels = batch(4)
        loss = UNPGLoss(head(scale=64.0).float())
        half = embeddings.to(dtype).requires_grad_()
        value = loss(half, labels)
        value.backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(half.detach().float(), labels))
        assert half.grad.isfinite().all()

    def test_identical_embeddings_of_all_classes_stay_finite(self):
        loss = UNPGLoss(head(scale=64.0).float())
        for x in (torch.ones(8, 5), torch.zeros(8, 5)):
            leaf = x.requires_grad_()
            value = loss(leaf, torch.arange(8) % 4)
            value.backward()
            assert value.isfinite()
            assert leaf.grad.isfinite().all()

    def test_memory_is_not_rows_times_pairs(self):
        embeddings, labels = torch.randn(256, 8), torch.arange(256) % 32
        logits = torch.zeros(256, 32)
        unpg_loss(logits, embeddings, labels)
        pairs = 256 * 255 // 2
        assert peak_memory(lambda: unpg_loss(logits, embeddings, labels)) < 100 * pairs  # bytes; rows * pairs are 33 MB

    def test_any_head_will_do(self):
        class Linear(nn.Module):
            scale = 2.0

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(5, 4).double()

            def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
                return self.layer(embeddings)

        embeddings, labels = batch(5)
        loss = UNPGLoss(Linear())
        assert len(list(loss.parameters())) == 2
        logits = loss.head.layer(embeddings)
        torch.testing.assert_close(loss(embeddings, labels), unpg_loss(logits, embeddings, labels, scale=2.0).mean())

    @pytest.mark.parametrize("kind", ["arcface", "cosface"])
    def test_a_head_of_pytorch_metric_learning_is_ours(self, kind):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        embeddings, labels = batch(6)
        margins = {"arcface": math.degrees(0.5), "cosface": 0.35}
        peer = {"arcface": losses.ArcFaceLoss, "cosface": losses.CosFaceLoss}[kind](
            4, 5, margin=margins[kind], scale=16
        )
        own = head(kind)
        peer = peer.double()
        peer.W.data = own.classifier.weight.data.T.clone()
        results = []
        for loss, weight in ((UNPGLoss(peer), peer.W), (UNPGLoss(own), own.classifier.weight)):
            assert any(p is weight for p in loss.parameters())
            leaf = embeddings.clone().requires_grad_()
            value = loss(leaf, labels)
            of_points, of_weight = torch.autograd.grad(value, (leaf, weight))
            results.append((value.detach(), of_points, of_weight if weight is not peer.W else of_weight.T))
        torch.testing.assert_close(*results)

    def test_other_heads_of_pytorch_metric_learning_are_refused(self):
        package = pytest.importorskip("pytorch_metric_learning")
        from pytorch_metric_learning import losses, regularizers

        assert package
        with pytest.raises(TypeError, match="loss must be an ArcFaceLoss or a CosFaceLoss, got LargeMarginSoftmaxLoss"):
            UNPGLoss(losses.LargeMarginSoftmaxLoss(4, 5))
        with pytest.raises(ValueError, match="loss must be without weight_regularizer"):
            UNPGLoss(losses.ArcFaceLoss(4, 5, weight_regularizer=regularizers.RegularFaceRegularizer()))

    def test_a_miners_negatives_are_the_pairs_that_may_join(self):
        embeddings, labels = batch(7)
        module = head()
        one, other = next((i, j) for i in range(14) for j in range(14) if labels[i] != labels[j])
        anchor, negative = torch.tensor([one]), torch.tensor([other])
        nobody = anchor.new_zeros(0)
        extra = module.scale * torch.cosine_similarity(embeddings[one], embeddings[other], dim=0)
        logits = torch.cat([module.logits(embeddings, labels), extra.expand(14, 1)], dim=1)
        expected = F.cross_entropy(logits, labels)
        for mined in ((nobody, nobody, anchor, negative), (nobody, nobody, negative, anchor)):
            torch.testing.assert_close(UNPGLoss(module)(embeddings, labels, mined), expected)
        everything = (nobody, nobody, *(labels[:, None] != labels).nonzero().unbind(1))
        torch.testing.assert_close(
            UNPGLoss(module)(embeddings, labels, everything), UNPGLoss(module)(embeddings, labels)
        )

    @pytest.mark.parametrize("mined", [False, True])
    def test_references_take_the_place_of_the_batch_in_its_pairs(self, mined):
        embeddings, labels = batch(7)
        refs, ref_labels = batch(8)[0][:5], torch.tensor([0, 1, 2, 3, 0])
        module = head()
        negative = (labels[:, None] != ref_labels).nonzero()
        tuple_, among = None, negative
        if mined:
            among = negative[::3]
            nobody = among.new_zeros(0)
            tuple_ = (nobody, nobody, among[:, 0], among[:, 1])
        cosines = torch.stack([torch.cosine_similarity(embeddings[i], refs[j], dim=0) for i, j in among])
        logits = torch.cat([module.logits(embeddings, labels), (module.scale * cosines).expand(14, -1)], dim=1)
        loss = UNPGLoss(module, whisker=math.inf)
        found = loss(embeddings, labels, tuple_, refs, ref_labels)
        torch.testing.assert_close(found, F.cross_entropy(logits, labels))
        with pytest.raises(ValueError, match="ref_emb and ref_labels must be given together"):
            loss(embeddings, labels, ref_emb=refs)

    def test_bad_arguments_are_named(self):
        with pytest.raises(TypeError, match="head"):
            UNPGLoss(nn.Linear(5, 4))
        for whisker in (-1.0, math.nan):
            with pytest.raises(ValueError, match="whisker"):
                UNPGLoss(head(), whisker=whisker)


def test_one_compiled_loss_serves_batches_of_every_size():
    torch._dynamo.reset()
    loss = UNPGLoss(head())
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for samples in (14, 11, 9, 17, 20):
        embeddings, labels = batch(2, samples)
        torch.testing.assert_close(compiled(embeddings, labels), loss(embeddings, labels))
    assert len(frames) <= 2  # one size, then any size
