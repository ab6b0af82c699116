from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.finetune import GradientSteering, LoRAConfig, LoRAWeight, apply_adapter, steer_gradient


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def test_projection_takes_conflict_away_and_nothing_else() -> None:
    g, ref = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    torch.testing.assert_close(steer_gradient(g, ref, mode="project")[0], torch.tensor([0.5, 0.5]))
    for agreeing in ([torch.tensor([0.0, 1.0])], [torch.tensor([3.0, 1.0])]):
        assert torch.equal(steer_gradient(g, agreeing, mode="project")[0], g[0])
    opposite = steer_gradient(g, [-g[0]])
    torch.testing.assert_close(opposite[0], torch.zeros(2))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_direction_is_the_equation_and_never_against_the_reference(lam: float) -> None:
    for seed in range(10):
        g = [drawn(3, 2, seed=seed).double(), drawn(4, seed=seed + 50).double()]
        ref = [drawn(3, 2, seed=seed + 20).double(), drawn(4, seed=seed + 70).double()]
        product, squared = inner(g, ref), inner(ref, ref)
        free = [x - min(product, 0) / squared * s for x, s in zip(g, ref, strict=True)]
        ratio = math.sqrt(inner(free, free) / squared)
        expected = [(1 - lam) * x + lam * ratio * s for x, s in zip(free, ref, strict=True)]
        found = steer_gradient(g, ref, lam)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        assert inner(found, ref) >= -1e-9
        torch.testing.assert_close(steer_gradient(g, [9 * s for s in ref], lam), found)
        torch.testing.assert_close(steer_gradient([9 * x for x in g], ref, lam), [9 * x for x in found])


def test_whole_share_has_the_gradients_length() -> None:
    g, ref = [torch.tensor([3.0, 0.0])], [torch.tensor([1.0, 1.0])]
    found = steer_gradient(g, ref, lam=1.0)[0]
    torch.testing.assert_close(found, torch.tensor([3.0, 3.0]) / math.sqrt(2))


def test_nothing_and_zeros() -> None:
    assert steer_gradient([], []) == []
    zero = [torch.zeros(2)]
    assert torch.equal(steer_gradient(zero, zero)[0], torch.zeros(2))
    assert torch.equal(steer_gradient([torch.ones(2)], zero, mode="project")[0], torch.ones(2))


H = torch.diag(torch.tensor([1.0, 10.0]))


def quadratic(theta: Tensor, **options: object) -> tuple[GradientSteering, list[Tensor]]:
    """One step on a quadratic with this Hessian; where the closure was called."""
    optimizer, seen = GradientSteering(torch.optim.SGD([theta], lr=1.0), **options), []

    def closure() -> Tensor:
        seen.append(theta.detach().clone())
        optimizer.zero_grad()
        loss = 0.5 * theta @ H @ theta
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer, seen


def test_a_step_on_a_quadratic() -> None:
    theta = nn.Parameter(torch.tensor([2.0, 0.1]))
    start = theta.detach().clone()
    _, seen = quadratic(theta, rho=0.3, lam=0.4)
    g = H @ start
    uphill = g + 0.3 * H @ g / g.norm()
    torch.testing.assert_close(seen, [start, start + 0.3 * g / g.norm()])  # two passes
    torch.testing.assert_close(start - theta.detach(), steer_gradient([g], [uphill], 0.4)[0])


def test_without_radius_or_share_it_is_the_bases_step() -> None:
    for options in ({"rho": 0.0}, {"lam": 0.0}, {"mode": "project"}):
        theta = nn.Parameter(torch.tensor([2.0, 0.1]))
        start = theta.detach().clone()
        quadratic(theta, **options)
        torch.testing.assert_close(theta.detach(), start - H @ start, atol=1e-4, rtol=1e-4)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def adapted(r: int = 3, alpha: float | None = None) -> tuple[nn.Sequential, list[nn.Parameter]]:
    model = network()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapters = apply_adapter(model, LoRAConfig(r=r, alpha=alpha, target_modules=["0", "2"]))
    return model, adapters.trainable_parameters()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 30) -> list[float]:
    x = drawn(16, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(16) % 4)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


@pytest.mark.parametrize("mode", ["steer", "project"])
def test_adapters_learn_from_a_start_at_zero(mode: str) -> None:
    model, parameters = adapted()
    losses = train(model, GradientSteering(torch.optim.AdamW(parameters, lr=0.05), mode=mode))
    assert losses[-1] < 0.5 * losses[0]


