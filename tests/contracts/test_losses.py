"""The contract of every loss: what a user of PyTorch may rely on without reading its paper."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from trimtab import diffusion, domain, federated, losses, metric, optim, robust
from trimtab.ops.sample_memory import Repeats

BATCH, CLASSES, SAMPLES = 6, 4, 50
EXTREME = 1e4
Sample = tuple[Tensor, ...]


def labelled_logits(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Arguments of a plain classification loss; the one to differentiate comes first."""
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, CLASSES, generator=generator, dtype=torch.float64) * 2
    return logits.to(dtype), torch.randint(CLASSES, (batch,), generator=generator)


def log_ratios(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Log-ratios of data and of samples of a reference."""
    logits, _ = labelled_logits(batch, dtype)
    return logits[:, 0], logits[:, 1]


def attacked_logits(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Logits at attacked inputs, labels, and logits before the attack."""
    logits, targets = labelled_logits(batch, dtype)
    return logits, targets, logits.flip(0) + 0.5


def indexed_logits(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Arguments of a loss that remembers samples."""
    generator = torch.Generator().manual_seed(batch)
    return *labelled_logits(batch, dtype), torch.randperm(SAMPLES, generator=generator)[:batch]


def binary_scores(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Arguments of a binary loss that draws at random: scores within the margin, labels, and the draw."""
    logits, targets = labelled_logits(batch, dtype)
    return logits[:, :1].tanh(), targets[:, None] % 2, logits[:, 1]


def bagged_predictions(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Arguments of a loss on bags: predictions, one response a bag (as many as samples: some bags are empty), bags."""
    logits, _ = labelled_logits(batch, dtype)
    return logits[:, 0], logits[:, 1].sigmoid(), torch.arange(batch) // 2


def labelled_embeddings(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Arguments of a metric loss, with pairs that share a label where there are at least two samples."""
    return labelled_logits(batch, dtype)[0], torch.arange(batch) % 2


def labelled_regression(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Features, labels in close pairs, and predictions that confuse them."""
    return labelled_logits(batch, dtype)[0], (torch.arange(batch) // 2 * 3).to(dtype), torch.zeros(batch, dtype=dtype)


def two_modalities(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Joint logits, those of each of two modalities, and labels."""
    logits, targets = labelled_logits(batch, dtype)
    return logits, torch.stack([logits.flip(1), logits.roll(1, 1)], dim=1), targets


def image_text_pairs(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Embeddings of images and of their texts."""
    logits, _ = labelled_logits(batch, dtype)
    return logits, logits.flip(1) + 0.5 * logits


def views_of_pictures(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Pixel logits, label maps and features of two views of a batch, and the positions of its samples."""
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(2, batch, CLASSES, 3, 2, generator=generator, dtype=torch.float64) * 2
    features = torch.randn(2, batch, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (2, batch, 3, 2), generator=generator)
    return *logits.to(dtype), *targets, *features.to(dtype), torch.randperm(SAMPLES, generator=generator)[:batch]


def pictures_at_scales(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Pixel logits at two scales, and label maps."""
    first, second, targets, *_ = views_of_pictures(batch, dtype)
    return torch.stack([first, second], dim=1), targets


def label_maps(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Logits of every pixel, and masks."""
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, CLASSES, 5, 4, generator=generator, dtype=torch.float64) * 2
    return logits.to(dtype), torch.randint(CLASSES, (batch, 5, 4), generator=generator)


def partly_labelled_maps(batch: int, dtype: torch.dtype = torch.float32) -> Sample:
    """Logits of every pixel, masks in which some pixels have no label, and a teacher's probabilities."""
    logits, targets = label_maps(batch, dtype)
    targets[:, ::2, 1:] = 255
    return logits, targets, logits.flip(1).softmax(1)


@dataclass(frozen=True)
class Member:
    """A loss under contract.

    Attributes:
        make: builds it.
        sample: `sample(batch, dtype)` gives its arguments, batch first in each, the differentiated one in front.
        separable: the loss of a batch is the mean of its samples' losses, so that data-parallel ranks average to it.
        exempt: names of tests that do not apply, each with the reason.
    """

    make: Callable[[], nn.Module]
    sample: Callable[..., Sample] = labelled_logits
    separable: bool = True
    exempt: Mapping[str, str] = field(default_factory=dict)


def _pskd(**options: Any) -> nn.Module:
    loss = losses.PSKD(SAMPLES, CLASSES, total_epochs=10, **options)
    loss.set_epoch(4)
    return loss


def _trajectory(repeats: Repeats = "refuse") -> nn.Module:
    """In an epoch in which all samples have a past."""
    loss = optim.TrajectoryLoss(SAMPLES, CLASSES, start_epoch=1, lag=1, dtype=torch.float32, repeats=repeats)
    loss.set_epoch(2)
    loss.memory.rows[:, 1] = labelled_logits(SAMPLES)[0]
    return loss


def _head(make: Callable[..., nn.Module], **options: object) -> nn.Module:
    """A loss with class weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(CLASSES, CLASSES, **options)


RESPONSES_OF_BAGS = {
    "test_wrong_shapes_are_refused_by_name_before_anything_changes": "there may be any number of bags",
    "test_order_of_the_batch_does_not_matter": "responses are in the order of bags, not of samples",
}

RATIOS = {
    "test_wrong_shapes_are_refused_by_name_before_anything_changes": "the reference may have any number of samples"
}
MEMBERS = {
    "DDOLoss": Member(lambda: diffusion.DDOLoss(2.0, 0.5), log_ratios, exempt=RATIOS),
    "AAERLoss": Member(
        lambda: robust.AAERLoss(lam3=0.5),
        attacked_logits,
        separable=False,
        exempt={"test_gradient_agrees_with_finite_differences": "parts of it are constants to the gradient"},
    ),
    "AAERLoss(movement left out)": Member(
        lambda: robust.AAERLoss(0.5, 0.5, 0.0, ce_grad=True), attacked_logits, separable=False
    ),
    "MarginControlLoss": Member(lambda: federated.MarginControlLoss(0.5), separable=False),
    "MarginControlLoss(sample)": Member(lambda: federated.MarginControlLoss(0.5, "sample")),
    "HIASTLoss": Member(domain.HIASTLoss, partly_labelled_maps, separable=False),
    "ELR": Member(lambda: losses.ELR(SAMPLES, CLASSES), indexed_logits),
    "PSKD": Member(_pskd, indexed_logits),
    "LDRKL": Member(losses.LDRKL),
    "ALDRKL": Member(lambda: losses.ALDRKL(SAMPLES, CLASSES), indexed_logits),
    "CompSumLoss": Member(lambda: losses.CompSumLoss(tau=1.7)),
    "CompSumLoss(tau=0)": Member(lambda: losses.CompSumLoss(tau=0.0)),
    "TrajectoryLoss": Member(_trajectory, indexed_logits),
    "StableMaxCrossEntropyLoss": Member(optim.StableMaxCrossEntropyLoss),
    "EnsLoss": Member(losses.EnsLoss, binary_scores, separable=False),
    "ConRLoss": Member(losses.ConRLoss, labelled_regression, separable=False),
    "ConRLoss(linear, source)": Member(
        lambda: losses.ConRLoss(push="linear", denominator="source"), labelled_regression, separable=False
    ),
    "AdaWAC": Member(lambda: losses.AdaWAC(SAMPLES), views_of_pictures, separable=False),
    "MultiScaleConsistencyLoss": Member(lambda: losses.MultiScaleConsistencyLoss(rho=0.0), pictures_at_scales),
    "AsymmetricLearning": Member(lambda: losses.AsymmetricLearning(warmup_epochs=0), two_modalities),
    "AggregateLoss": Member(
        lambda: losses.AggregateLoss(0.3), bagged_predictions, separable=False, exempt=RESPONSES_OF_BAGS
    ),
    "AggregateLoss(bce)": Member(
        lambda: losses.AggregateLoss(0.3, "bce"), bagged_predictions, separable=False, exempt=RESPONSES_OF_BAGS
    ),
    "MarginSoftmaxLoss(arcface)": Member(lambda: _head(metric.MarginSoftmaxLoss), labelled_embeddings),
    "MarginSoftmaxLoss(cosface)": Member(lambda: _head(metric.MarginSoftmaxLoss, kind="cosface"), labelled_embeddings),
    "NACLLoss": Member(lambda: losses.NACLLoss(CLASSES), label_maps),
    "NACLLoss(gaussian, l2, softmax)": Member(
        lambda: losses.NACLLoss(CLASSES, kernel="gaussian", distance="l2", on="softmax", padding="replicate"),
        label_maps,
    ),
    "NACLLoss(median)": Member(lambda: losses.NACLLoss(CLASSES, kernel="median", padding="ignore"), label_maps),
    "SVLSLoss": Member(lambda: losses.SVLSLoss(CLASSES), label_maps),
    "MagFaceLoss": Member(lambda: _head(metric.MagFaceLoss, lengths=(1.0, 8.0)), labelled_embeddings),
    "UNPGLoss(magface)": Member(
        lambda: metric.UNPGLoss(_head(metric.MagFaceLoss, lengths=(1.0, 8.0))), labelled_embeddings, separable=False
    ),
    "SFaceLoss": Member(
        lambda: _head(metric.SFaceLoss),
        labelled_embeddings,
        exempt={"test_gradient_agrees_with_finite_differences": "its strengths are constants to the gradient"},
    ),
    "UNPGLoss": Member(lambda: metric.UNPGLoss(_head(metric.MarginSoftmaxLoss)), labelled_embeddings, separable=False),
    "ThresholdConsistentMarginLoss": Member(metric.ThresholdConsistentMarginLoss, labelled_embeddings, separable=False),
    "EnergyConfusion": Member(metric.EnergyConfusion, labelled_embeddings, separable=False),
    "EnergyConfusion(squared=False, log=True)": Member(
        lambda: metric.EnergyConfusion(squared=False, log=True), labelled_embeddings, separable=False
    ),
    "BinomialDevianceLoss": Member(metric.BinomialDevianceLoss, labelled_embeddings, separable=False),
    "CrossModalAlignmentLoss": Member(metric.CrossModalAlignmentLoss, image_text_pairs, separable=False),
    "DirectionalDistributionLoss": Member(
        lambda: diffusion.DirectionalDistributionLoss(torch.ones(CLASSES)), image_text_pairs
    ),
    "ECAMLLoss": Member(lambda: metric.ECAMLLoss(metric.BinomialDevianceLoss()), labelled_embeddings, separable=False),
}


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    chosen = MEMBERS[request.param]
    if reason := chosen.exempt.get(request.node.originalname):
        pytest.skip(reason)
    return chosen


def visited(member: Member, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A loss whose memory, if it has one, is no longer blank."""
    loss = member.make().to(dtype)
    for batch in (BATCH, BATCH + 1):
        loss(*member.sample(batch, dtype))
    return loss


def value_and_gradient(loss: nn.Module, arguments: Sample) -> tuple[Tensor, Tensor]:
    first = arguments[0].detach().clone().requires_grad_()
    value = loss(first, *arguments[1:])
    (gradient,) = torch.autograd.grad(value, first)
    return value.detach(), gradient


def test_returns_a_scalar_with_a_gradient(member: Member) -> None:
    arguments = member.sample(BATCH)
    value, gradient = value_and_gradient(visited(member), arguments)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert gradient.shape == arguments[0].shape
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_gradient_agrees_with_finite_differences(member: Member) -> None:
    # In eval mode, for in training mode the memory would move between the evaluations.
    loss = visited(member, torch.float64).eval()
    first, *rest = member.sample(BATCH, torch.float64)
    assert torch.autograd.gradcheck(lambda z: loss(z, *rest), first.requires_grad_())


def test_large_values_stay_finite(member: Member) -> None:
    for sign in (1.0, -1.0):
        first, *rest = member.sample(BATCH)
        for extreme in (first.sign() * EXTREME * sign, torch.full_like(first, EXTREME * sign)):
            loss = visited(member)
            for _ in range(2):  # the second visit meets a memory of extreme predictions
                value, gradient = value_and_gradient(loss, (extreme, *rest))
                assert value.isfinite()
                assert gradient.isfinite().all()


def test_bfloat16_under_autocast_is_close_to_float32(member: Member) -> None:
    first, *rest = member.sample(BATCH)
    first = first.bfloat16()
    expected, gradient = value_and_gradient(visited(member), (first.float(), *rest))
    loss = visited(member)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, half_gradient = value_and_gradient(loss, (first, *rest))
    torch.testing.assert_close(value.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(half_gradient.float(), gradient, rtol=5e-2, atol=1e-2)


def test_batch_of_one(member: Member) -> None:
    value, gradient = value_and_gradient(visited(member), member.sample(1))
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_empty_batch_is_refused(member: Member) -> None:
    with pytest.raises(ValueError, match=r"empty|at least one"):
        member.make()(*(argument[:0] for argument in member.sample(BATCH)))


def test_wrong_shapes_are_refused_by_name_before_anything_changes(member: Member) -> None:
    loss = visited(member)
    arguments = member.sample(BATCH)
    names = list(inspect.signature(loss.forward).parameters)
    before = copy.deepcopy(loss.state_dict())
    for position in range(len(arguments)):
        for spoilt in (arguments[position][:-1], arguments[position][..., None]):
            with pytest.raises(ValueError, match="|".join(names)):
                loss(*arguments[:position], spoilt, *arguments[position + 1 :])
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)


def test_integer_input_is_refused(member: Member) -> None:
    first, *rest = member.sample(BATCH)
    with pytest.raises(TypeError):
        member.make()(first.long(), *rest)


def test_order_of_the_batch_does_not_matter(member: Member) -> None:
    arguments = member.sample(BATCH, torch.float64)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    loss, shuffled = visited(member, torch.float64), visited(member, torch.float64)
    value, gradient = value_and_gradient(loss, arguments)
    other, other_gradient = value_and_gradient(shuffled, tuple(argument[order] for argument in arguments))
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(other_gradient, gradient[order])
    torch.testing.assert_close(shuffled.state_dict(), loss.state_dict())


def test_compiles_without_graph_breaks(member: Member) -> None:
    arguments = member.sample(BATCH)
    loss, compiled = visited(member), torch.compile(visited(member), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, arguments), value_and_gradient(loss, arguments))


@pytest.mark.parametrize("transform", ["value", "gradient"])
def test_vmap_is_a_loop(member: Member, transform: str) -> None:
    # An ensemble's losses at once; in eval mode, for a memory cannot hold what several lanes write.
    loss = visited(member).eval()
    called = loss if transform == "value" else torch.func.grad(lambda *given: loss(*given))
    lanes = [torch.stack([value, value.flip(0)]) for value in member.sample(BATCH)]
    expected = torch.stack([called(*(lane[k] for lane in lanes)) for k in range(2)])
    torch.testing.assert_close(torch.func.vmap(called, randomness="same")(*lanes), expected)


def test_state_dict_round_trip_continues_exactly(member: Member) -> None:
    loss = visited(member)
    copied = member.make()
    copied.load_state_dict(loss.state_dict())
    arguments = member.sample(BATCH)
    torch.testing.assert_close(copied(*arguments), loss(*arguments), rtol=0, atol=0)
    torch.testing.assert_close(copied.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_memory_takes_no_gradient(member: Member) -> None:
    loss = visited(member)
    assert not any(buffer.requires_grad for buffer in loss.buffers())
    assert all(buffer.grad_fn is None for buffer in loss.buffers())


INDEXED = [name for name, member in MEMBERS.items() if "index" in inspect.signature(member.make().forward).parameters]


@pytest.mark.parametrize("name", INDEXED)
def test_bad_indices_are_refused_before_anything_changes(name: str) -> None:
    loss = visited(MEMBERS[name])
    *others, index = MEMBERS[name].sample(BATCH)
    before = copy.deepcopy(loss.state_dict())
    for spoilt, error in (
        (index.clone().index_fill_(0, torch.tensor([1]), SAMPLES), ValueError),
        (index.clone().index_fill_(0, torch.tensor([1]), -1), ValueError),
        (index.clone().index_copy_(0, torch.tensor([1]), index[:1]), ValueError),
        (index.float(), TypeError),
    ):
        with pytest.raises(error, match="index"):
            loss(*others, spoilt)
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)


TARGETS = ("targets", "targets_1", "targets_2", "bag_index")  # of a metric loss, labels only tell samples apart
LABELLED = [
    name
    for name, member in MEMBERS.items()
    if any(
        argument in TARGETS and not value.is_floating_point()
        for argument, value in zip(
            inspect.signature(member.make().forward).parameters, member.sample(BATCH), strict=False
        )
    )
]
IGNORED = {name: -100 for name in MEMBERS if name.startswith(("NACL", "SVLS", "MultiScale"))}  # pixels to leave out
HEADS = ("MarginSoftmaxLoss", "SFaceLoss", "MagFaceLoss", "UNPGLoss")


@pytest.mark.parametrize("name", LABELLED)
def test_labels_out_of_range_are_refused_before_anything_changes(name: str) -> None:
    loss = visited(MEMBERS[name])
    arguments = MEMBERS[name].sample(BATCH)
    before = copy.deepcopy(loss.state_dict())
    for position, argument in enumerate(inspect.signature(loss.forward).parameters):
        if argument not in TARGETS:
            continue
        for wrong in {CLASSES + 3, -1, -100, -5} - {IGNORED.get(name)}:
            spoilt = arguments[position].clone()
            spoilt.view(-1)[1] = wrong
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                loss(*arguments[:position], spoilt, *arguments[position + 1 :])
            every = torch.full_like(spoilt, wrong)
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                loss(*arguments[:position], every, *arguments[position + 1 :])
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["LDRKL", "CompSumLoss", "MarginControlLoss", "NACLLoss"])
def test_a_label_out_of_range_in_one_lane_of_vmap_is_refused(name: str) -> None:
    logits, targets = MEMBERS[name].sample(BATCH)
    lanes = torch.stack([targets, targets])
    lanes[1].view(-1)[0] = CLASSES
    with pytest.raises(ValueError, match="targets must be"):
        torch.func.vmap(MEMBERS[name].make(), in_dims=(None, 0))(logits, lanes)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name.startswith(HEADS)])
def test_heads_refuse_labels_out_of_range(name: str) -> None:
    loss = MEMBERS[name].make()
    embeddings, labels = MEMBERS[name].sample(BATCH)
    for wrong in (CLASSES, -1, -100):
        with pytest.raises(ValueError, match="labels must be"):
            loss(embeddings, labels.index_fill(0, torch.tensor([1]), wrong))


def test_arrays_are_refused_by_name(member: Member) -> None:
    loss = visited(member)
    arguments = member.sample(BATCH)
    before = copy.deepcopy(loss.state_dict())
    for position, name in enumerate(list(inspect.signature(loss.forward).parameters)[: len(arguments)]):
        with pytest.raises(TypeError, match=name):
            loss(*arguments[:position], arguments[position].numpy(), *arguments[position + 1 :])
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)


