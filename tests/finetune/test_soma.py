from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from trimtab.finetune import (
    SoMAConfig,
    SoMAWeight,
    WeightDecayAnnealing,
    adapted_biases,
    annealed_weight_decay,
    apply_adapter,
    modules_from_block,
)


def weight(out: int = 9, inp: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))


def disturbed(soma: SoMAWeight) -> SoMAWeight:
    with torch.no_grad():
        for seed, parameter in enumerate(soma.parameters()):
            parameter.add_(weight(*parameter.shape, seed=seed + 3), alpha=0.3)
    return soma


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 5)])
def test_start_is_the_base_and_trains_the_minor_part(alpha: float | None, shape: tuple[int, int]) -> None:
    w, r = weight(*shape), 3
    scale = 1.0 if alpha is None else alpha / r
    soma, S = SoMAWeight(w, r, alpha), torch.linalg.svdvals(w)
    torch.testing.assert_close(soma(w), w, atol=1e-5, rtol=0)
    trained = torch.linalg.svdvals(scale * soma.B @ soma.A)
    torch.testing.assert_close(trained[:r], S[-r:], atol=1e-5, rtol=1e-5)
    rest = torch.linalg.svdvals(soma.residual(w))
    torch.testing.assert_close(rest, torch.cat([S[:-r], torch.zeros(r)]), atol=1e-5, rtol=0)
    balance = torch.diag(S[-r:] / scale)
    torch.testing.assert_close(soma.B.T @ soma.B, balance, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soma.A @ soma.A.T, balance, atol=1e-5, rtol=1e-5)


def test_full_rank_leaves_no_residual() -> None:
    w = weight()
    torch.testing.assert_close(SoMAWeight(w, 6).residual(w), torch.zeros(9, 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_effective_weight_gradients_and_lora_delta(alpha: float | None) -> None:
    w, upstream = weight().double().requires_grad_(True), weight(seed=5).double()
    soma = disturbed(SoMAWeight(w, 2, alpha))
    scale = 1.0 if alpha is None else alpha / 2
    effective = w - scale * soma.B0 @ soma.A0 + scale * soma.B @ soma.A
    torch.testing.assert_close(soma(w), effective)
    (soma(w) * upstream).sum().backward()
    torch.testing.assert_close(soma.A.grad, scale * soma.B.T @ upstream)
    torch.testing.assert_close(soma.B.grad, scale * upstream @ soma.A.T)
    assert not any(buffer.requires_grad for buffer in soma.buffers())
    A, B = soma.to_lora_delta()
    assert (A.shape, B.shape) == ((4, 6), (9, 4))
    torch.testing.assert_close(w + B @ A, soma(w))


def test_decay_draws_the_weight_towards_its_residual() -> None:
    w = weight()
    soma = SoMAWeight(w, 2)
    optimizer = torch.optim.AdamW(soma.parameters(), lr=0.1, weight_decay=1.0)
    for p in soma.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(100):
        optimizer.step()
    torch.testing.assert_close(soma(w), soma.residual(w), atol=1e-4, rtol=0)


def test_kernels() -> None:
    kernel = weight(4, 18).view(4, 2, 3, 3)
    soma = SoMAWeight(kernel, 3)
    assert soma(kernel).shape == kernel.shape
    torch.testing.assert_close(soma(kernel), kernel, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in soma.parameters()) == 3 * (4 + 18)


def test_components_that_cannot_train_are_warned_of() -> None:
    flat = weight(9, 2) @ weight(2, 6, seed=1)  # of rank two
    with pytest.warns(UserWarning, match="3 of the 3 smallest singular values are zero"):
        SoMAWeight(flat, 3)
    with pytest.warns(UserWarning, match="4 of the 5 smallest"):
        SoMAWeight(flat, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoMAWeight(weight(), 6)
        SoMAWeight(1e-6 * weight(), 6)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(4, 4), "attn": nn.MultiheadAttention(4, 1)}) for _ in range(11)
        )


