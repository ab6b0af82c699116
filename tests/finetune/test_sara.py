from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.finetune import (
    AdaptedModel,
    SaRAConfig,
    SparseScatter,
    apply_adapter,
    nuclear_norm,
    nuclear_norm_penalty,
    reselect,
    sara_lr,
    smallest_entries,
)


def weight(out: int = 9, inp: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def scatter_of(model: nn.Module, name: str = "0") -> SparseScatter:
    return model.get_submodule(name).parametrizations.weight[0]


def adapted(**options: object) -> tuple[nn.Sequential, AdaptedModel]:
    model = network()
    return model, apply_adapter(model, SaRAConfig(target_modules=["0", "2"], **options))


def test_smallest_entries_by_threshold_and_by_share() -> None:
    w = weight()
    index, threshold = smallest_entries(w, 0.5)
    assert threshold == 0.5
    assert torch.equal(index, (w.flatten().abs() < 0.5).nonzero().squeeze(1))  # strict, signs do not count
    index, threshold = smallest_entries(w, quantile=0.5)
    assert len(index) == 27
    rest = torch.ones(54, dtype=torch.bool).index_fill(0, index, False)
    assert w.flatten()[index].abs().max() < threshold == w.flatten()[rest].abs().min()
    index, threshold = smallest_entries(w, quantile=1.0)
    assert len(index) == 54
    assert threshold == math.inf
    assert torch.equal(smallest_entries(7 * w, quantile=0.3)[0], smallest_entries(w, quantile=0.3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_start_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    scatter = SparseScatter(w, *smallest_entries(w, quantile=0.4))
    assert torch.equal(scatter(w), w)
    assert scatter(w).dtype == dtype
    assert (w.flatten()[scatter.index] < 0).any()  # negative entries keep their sign


def test_gradient_is_the_weights_own_at_the_entries() -> None:
    w, upstream = weight().double(), weight(seed=5).double()
    scatter = SparseScatter(w, *smallest_entries(w, quantile=0.4))
    (scatter(w) * upstream).sum().backward()
    assert torch.equal(scatter.value.grad, upstream.flatten()[scatter.index])


def test_other_entries_never_change() -> None:
    base, (model, adapters) = network(), adapted(quantile=0.3)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(weight(8, 6)).square().mean().backward()
        optimizer.step()
    for name in ("0", "2"):
        before, after = base.get_submodule(name).weight.flatten(), model.get_submodule(name).weight.flatten()
        scatter = scatter_of(model, name)
        others = torch.ones(len(before), dtype=torch.bool).index_fill(0, scatter.index, False)
        assert torch.equal(after[others], before[others])
        assert (after[scatter.index] != before[scatter.index]).all()
    assert adapters.num_trainable() == sum(len(scatter_of(model, n).index) for n in ("0", "2"))
    assert len(optimizer.state[scatter_of(model).value]["exp_avg"]) == len(scatter_of(model).index)


def test_all_entries_without_penalty_are_full_fine_tuning() -> None:
    full, (model, adapters) = network(), adapted(threshold=math.inf)
    weights = [full[0].weight, full[2].weight]
    optimizers = [torch.optim.AdamW(p, lr=0.01, weight_decay=0.1) for p in (weights, adapters.trainable_parameters())]
    for step in range(5):
        for net, optimizer in zip((full, model), optimizers, strict=True):
            optimizer.zero_grad()
            net(weight(8, 6, seed=step)).square().mean().backward()
            optimizer.step()
    assert torch.equal(full[0].weight, model[0].weight)
    assert torch.equal(full[2].weight, model[2].weight)


def test_reselection_goes_on_with_what_is_still_small() -> None:
    model, adapters = adapted(quantile=0.5)
    scatter = scatter_of(model)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=0.1, weight_decay=0.5)
    model(weight(8, 6)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        scatter.value[::2] = 5.0
        scatter.value[1::2] = 0.0
    learned, frozen = model[0].weight.detach().clone(), scatter.index[::2]
    count = reselect(model, optimizer)
    assert torch.equal(scatter.active.nonzero().squeeze(1), torch.arange(1, len(scatter.index), 2))
    assert count == scatter.active.sum() + scatter_of(model, "2").active.sum()
    assert not optimizer.state.get(scatter.value)
    assert torch.equal(model[0].weight, learned)
    for _ in range(3):
        optimizer.zero_grad()
        model(weight(8, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight.flatten()[frozen], learned.flatten()[frozen])  # weight decay or not
    assert (scatter.value.grad[::2] == 0).all()
    assert (model[0].weight.flatten()[scatter.index[1::2]] != 0).all()
    reselect(model)
    assert torch.equal(model[0].weight.flatten()[frozen], learned.flatten()[frozen])
    assert not scatter.active[::2].any()


def test_nuclear_norm_and_its_gradient() -> None:
    matrix = torch.diag(torch.tensor([3.0, 4.0])).requires_grad_(True)
    value = nuclear_norm(matrix)
    value.backward()
    assert value.item() == pytest.approx(7.0)
    torch.testing.assert_close(matrix.grad, torch.eye(2))
    w = weight().double().requires_grad_(True)
    U, _, Vh = torch.linalg.svd(w.detach(), full_matrices=False)
    torch.testing.assert_close(torch.autograd.grad(nuclear_norm(w), w)[0], U @ Vh)
    zero = torch.zeros(3, 2, requires_grad=True)
    nuclear_norm(zero).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 2))
    one = torch.ones(3, 2, requires_grad=True)  # of rank one
    nuclear_norm(one).backward()
    torch.testing.assert_close(one.grad, torch.full((3, 2), 1 / math.sqrt(6)))


def test_penalty_is_of_the_trained_entries_alone() -> None:
    model, _ = adapted(quantile=0.5)
    scatter, w = scatter_of(model), model[0].weight.detach()
    masked = torch.zeros(54).index_copy(0, scatter.index, w.flatten()[scatter.index]).view(9, 6)
    value = nuclear_norm_penalty(model, min_rank_dim=5, which=0)
    assert value.item() == pytest.approx(torch.linalg.svdvals(masked).sum().item(), rel=1e-5)
    value.backward()
    U, _, Vh = torch.linalg.svd(masked, full_matrices=False)
    torch.testing.assert_close(scatter.value.grad, (U @ Vh).flatten()[scatter.index], atol=1e-5, rtol=1e-4)
    assert nuclear_norm_penalty(model, on="delta", min_rank_dim=5).item() == 0.0
    with torch.no_grad():
        scatter.value[0] += 2.0
    assert nuclear_norm_penalty(model, on="delta", min_rank_dim=5).item() == pytest.approx(2.0)


def test_penalty_draws_one_of_the_long_matrices() -> None:
    model, _ = adapted(quantile=0.5)
    each = [nuclear_norm_penalty(model, min_rank_dim=3, which=n).item() for n in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    drawn = {nuclear_norm_penalty(model, min_rank_dim=3, generator=generator).item() for _ in range(20)}
    assert drawn == set(each)
    assert each[0] != each[1]
    assert nuclear_norm_penalty(model).item() == 0.0  # none is long enough
    assert nuclear_norm_penalty(model, min_rank_dim=4, generator=generator).item() == each[0]  # 4 is not above 4


def test_a_weight_without_small_entries_stays_frozen() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.add_(model[0].weight.sign())
    adapters = apply_adapter(model, SaRAConfig(threshold=0.3, target_modules=["0", "2"]))
    assert not scatter_of(model).value.requires_grad
    assert len(scatter_of(model).value) == 0
    assert len(adapters.trainable_parameters()) == 1
    assert torch.isfinite(model(weight(8, 6))).all()
    alone = network()
    with torch.no_grad():
        alone[0].weight.add_(alone[0].weight.sign())
    nothing = apply_adapter(alone, SaRAConfig(threshold=0.3, target_modules=["0"])).trainable_parameters()
    with pytest.raises(ValueError, match="empty"):
        torch.optim.AdamW(nothing)


def test_biases_train_where_they_are_named() -> None:
    model = network()
    apply_adapter(model, SaRAConfig(quantile=1.0, target_modules=["0"], parameters=("weight", "bias")))
    model(weight(8, 6)).square().sum().backward()
    assert model[0].parametrizations.bias[0].value.grad.abs().sum() > 0


def test_state_after_reselection_is_complete() -> None:
    model, adapters = adapted(quantile=0.5)
    with torch.no_grad():
        scatter_of(model).value[::2] += 5.0
    reselect(model)
    other = network()
    restored = apply_adapter(other, SaRAConfig(quantile=0.5, target_modules=["0", "2"]))
    restored.load_adapter_state_dict(copy.deepcopy(adapters.adapter_state_dict()))
    x = weight(8, 6)
    assert torch.equal(other(x), model(x))
    assert torch.equal(scatter_of(other).active, scatter_of(model).active)


def test_lr() -> None:
    assert sara_lr(2e-3) == pytest.approx(4.9659e-4, rel=1e-4)
    assert sara_lr(0.0) == 1e-3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threshold": 0.0}, "^threshold must be positive"),
        ({"quantile": 0.0}, r"^quantile must be in \(0, 1\]"),
        ({"quantile": 1.5}, r"^quantile must be in \(0, 1\]"),
    ],
)
def test_bad_settings(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SaRAConfig(target_modules=["0"], **options)


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="model must have a SparseScatter"):
        nuclear_norm_penalty(network())
    with pytest.raises(ValueError, match="model must have a SparseScatter"):
        reselect(network())
    model, _ = adapted(quantile=0.5)
    with pytest.raises(ValueError, match="^on must be one of"):
        nuclear_norm_penalty(model, on="change")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^which must be in \[0, 1\], got 2"):
        nuclear_norm_penalty(model, min_rank_dim=3, which=2)
    with pytest.raises(ValueError, match="^weight must be finite"):
        smallest_entries(torch.tensor([math.nan]))
    with pytest.raises(TypeError, match="^weight must be floating"):
        smallest_entries(torch.tensor([1]))