def test_float64_is_kept(member: Member) -> None:
    value, gradient = value_and_gradient(visited(member, torch.float64), member.sample(BATCH, torch.float64))
    assert value.dtype == torch.float64
    expected, _ = value_and_gradient(visited(member), member.sample(BATCH))
    torch.testing.assert_close(value.float(), expected, rtol=1e-3, atol=1e-4)
    assert gradient.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_spoils_nothing(member: Member, bad: float) -> None:
    loss = visited(member)
    first, *rest = member.sample(BATCH)
    for spoilt in (torch.full_like(first, bad), first.index_fill(0, torch.tensor([1]), bad)):
        with contextlib.suppress(ValueError):
            loss(spoilt, *rest)
    assert all(value.isfinite().all() for value in loss.state_dict().values() if value.is_floating_point()) or any(
        value.isinf().any() for value in visited(member).state_dict().values()
    )
    assert not any(value.isnan().any() for value in loss.state_dict().values())
    value, gradient = value_and_gradient(loss, (first, *rest))
    assert value.isfinite()
    assert gradient.isfinite().all()


REMEMBERING = {
    "ELR": lambda: losses.ELR(SAMPLES, CLASSES, repeats="mean"),
    "PSKD": lambda: _pskd(repeats="mean"),
    "ALDRKL": lambda: losses.ALDRKL(SAMPLES, CLASSES, repeats="mean"),
    "AdaWAC": lambda: losses.AdaWAC(SAMPLES, repeats="mean"),
    "TrajectoryLoss": lambda: _trajectory(repeats="mean"),
}


