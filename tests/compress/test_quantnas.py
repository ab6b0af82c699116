from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.compress import (
    AdaptiveDeviation,
    MixedOp,
    QuantNAS,
    QuantNoiseConv2d,
    architecture_entropy,
    entropy_weight,
    mixed_ops,
    noisy_mixture,
    quantization_noise,
    weight_parameters,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        ops = {"3": QuantNoiseConv2d(2, 2, 3, (2, 8)), "1": QuantNoiseConv2d(2, 2, 1, (2, 8))}
        self.block, self.adq = MixedOp(ops, (2, 8)), AdaptiveDeviation(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.adq(x, self.block, x)


def search(entropy: float = 1e-3, cost: float = 0.0) -> QuantNAS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    weights = torch.optim.Adam(weight_parameters(model), lr=1e-2)
    logits = torch.optim.Adam([op.logits for op in mixed_ops(model)], lr=5e-2)
    return QuantNAS(model, weights, logits, 4, entropy=entropy, cost=cost, generator=seeded(3))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 2, 6, 6, generator=seeded(seed))
    return x, x.flip(3)


def test_noise_has_the_mean_and_the_deviation_of_half_a_step() -> None:
    x = torch.linspace(-1, 2, 5).expand(20_000, 5)
    for noise, deviation in (("gaussian", 3 / 3 / 2), ("uniform", 3 / 3 / 12**0.5)):
        found = quantization_noise(x, 2, noise, generator=seeded()) - x  # type: ignore[arg-type]
        assert found.mean().item() == pytest.approx(0, abs=4 * deviation / 100_000**0.5)
        assert found.std().item() == pytest.approx(deviation, rel=0.01)
    assert quantization_noise(x, 2, "uniform", generator=seeded()).sub(x).abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_a_mixture_has_the_moments_of_its_parts(noise: str) -> None:
    x, shares = torch.linspace(0, 3, 4).expand(40_000, 4), torch.tensor([0.3, 0.2])
    found = noisy_mixture(x, shares, (2, 3), noise, generator=seeded()) - x  # type: ignore[arg-type]
    total = 0.5 + 1 / 3
    width = 0.5 if noise == "gaussian" else 12**-0.5
    expected = width * math.hypot(0.3 / total * 1.0, 0.2 / total * 3 / 7)
    assert found.mean().item() == pytest.approx(0, abs=0.003)
    assert found.std().item() == pytest.approx(expected, rel=0.02)


def test_gradients_pass_through_the_clean_part_alone() -> None:
    x = torch.randn(5, generator=seeded(), requires_grad=True)
    shares = torch.tensor([0.25, 0.25], requires_grad=True)
    noisy_mixture(x, shares, (2, 8), generator=seeded()).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), (1 / 3) / (0.5 + 1 / 3)))
    assert shares.grad.abs().sum() > 0
    x.grad = None
    legacy = noisy_mixture(x, shares, (2, 8), legacy=True, eps=torch.zeros(5))
    torch.testing.assert_close(legacy, (1 / 3 + 0.5 / (0.5 + 1 / 3)) * x)
    assert not quantization_noise(x, 4, generator=seeded()).requires_grad
    plain = noisy_mixture(x, shares, (2, 8), eps=torch.zeros(5))
    torch.testing.assert_close(plain, x)


def test_the_gradient_to_shares_agrees_with_finite_differences() -> None:
    x, eps = torch.randn(2, 6, generator=seeded(), dtype=torch.float64)
    shares = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    # the clean part and the noisy ones hold the same values: what moves with the shares is the noise
    assert torch.autograd.gradcheck(lambda a: noisy_mixture(x, a, (2, 3), eps=eps), shares)


def test_one_hot_weights_are_that_operation() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        op = MixedOp({"3": QuantNoiseConv2d(2, 2, 3), "1": QuantNoiseConv2d(2, 2, 1)})
    with torch.no_grad():
        op.logits[1, 1] = 200.0
    x = torch.randn(1, 2, 4, 4, generator=seeded())
    for conv in op.ops:
        conv.generator = seeded(7)
    found = op(x)
    other = copy.deepcopy(op.ops[1].weight)
    assert op.choice() == ("1", 8)
    conv = QuantNoiseConv2d(2, 2, 1)
    conv.weight = other
    conv.generator = seeded(7)
    op.ops[0].generator = op.ops[1].generator = seeded(7)
    op.ops[0](x, torch.tensor([0.0, 0.0]))  # draws first
    conv.generator = op.ops[0].generator
    torch.testing.assert_close(found, conv(x, torch.tensor([0.0, 1.0])), atol=0.05, rtol=0.05)
    silent = nn.functional.conv2d(x.relu(), other)
    torch.testing.assert_close(found, silent, atol=0.05, rtol=0.05)  # 8 bits: little noise