def test_late_blocks_are_found_by_number() -> None:
    model = Blocks()
    assert modules_from_block(model, ["fc1"], 9) == ["blocks.9.fc1", "blocks.10.fc1"]  # as numbers, not as words
    assert modules_from_block(model, ["attn.out_proj", "fc1"], 10) == ["blocks.10.fc1", "blocks.10.attn.out_proj"]
    assert len(modules_from_block(model, ["fc1", "stem"], 0)) == 11  # the stem is in no block
    with pytest.raises(ValueError, match="^target_modules must be in blocks from 11 on"):
        modules_from_block(model, ["fc1"], 11)
    with pytest.raises(ValueError, match="^start_block must be at least 0"):
        modules_from_block(model, ["fc1"], -1)


def test_biases_of_adapted_layers() -> None:
    model = Blocks()
    with pytest.raises(ValueError, match="model must have a SoMAWeight"):
        adapted_biases(model)
    apply_adapter(model, SoMAConfig(r=1, target_modules=["blocks.0.fc1", "blocks.0.attn"]))
    block = model.blocks[0]
    biases = adapted_biases(model)
    assert [id(b) for b in biases] == [id(block["fc1"].bias), id(block["attn"].in_proj_bias)]
    assert not any(b.requires_grad for b in biases)
    assert all(b.requires_grad for b in adapted_biases(model, train=True))
    assert not model.stem.bias.requires_grad


def decayed(*decays: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": decay} for decay in decays]
    return torch.optim.AdamW(groups, lr=0.1)


def test_annealing() -> None:
    assert annealed_weight_decay(0, 0.05, 40) == 0.05
    assert annealed_weight_decay(20, 0.05, 40) == pytest.approx(0.025005)
    assert annealed_weight_decay(40, 0.05, 40) == annealed_weight_decay(99, 0.05, 40) == pytest.approx(1e-5)
    optimizer = decayed(0.05, 0.0, 0.1)
    decay = WeightDecayAnnealing(optimizer, T_max=10)
    assert decay.get_last_weight_decay() == [0.05, 0.0, 0.1]
    for step in range(1, 13):
        decay.step()
        expected = [annealed_weight_decay(step, 0.05, 10), 0.0, annealed_weight_decay(step, 0.1, 10)]
        assert decay.get_last_weight_decay() == expected == [g["weight_decay"] for g in optimizer.param_groups]


def test_annealing_resumes() -> None:
    first, second = (WeightDecayAnnealing(decayed(0.05, 0.0), T_max=10) for _ in range(2))
    for _ in range(4):
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.get_last_weight_decay() == first.get_last_weight_decay()
    first.step()
    second.step()
    assert second.get_last_weight_decay() == first.get_last_weight_decay()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="^r must be at least 1"):
        SoMAConfig(r=0, target_modules=["0"])
    with pytest.raises(ValueError, match="^alpha must be positive"):
        SoMAConfig(alpha=0.0, target_modules=["0"])
    with pytest.raises(ValueError, match=r"^r must be in \[1, 6\]"):
        SoMAWeight(weight(), 7)
    with pytest.raises(ValueError, match="^T_max must be at least 1"):
        WeightDecayAnnealing(decayed(0.05), T_max=0)
    with pytest.raises(ValueError, match="^eta_min must be at most"):
        WeightDecayAnnealing(decayed(1e-6), T_max=5)
    with pytest.raises(TypeError, match="^optimizer must be one with weight_decay"):
        WeightDecayAnnealing(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), T_max=5)


def test_same_subspace_as_the_minor_components_of_the_decomposition() -> None:
    w = weight(12, 10)
    U, S, Vh = torch.linalg.svd(w, full_matrices=False)
    soma = SoMAWeight(w, 4)
    torch.testing.assert_close(soma.B @ soma.A, (U[:, -4:] * S[-4:]) @ Vh[-4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("starts", [["x"], [float("nan")], [-1.0]])
def test_annealing_refuses_a_spoilt_state_whole(starts: list[object]) -> None:
    decay = WeightDecayAnnealing(torch.optim.AdamW([nn.Parameter(torch.ones(2))], weight_decay=0.1), T_max=5)
    decay.step()
    before = decay.state_dict(), decay.get_last_weight_decay()
    with pytest.raises((TypeError, ValueError), match="starts must be"):
        decay.load_state_dict({"steps": 3, "starts": starts})
    assert (decay.state_dict(), decay.get_last_weight_decay()) == before
    decay.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="optimizer must have 1 groups"):
        decay.step()
    assert decay.steps == 1