@pytest.mark.parametrize("name", ["EnsLoss", "PSKD", "TrajectoryLoss"])
def test_no_epoch_is_before_the_first(name: str) -> None:
    loss = MEMBERS[name].make()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    with pytest.raises(ValueError, match="epoch must be"):
        loss.set_epoch(-1)
    torch.testing.assert_close(loss.state_dict(), before, equal_nan=True)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_sample_that_comes_twice_alike_counts_as_once(name: str) -> None:
    once, twice = REMEMBERING[name](), REMEMBERING[name]()
    arguments = MEMBERS[name].sample(BATCH)
    positions = torch.tensor([*range(BATCH), 2, 2, 0])
    for _ in range(2):
        once(*arguments)
        twice(*(argument[positions] for argument in arguments))
    torch.testing.assert_close(twice.state_dict(), once.state_dict())


@pytest.mark.parametrize("name", INDEXED)
def test_rows_of_other_samples_stay(name: str) -> None:
    loss = visited(MEMBERS[name])
    arguments = MEMBERS[name].sample(BATCH)
    before = loss.memory.rows.clone()
    loss(*arguments)
    others = torch.ones(SAMPLES, dtype=torch.bool).index_fill_(0, arguments[-1], False)
    assert torch.equal(loss.memory.rows[others], before[others])
    assert not torch.equal(loss.memory.rows[~others], before[~others])


