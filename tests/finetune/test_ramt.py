from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.finetune import (
    BinaryMask,
    MaskTuner,
    MaskTuningConfig,
    apply_adapter,
    gradient_dropout,
    keep_probability,
    load_packed_masks,
    mask_norm,
    packed_masks,
    rank_by_gradient,
    sparsity,
)


def weight(out: int = 9, inp: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def masked(**options: float) -> nn.Sequential:
    model = network()
    apply_adapter(model, MaskTuningConfig(target_modules=["0", "2"], **options))
    return model


def mask_of(model: nn.Module, name: str = "0") -> BinaryMask:
    return model.get_submodule(name).parametrizations.weight[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_start_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    mask = BinaryMask(w)
    assert torch.equal(mask(w), w)
    assert mask(w).dtype == dtype


def test_a_mask_at_the_threshold_is_off() -> None:
    w = weight()
    mask = BinaryMask(w, init=1.0, threshold=0.5)
    with torch.no_grad():
        mask.R[0] = 0.5
        mask.R[1] = 0.5 + 1e-6
        mask.R[2] = -3.0
    assert (mask(w)[[0, 2]] == 0).all()
    assert torch.equal(mask(w)[[1, 3]], w[[1, 3]])


def test_gradient_is_straight_through_where_on_and_off() -> None:
    w, upstream = weight().double().requires_grad_(True), weight(seed=5).double()
    mask = BinaryMask(w)
    with torch.no_grad():
        mask.R[0] = 0.0
    (mask(w) * upstream).sum().backward()
    torch.testing.assert_close(mask.R.grad, upstream * w.detach())


def test_keep_probability() -> None:
    a = torch.tensor([1.0, -1.0, 2.0, 1.0, 1.0, -1.0, 1.0, 0.0])
    b = torch.tensor([1.0, -5.0, 0.0, -1.0, -3.0, 0.5, -0.5, 3.0])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.25, 2 / 3, 2 / 3, 0.5])
    torch.testing.assert_close(keep_probability(a, b), expected)
    torch.testing.assert_close(keep_probability(1e-10 * a, 1e-10 * b), expected)
    torch.testing.assert_close(keep_probability(-a, -b), expected)
    assert torch.isfinite(keep_probability(torch.zeros(2), torch.zeros(2))).all()


def test_dropout_keeps_drops_and_has_the_stated_mean() -> None:
    a, b = torch.tensor([1.0, -2.0, 1.0]), torch.tensor([-1.0, -1.0, -3.0])
    kept = gradient_dropout(a, b, uniform=torch.tensor([0.49, 0.99, 0.24]))
    assert torch.equal(kept, a)
    dropped = gradient_dropout(a, b, uniform=torch.tensor([0.51, 0.99, 0.26]))
    assert torch.equal(dropped, torch.tensor([0.0, -2.0, 0.0]))
    half = gradient_dropout(a, b, lam=0.5, uniform=torch.tensor([0.51, 0.99, 0.26]))
    assert torch.equal(half, torch.tensor([0.5, -2.0, 0.5]))
    assert torch.equal(gradient_dropout(a, b, lam=0.0, uniform=torch.ones(3)), a)
    generator = torch.Generator().manual_seed(0)
    many = gradient_dropout(a.expand(20_000, 3), b.expand(20_000, 3), lam=0.8, generator=generator)
    expected = (0.2 + 0.8 * keep_probability(a, b)) * a
    torch.testing.assert_close(many.mean(0), expected, atol=0.02, rtol=0)


def losses(model: nn.Module, step: int = 0) -> tuple[Tensor, Tensor]:
    x = weight(16, 6, seed=step)
    logits = model(x)
    return F.cross_entropy(logits, torch.arange(16) % 4), (logits - network()(x).detach() - 1).square().mean()


def tuner_of(model: nn.Module, seed: int = 0, **options: float) -> MaskTuner:
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    return MaskTuner(model, torch.optim.Adam(parameters, lr=1e-3), generator=generator, **options)


