from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.finetune import SORSAConfig, SORSAWeight, apply_adapter, orthonormality, orthonormality_penalty


def weight(out: int = 9, inp: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))


def disturbed(sorsa: SORSAWeight, size: float = 0.3) -> SORSAWeight:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sorsa.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return sorsa


@settings(deadline=None, max_examples=30)
@given(
    out=st.integers(1, 12),
    inp=st.integers(1, 12),
    alpha=st.one_of(st.none(), st.floats(0.1, 20.0)),
    data=st.data(),
)
def test_start(out: int, inp: int, alpha: float | None, data: st.DataObject) -> None:
    r, w = data.draw(st.integers(1, min(out, inp))), weight(out, inp)
    sorsa = SORSAWeight(w, r, alpha)
    torch.testing.assert_close(sorsa(w), w, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in sorsa.parameters()) == r * (inp + out + 1)
    assert (sorsa.A.shape, sorsa.s.shape, sorsa.B.shape) == ((r, inp), (r,), (out, r))


def test_residual_has_the_other_singular_values_and_vanishes_at_full_rank() -> None:
    w = weight()
    S = torch.linalg.svdvals(w)
    rest = torch.linalg.svdvals(SORSAWeight(w, 2).residual(w))
    torch.testing.assert_close(rest, torch.cat([S[2:], torch.zeros(2)]), atol=1e-5, rtol=0)
    torch.testing.assert_close(SORSAWeight(w, 6).residual(w), torch.zeros(9, 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_effective_weight_is_the_equation(alpha: float | None) -> None:
    w, r = weight(), 3
    beta = 1.0 if alpha is None else alpha / r
    U, S, Vh = torch.linalg.svd(w, full_matrices=False)
    residual = w - beta * U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    sorsa = disturbed(SORSAWeight(w, r, alpha))
    torch.testing.assert_close(sorsa(w), residual + beta * sorsa.B @ torch.diag(sorsa.s) @ sorsa.A, atol=1e-5, rtol=0)


def test_gradients_reach_the_three_factors_and_not_the_residual() -> None:
    w = weight().double().requires_grad_(True)
    sorsa = disturbed(SORSAWeight(w, 2, alpha=3.0))
    upstream = weight(seed=5).double()
    (sorsa(w) * upstream).sum().backward()
    beta = 1.5
    torch.testing.assert_close(sorsa.A.grad, beta * (sorsa.B * sorsa.s).T @ upstream)
    torch.testing.assert_close(sorsa.B.grad, beta * upstream @ (sorsa.s[:, None] * sorsa.A).T)
    torch.testing.assert_close(sorsa.s.grad, beta * (sorsa.B.T @ upstream @ sorsa.A.T).diagonal())
    assert not any(b.requires_grad for b in sorsa.buffers())


def test_a_common_rotation_of_both_factors_changes_the_weight() -> None:
    w = weight()
    sorsa = SORSAWeight(w, 2)
    c, s = math.cos(0.7), math.sin(0.7)
    Q = torch.tensor([[c, -s], [s, c]])
    with torch.no_grad():
        sorsa.B.copy_(sorsa.B @ Q)
        sorsa.A.copy_(Q.T @ sorsa.A)
    assert not torch.allclose(sorsa(w), w, atol=1e-2)


def test_convolution_kernel() -> None:
    kernel = weight(4, 18).view(4, 2, 3, 3)
    conv = nn.Conv2d(2, 4, 3)
    conv.weight.data.copy_(kernel)
    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    before = conv(x)
    adapters = apply_adapter(nn.Sequential(conv), SORSAConfig(r=3, target_modules=["0"]))
    torch.testing.assert_close(conv(x), before, atol=1e-5, rtol=0)
    assert adapters.num_trainable() == 3 * (4 + 18 + 1)


def test_attention_takes_its_fast_path_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    before = layer(x).detach()
    apply_adapter(layer, SORSAConfig(r=2, target_modules=["self_attn", "self_attn.out_proj", "linear1"]))
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_lora_delta_is_the_exact_change(alpha: float | None) -> None:
    w = weight()
    sorsa = disturbed(SORSAWeight(w, 2, alpha))
    A, B = sorsa.to_lora_delta()
    assert (A.shape, B.shape) == ((4, 6), (9, 4))
    torch.testing.assert_close(w + B @ A, sorsa(w), atol=1e-5, rtol=0)


# The regulariser


@pytest.mark.parametrize("r", [1, 4, 16])
def test_penalty_of_stretched_rows(r: int) -> None:
    rows = torch.linalg.qr(weight(20, r)).Q.T
    assert orthonormality(rows).item() < 1e-5
    assert orthonormality(2 * rows).item() == pytest.approx(3 * math.sqrt(r), abs=2e-4)
    assert orthonormality(torch.zeros(r, 5)).item() == pytest.approx(math.sqrt(r), abs=2e-4)


def test_penalty_is_the_mean_over_both_factors_of_all_adapters() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    apply_adapter(model, SORSAConfig(r=2, target_modules=["0", "1"]))
    first = model[0].parametrizations.weight[0]
    with torch.no_grad():
        first.A.mul_(2)  # deviates by 3 sqrt(2); the other three factors by nothing
    assert orthonormality_penalty(model).item() == pytest.approx(3 * math.sqrt(2) / 4, abs=2e-4)
    with torch.no_grad():
        first.A.div_(2)
        first.B.mul_(2)
    assert orthonormality_penalty(model).item() == pytest.approx(3 * math.sqrt(2) / 4, abs=2e-4)


def test_penalty_gradient_is_that_of_the_norm_away_from_zero() -> None:
    rows = weight(3, 7).double().requires_grad_(True)
    gram = (rows @ rows.T - torch.eye(3)).detach()
    (gradient,) = torch.autograd.grad(orthonormality(rows), rows)
    torch.testing.assert_close(gradient, 2 * gram @ rows.detach() / gram.norm(), atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradcheck(orthonormality, rows)


def test_penalty_is_quiet_at_the_start() -> None:
    exact = torch.eye(3, requires_grad=True)
    orthonormality(exact).backward()
    assert torch.equal(exact.grad, torch.zeros(3, 3))
    model = nn.Sequential(nn.Linear(200, 300))
    adapters = apply_adapter(model, SORSAConfig(r=64, target_modules=["0"]))
    value = orthonormality_penalty(model)
    value.backward()
    assert value.item() < 1e-5
    sorsa = model[0].parametrizations.weight[0]
    assert all(p.grad.norm() < 0.2 for p in (sorsa.A, sorsa.B))  # 1 for the plain norm
    assert sorsa.s.grad is None
    assert len(adapters.trainable_parameters()) == 3


def test_penalty_descends_to_orthonormal_factors() -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    adapters = apply_adapter(model, SORSAConfig(r=4, target_modules=["0"]))
    disturbed(model[0].parametrizations.weight[0], 0.05)
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=0.01)
    before = orthonormality_penalty(model).item()
    for _ in range(300):
        optimizer.zero_grad()
        orthonormality_penalty(model).backward()
        optimizer.step()
    assert orthonormality_penalty(model).item() < 0.05 * before


def test_penalty_under_autocast_stays_in_float32() -> None:
    rows = torch.linalg.qr(weight(50, 8)).Q.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert orthonormality(rows).dtype == torch.float32
        assert orthonormality(rows).item() < 1e-5
    assert orthonormality(rows.bfloat16()).dtype == torch.float32


def test_penalty_needs_unmerged_adapters() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(ValueError, match="model must have a SORSA"):
        orthonormality_penalty(model)
    adapters = apply_adapter(model, SORSAConfig(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="eps must be positive"):
        orthonormality_penalty(model, eps=0.0)
    adapters.merge()
    with pytest.raises(ValueError, match="model must have a SORSA"):
        orthonormality_penalty(model)


# Parity with peft's PiSSA, which trains the same subspace with the singular values split over both factors


def test_start_equals_pissa() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    apply_adapter(ours, SORSAConfig(r=3, target_modules=["0"]))
    pissa = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.inject_adapter_in_model(pissa, theirs)[0]
    sorsa, original = ours[0].parametrizations.weight[0], ours[0].parametrizations.weight.original
    torch.testing.assert_close(sorsa.residual(original), layer.base_layer.weight, atol=1e-5, rtol=0)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close((sorsa.B * sorsa.s) @ sorsa.A, B @ A, atol=1e-5, rtol=0)


def test_with_merged_sigma_and_no_regulariser_it_takes_pissas_steps() -> None:
    """With s folded into the vectors as sqrt(s) and then held at one, SORSA is PiSSA: the same weights step by step."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    apply_adapter(ours, SORSAConfig(r=3, target_modules=["0", "2"]))
    for layer in (ours[0], ours[2]):
        sorsa = layer.parametrizations.weight[0]
        with torch.no_grad():
            root = sorsa.s.sqrt()
            sorsa.A.mul_(root[:, None])
            sorsa.B.mul_(root)
            sorsa.s.fill_(1.0)
        sorsa.s.requires_grad_(False)
    pissa = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"], init_lora_weights="pissa")
    theirs = peft.inject_adapter_in_model(pissa, theirs)
    x, y = weight(32, 6, seed=7), torch.arange(32) % 4
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    for _ in range(10):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), base(x), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "^r must be at least 1, got 0"),
        ({"alpha": 0.0}, "^alpha must be positive"),
        ({"dropout": 0.1}, "^dropout must be 0, got 0.1.*branch"),
    ],
)
def test_bad_settings(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SORSAConfig(target_modules=["0"], **options)


@pytest.mark.parametrize(("r", "alpha", "match"), [(7, None, "^r must be"), (0, None, "^r must"), (1, -1.0, "^alpha")])
def test_bad_weight(r: int, alpha: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SORSAWeight(weight(), r, alpha)