@pytest.mark.parametrize("name", INDEXED)
def test_eval_mode_leaves_the_memory(name: str) -> None:
    loss = visited(MEMBERS[name]).eval()
    before = loss.memory.rows.clone()
    loss(*MEMBERS[name].sample(BATCH))
    assert torch.equal(loss.memory.rows, before)


def _rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seen = {}
    for name, member in MEMBERS.items():
        loss = member.make()
        for batch in (BATCH, BATCH + 2):
            half = slice(rank * batch // 2, (rank + 1) * batch // 2)
            part = tuple(argument[half] for argument in member.sample(batch))
            value, gradient = value_and_gradient(loss, part)
        before, refused = copy.deepcopy(loss.state_dict()), []
        if name in INDEXED:
            *others, index = part
            # The same samples on both ranks; an index out of range on the second alone.
            for bad in (torch.arange(len(index)), index + rank * SAMPLES):
                try:
                    loss(*others, bad)
                except ValueError as error:
                    refused.append(str(error))
            for key, kept in before.items():
                assert torch.equal(kept, loss.state_dict()[key]), f"{name} changed {key} before it refused"
            # Batches of unequal size, four samples and three.
            arguments = member.sample(7)
            loss(*(argument[:4] if rank == 0 else argument[4:] for argument in arguments))
        seen[name] = (value, gradient, before, refused, loss.state_dict())
    torch.save(seen, f"{out}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's tear-down can wait for ever for a rank that has left already


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[Any, ...]]]:
    """Every member after two steps on two processes; one pair of processes serves them all."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(f"{folder}/store", folder), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if member.separable])
def test_two_processes_equal_one(ranks: list[dict[str, tuple[Any, ...]]], name: str) -> None:
    loss = MEMBERS[name].make()
    for batch in (BATCH, BATCH + 2):
        value, gradient = value_and_gradient(loss, MEMBERS[name].sample(batch))
    parts = [rank[name] for rank in ranks]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, value)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]) / 2, gradient)
    for part in parts:
        torch.testing.assert_close(part[2], dict(loss.state_dict()))


@pytest.mark.parametrize("name", INDEXED)
def test_what_is_refused_on_one_rank_is_refused_on_all(ranks: list[dict[str, tuple[Any, ...]]], name: str) -> None:
    for rank in ranks:
        repeated, out_of_range = rank[name][3]
        assert "index" in repeated
        assert "index" in out_of_range


@pytest.mark.parametrize("name", INDEXED)
def test_unequal_batches_on_two_processes_fill_one_memory(ranks: list[dict[str, tuple[Any, ...]]], name: str) -> None:
    loss = MEMBERS[name].make()
    for batch in (BATCH, BATCH + 2, 7):
        loss(*MEMBERS[name].sample(batch))
    for rank in ranks:
        torch.testing.assert_close(rank[name][4], dict(loss.state_dict()))