def test_a_loop_of_ones_own_takes_the_same_step() -> None:
    model, parameters = adapted()
    other, others = adapted()
    train(model, GradientSteering(torch.optim.SGD(parameters, lr=0.1), rho=0.1), steps=1)
    optimizer = GradientSteering(torch.optim.SGD(others, lr=0.1), rho=0.1)
    for move in (optimizer.perturb, optimizer.restore):
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(drawn(16, 6)), torch.arange(16) % 4).backward()
        move()
    optimizer.base.step()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)


def test_a_failing_closure_leaves_the_weights() -> None:
    theta = nn.Parameter(torch.tensor([2.0, 0.1]))
    optimizer, calls = GradientSteering(torch.optim.SGD([theta], lr=1.0)), []

    def closure() -> Tensor:
        if calls:
            raise OverflowError
        calls.append(1)
        loss = theta.square().sum()
        loss.backward()
        return loss

    with pytest.raises(OverflowError):
        optimizer.step(closure)
    assert torch.equal(theta.detach(), torch.tensor([2.0, 0.1]))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_is_the_equation(alpha: float | None) -> None:
    w, upstream = drawn(9, 6).double(), drawn(9, 6, seed=5).double()
    lora, scale = LoRAWeight(w, 3, alpha, A=drawn(3, 6, seed=1).double()), 1.0 if alpha is None else 2.0
    assert torch.equal(lora(w), w)
    with torch.no_grad():
        lora.B.copy_(drawn(9, 3, seed=2))
    torch.testing.assert_close(lora(w), w + scale * lora.B @ lora.A)
    (lora(w) * upstream).sum().backward()
    torch.testing.assert_close(lora.A.grad, scale * lora.B.T @ upstream)
    torch.testing.assert_close(lora.B.grad, scale * upstream @ lora.A.T)
    A, B = lora.to_lora_delta()
    torch.testing.assert_close(w + B @ A, lora(w))


def test_lora_takes_pefts_steps() -> None:
    peft = pytest.importorskip("peft")
    model, parameters = adapted(r=3, alpha=6.0)
    theirs = network()
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]), theirs)
    for name in ("0", "2"):
        layer, ours = theirs.get_submodule(name), model.get_submodule(name).parametrizations.weight[0]
        layer.lora_A["default"].weight.data.copy_(ours.A)
        assert ours.A.abs().max() <= 1 / math.sqrt(ours.A.shape[1])  # as peft draws it
    peers = [p for p in theirs.parameters() if p.requires_grad]
    one = train(model, torch.optim.AdamW(parameters, lr=0.01), steps=5)
    other = train(theirs, torch.optim.AdamW(peers, lr=0.01), steps=5)
    assert one == pytest.approx(other, rel=1e-4)
    assert one[-1] < one[0]


def test_copies_and_states_carry_on() -> None:
    model, parameters = adapted()
    optimizer = GradientSteering(torch.optim.Adam(parameters, lr=0.01), rho=0.1)
    train(model, optimizer, steps=2)
    other, others = copy.deepcopy(model), None
    others = [p for p in other.parameters() if p.requires_grad]
    again = GradientSteering(torch.optim.Adam(others, lr=0.5), rho=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, steps=3) == train(other, again, steps=3)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^lam must be in \[0, 1\]"):
        steer_gradient([torch.ones(1)], [torch.ones(1)], lam=2.0)
    with pytest.raises(ValueError, match="^mode must be one of"):
        steer_gradient([torch.ones(1)], [torch.ones(1)], mode="turn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^ref must have shapes"):
        steer_gradient([torch.ones(1)], [torch.ones(2)])
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for options in ({"rho": -1.0}, {"lam": 2.0}, {"mode": "turn"}):
        with pytest.raises(ValueError, match="must be"):
            GradientSteering(base, **options)
    with pytest.raises(ValueError, match="^closure must be a function"):
        GradientSteering(base).step()
    with pytest.raises(ValueError, match="^r must be at least 1"):
        LoRAConfig(r=0, target_modules=["0"])
    with pytest.raises(ValueError, match="^alpha must be positive"):
        LoRAWeight(torch.eye(2), 1, alpha=0.0)
    with pytest.raises(ValueError, match="^A must have shape"):
        LoRAWeight(torch.eye(2), 1, A=torch.ones(2, 2))