def test_the_step_is_adams_along_what_dropout_leaves() -> None:
    model = masked()
    tuner, R = tuner_of(model), [mask_of(model).R, mask_of(model, "2").R]
    main, reference = losses(model)
    a = torch.autograd.grad(main, R, retain_graph=True)
    b = torch.autograd.grad(reference, R, retain_graph=True)
    generator = torch.Generator().manual_seed(0)
    expected = [gradient_dropout(x, y, generator=generator) for x, y in zip(a, b, strict=True)]
    found = tuner.step(main, reference)
    assert found.keys() == {"main", "reference"}
    assert not found["main"].requires_grad
    for r, gradient, x in zip(R, expected, a, strict=True):
        assert torch.equal(r.grad, gradient)
        assert 0 < (gradient == 0).sum() < gradient.numel()
        assert torch.equal(gradient[gradient != 0], x[gradient != 0])
        moved = r.detach() - 1e-2
        torch.testing.assert_close(moved, -1e-3 * gradient.sign(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("without", [True, False])
def test_switched_off_it_is_plain_mask_tuning(without: bool) -> None:
    model, plain = masked(), masked()
    tuner, optimizer = tuner_of(model, lam=0.0), tuner_of(plain).optimizer
    for step in range(8):
        main, reference = losses(model, step)
        tuner.step(main, None if without else reference)
        optimizer.zero_grad()
        losses(plain, step)[0].backward()
        optimizer.step()
    assert torch.equal(mask_of(model).R, mask_of(plain).R)
    assert sparsity(model) > 0


def test_the_head_takes_the_tasks_gradient_alone() -> None:
    model = masked()
    model[2].bias.requires_grad_(True)
    main, reference = losses(model)
    (expected,) = torch.autograd.grad(main, model[2].bias, retain_graph=True)
    tuner_of(model).step(main, reference)
    assert torch.equal(model[2].bias.grad, expected)


def test_resumes() -> None:
    first, second = masked(), masked()
    one, other = tuner_of(first), tuner_of(second, seed=9)
    for step in range(3):
        one.step(*losses(first, step))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(3, 6):
        for tuner, model in ((one, first), (other, second)):
            tuner.step(*losses(model, step))
    assert torch.equal(mask_of(first).R, mask_of(second).R)


def test_masks_are_carried_at_one_bit_a_weight() -> None:
    model, other = masked(), masked()
    with torch.no_grad():
        for name in ("0", "2"):
            mask_of(model, name).R.copy_(weight(*mask_of(model, name).R.shape))
    packed = packed_masks(model)
    assert {name: (len(bits), bits.dtype) for name, bits in packed.items()} == {
        "0.weight": (7, torch.uint8),  # of 54 weights
        "2.weight": (5, torch.uint8),
    }
    load_packed_masks(other, packed)
    x = weight(8, 6)
    assert torch.equal(other(x), model(x))
    assert sparsity(other) == sparsity(model)
    with pytest.raises(ValueError, match="^packed must have these bytes"):
        load_packed_masks(other, {"0.weight": packed["0.weight"]})
    assert torch.equal(other(x), model(x))


def test_a_multiple_of_eight_weights_needs_no_byte_more() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_adapter(model, MaskTuningConfig(target_modules=["0"]))
    assert [len(bits) for bits in packed_masks(model).values()] == [8]


def test_merged_weights_have_exact_zeros_and_the_rest_unchanged() -> None:
    model = network()
    adapters = apply_adapter(model, MaskTuningConfig(target_modules=["0"]))
    with torch.no_grad():
        mask_of(model).R[::2] = 0.0
    adapters.remove()
    assert (model[0].weight[::2] == 0).all()
    assert torch.equal(model[0].weight[1::2], network()[0].weight[1::2])


def test_layers_are_ranked_by_their_mean_gradient() -> None:
    model, names = network(), ["0.weight", "2.weight"]
    slopes = [
        torch.autograd.grad(model(weight(8, 6, seed=s)).square().sum(), [model[0].weight, model[2].weight])
        for s in (0, 1)
    ]
    expected = {n: sum(g[i].abs().mean().item() for g in slopes) / 2 for i, n in enumerate(names)}
    found = rank_by_gradient(model, names, (model(weight(8, 6, seed=s)).square().sum() for s in (0, 1)))
    assert dict(found) == pytest.approx(expected)
    assert found[0][1] > found[1][1]
    assert all(p.grad is None for p in model.parameters())
    assert rank_by_gradient(model, names, [model[2].weight.sum()])[-1] == ("0.weight", 0.0)
    with pytest.raises(ValueError, match="^weights must be names"):
        rank_by_gradient(model, ["1.weight"], [])
    with pytest.raises(ValueError, match="^losses must be at least one"):
        rank_by_gradient(model, names, [])


def test_norm_and_sparsity() -> None:
    model = masked()
    assert mask_norm(model).item() == pytest.approx(1e-2 * (54**0.5 + 36**0.5))
    assert sparsity(model) == 0.0
    with torch.no_grad():
        mask_of(model).R[0] = 0.0
    assert sparsity(model) == pytest.approx(6 / 90)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="^init must be above the threshold 0.005"):
        MaskTuningConfig(target_modules=["0"], init=5e-3)
    with pytest.raises(ValueError, match="^init must be above"):
        BinaryMask(weight(), init=0.0)
    with pytest.raises(ValueError, match="^weight must be finite"):
        BinaryMask(weight() / 0)
    with pytest.raises(ValueError, match=r"^lam must be in \[0, 1\]"):
        gradient_dropout(torch.ones(2), torch.ones(2), lam=1.5)
    with pytest.raises(ValueError, match="^b must be of shape"):
        gradient_dropout(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="^uniform must be of shape"):
        gradient_dropout(torch.ones(2), torch.ones(2), uniform=torch.ones(3))
    for call in (mask_norm, sparsity, packed_masks):
        with pytest.raises(ValueError, match="^model must have a BinaryMask"):
            call(network())
    with pytest.raises(ValueError, match="^model must have a BinaryMask"):
        MaskTuner(network(), torch.optim.SGD(network().parameters(), lr=0.1))


@pytest.mark.parametrize(
    "bits", [torch.tensor([1.5, 2.0]), torch.tensor([1, 900]), torch.ones(2, 1, dtype=torch.uint8), [1, 2]]
)
def test_packed_masks_are_bytes(bits: object) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    apply_adapter(model, MaskTuningConfig(target_modules=["0"]))
    before = packed_masks(model)["0.weight"]
    with pytest.raises(TypeError, match="packed must hold uint8 vectors"):
        load_packed_masks(model, {"0.weight": bits})
    assert torch.equal(packed_masks(model)["0.weight"], before)
    with pytest.raises(TypeError, match="a must be floating point"):
        keep_probability(torch.tensor([1]), torch.tensor([1]))