def test_costs_are_those_of_the_choices() -> None:
    held = search()
    held.step(pair(), pair(1))
    (block,) = held.blocks
    macs = torch.tensor([2 * 36 * 18, 2 * 36 * 2])
    torch.testing.assert_close(block.costs(), macs[:, None] * torch.tensor([4.0, 64.0]))
    with torch.no_grad():
        for place, expected in (((0, 1), 1.0), ((1, 0), 0.0)):
            block.logits.fill_(-100.0)
            block.logits[place] = 100.0
            assert held.relative_cost().item() == pytest.approx(expected)


def test_adq() -> None:
    block = AdaptiveDeviation(3).eval()
    x, skip = torch.randn(2, 2, 3, 4, 4, generator=seeded())
    expected = 1.5 * skip.flatten(1).std(1).view(2, 1, 1, 1) * (x / (1 + 1e-5) ** 0.5 + 1) + skip
    torch.testing.assert_close(block(x, lambda z: z + 1, skip), expected)
    with torch.no_grad():
        block.shift.fill_(0.7)
    flat = torch.full_like(skip, 2.0)
    torch.testing.assert_close(block(x, lambda z: z, flat), 0.7 * x / (1 + 1e-5) ** 0.5 + 2)


def test_entropy_and_its_weight() -> None:
    assert architecture_entropy([torch.full((6,), 1 / 6)] * 2).item() == pytest.approx(2 * math.log(6))
    assert architecture_entropy([torch.tensor([1.0, 0.0])]).item() == 0
    found = [entropy_weight(epoch, 20) for epoch in range(20)]
    assert found[:5] == [0.0] * 5
    assert found[-1] == pytest.approx(1)
    assert found[5:] == sorted(found[5:])
    assert found[10] == pytest.approx(10 / 19 * math.log(7) / math.log(16))


def test_entropy_and_cost_decide_where_the_loss_does_not() -> None:
    sharp, cheap = search(entropy=5.0), search(entropy=0.0, cost=5.0)
    with torch.no_grad():
        sharp.blocks[0].logits[0, 1] = 0.1
    for held in (sharp, cheap):
        held.set_epoch(3)
        for step in range(40):
            found = held.step(pair(step), pair(100 + step))
    assert sharp.genotype() == [("3", 8)]
    assert sharp.blocks[0].alphas.max() > 0.8
    assert cheap.genotype() == [("1", 2)]
    assert found["cost"] < 0.3


def test_weights_and_mixtures_learn_on_their_own_batches() -> None:
    held = search()
    held.alpha_optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(held.model.state_dict())
    held.step(pair(), pair(1))
    after = held.model.state_dict()
    assert torch.equal(after["block.logits"], before["block.logits"])
    assert not torch.equal(after["block.ops.0.weight"], before["block.ops.0.weight"])
    assert after["adq.norm.num_batches_tracked"] == 1  # the mixtures' step does not touch the statistics
    held = search()
    held.weight_optimizer.param_groups[0]["lr"] = 0.0
    held.step(pair(), pair(1))
    after = held.model.state_dict()
    assert torch.equal(after["block.ops.0.weight"], before["block.ops.0.weight"])
    assert not torch.equal(after["block.logits"], before["block.logits"])


def test_resumes_bit_exactly_and_the_generator_decides() -> None:
    held, again = search(), search()
    held.set_epoch(2)
    for step in range(3):
        held.step(pair(step), pair(step + 9))
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    one, two = held.step(pair(5), pair(6)), again.step(pair(5), pair(6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    again.generator.manual_seed(1)
    assert not torch.equal(held.step(pair(5), pair(6))["loss"], again.step(pair(5), pair(6))["loss"])


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="shares"):
        noisy_mixture(torch.zeros(3), torch.ones(3), (4, 8))
    with pytest.raises(ValueError, match="noise"):
        quantization_noise(torch.zeros(3), 4, "cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ops"):
        MixedOp({})
    with pytest.raises(ValueError, match="MixedOp"):
        QuantNAS(nn.Linear(1, 1), *[torch.optim.SGD([torch.zeros(1)], lr=0.1)] * 2, 4)
    with pytest.raises(ValueError, match="epoch"):
        entropy_weight(8, 8)
    with pytest.raises(ValueError, match="epoch"):
        search().set_epoch(4)
    with pytest.raises(ValueError, match="held"):
        search().step(pair(), (pair()[0], pair()[1][:2]))
