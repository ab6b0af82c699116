"""What is counted, beside PyTorch's own count, and the time of a pass; bits are tested with their quantisers too."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.compress import compress_linear, measured_latency, model_cost, pack_quantized, prepare_quantized
from trimtab.nets import mlp


class Sleepy(nn.Module):
    """Takes as long as it is told to, and notes how it was called."""

    def __init__(self, milliseconds: float, calls: list[tuple[float, bool, bool]]) -> None:
        super().__init__()
        self.milliseconds, self.calls = milliseconds, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.milliseconds, self.training, torch.is_grad_enabled()))
        time.sleep(self.milliseconds / 1000)
        return x


def test_models_take_turns_in_eval_mode_and_are_put_back() -> None:
    calls: list[tuple[float, bool, bool]] = []
    slow, fast = Sleepy(20, calls), Sleepy(2, calls).eval()
    found = measured_latency(slow, fast, x=torch.zeros(1, 2), repeats=3, warmup=1)
    assert [call[0] for call in calls] == [20, 2] * 4
    assert not any(training or grad for _, training, grad in calls)
    assert slow.training
    assert not fast.training
    assert found[0] >= 20
    assert found[1] >= 2
    assert found[1] < found[0]


def test_modes_are_put_back_after_a_failure() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        measured_latency(model, x=torch.zeros(1, 2))
    assert model.training


def test_a_factorised_model_is_counted_and_measured_to_be_less() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = mlp(1024, (1024, 1024))
        x = torch.randn(256, 1024)
    small, _ = compress_linear(whole, ratio=0.05)
    assert model_cost(small, x).multiply_adds < 0.1 * model_cost(whole, x).multiply_adds
    slow, fast = measured_latency(whole, small, x=x, repeats=5)
    assert fast < slow


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    model, x = nn.Linear(2, 1), torch.zeros(1, 2)
    with pytest.raises(TypeError, match="x must be a tensor"):
        measured_latency(model, x=np.zeros((1, 2)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be at least one sample"):
        measured_latency(model, x=x[:0])
    with pytest.raises(ValueError, match="repeats must be"):
        measured_latency(model, x=x, repeats=0)
    with pytest.raises(ValueError, match="warmup must be"):
        measured_latency(model, x=x, warmup=-1)
    with pytest.raises(TypeError, match="repeats must be"):
        measured_latency(model, x=x, repeats=2.5)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Attention by position or by name, perhaps to keys of another width."""

    def __init__(self, named: bool = False, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, kdim=width, vdim=width, batch_first=True)
        self.named, self.width = named, width

    def forward(self, x: Tensor) -> Tensor:
        other = x[:, 1:, : self.width]
        if self.named:
            return self.inner(key=other, value=other, query=x)[0]
        return self.inner(x, other, other)[0]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


ODD = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, bias=False), (4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 9, 9)),
    "of one dimension": (lambda: nn.Conv1d(2, 3, 5, stride=3, padding=2), (2, 11)),
    "of three dimensions": (lambda: nn.Conv3d(2, 3, (1, 2, 3)), (2, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, padding=1, output_padding=1), (4, 5, 5)),
    "linear, of tokens": (lambda: nn.Linear(5, 7, bias=False), (3, 5)),
    "linear, by name": (Named, (5,)),
    "attention": (Attention, (5, 8)),
    "attention, by name": (lambda: Attention(named=True), (5, 8)),
    "attention, of two widths": (lambda: Attention(width=6), (5, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
}


@pytest.mark.parametrize("kind", ODD)
def test_multiply_adds_are_those_that_pytorch_counts(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    make, shape = ODD[kind]
    model, x = make().train(), torch.randn(2, *shape)
    cost = model_cost(model, x)
    with FlopCounterMode(display=False) as counter:  # in training mode no layer takes a path of its own
        model(x)
    assert cost.multiply_adds == counter.get_total_flops() / 2 / len(x)
    assert cost.size == 32 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert all(part.training for part in model.modules())


def test_weights_that_are_shared_have_their_size_once() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    x = torch.randn(3, 4)
    for model in (nn.Sequential(one, nn.ReLU(), one), nn.Sequential(one, nn.ReLU(), other)):
        quantised = prepare_quantized(model, x, 4, ends=None)
        for held, bits in ((model, 32), (quantised, 4)):
            cost = model_cost(held, x)
            assert (cost.size, cost.dense_multiply_adds) == (16 * bits, 32)
            assert [layer.shared for layer in cost.layers] == [False, True]


def test_a_packed_model_costs_what_it_did_before() -> None:
    layers = nn.Conv2d(2, 4, 3, groups=2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    model, x = nn.Sequential(*layers), torch.randn(3, 2, 7, 7)
    trained = prepare_quantized(model, x, {"0": 3, "3": 8}).eval()
    before, after = model_cost(trained, x), model_cost(pack_quantized(trained), x)
    assert after.layers == before.layers
    assert after.operations == before.operations > 0
    assert after.size == before.size > 0
