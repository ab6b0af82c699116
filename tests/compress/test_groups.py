from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trimtab.compress import ParameterGroups, blocks, columns, filter_groups, rows, without_filters


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(inner: int = 5) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, inner, 3),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(inner * 4, 3),
        )
        model(torch.randn(16, 2, 6, 6))
    return model.eval()


def test_norms_are_of_all_that_belongs_together() -> None:
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.bias.fill_(0.5)
    groups = filter_groups(nn.Sequential(conv, norm))["0"]
    expected = [(conv.weight[j].square().sum() + conv.bias[j] ** 2 + 1 + 0.25).sqrt() for j in range(3)]
    torch.testing.assert_close(groups.norms(), torch.stack(expected))
    assert (len(groups), groups.size) == (3, 21)


def test_rows_columns_and_blocks_are_views() -> None:
    weight = torch.arange(1.0, 25.0).view(4, 6)
    for groups, norms in (
        (rows(weight), weight.norm(dim=1)),
        (columns(weight), weight.norm(dim=0)),
        (blocks(weight, 2, 3), torch.stack([weight[i : i + 2, j : j + 3].norm() for i in (0, 2) for j in (0, 3)])),
        (ParameterGroups([weight], depth=2), weight.flatten()),
    ):
        torch.testing.assert_close(groups.norms(), norms)
    blocks(weight, 2, 3).scale_(torch.tensor([1.0, 0.0, 1.0, 2.0]))
    assert not weight[:2, 3:].any()
    assert weight[3, 5] == 48
    assert weight[0, 0] == 1


def test_views_follow_a_moved_parameter() -> None:
    layer = nn.Linear(3, 2)
    groups = rows(layer.weight)
    layer.double()
    assert groups.norms().dtype == torch.float64
    groups.scale_(torch.zeros(2))
    assert not layer.weight.any()


def test_the_norm_of_zero_has_a_finite_gradient() -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    rows(weight).norms().sum().backward()
    assert not weight.grad.any()


def test_bad_groups_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="views"):
        ParameterGroups([])
    with pytest.raises(ValueError, match="parameters"):
        ParameterGroups([torch.ones(2, 3), torch.ones(3)])
    with pytest.raises(ValueError, match="weight"):
        blocks(torch.ones(3, 4), 2, 2)
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match="factors"):
        rows(weight).scale_(torch.zeros(3))
    assert weight.all()


KEPT = {"0": torch.tensor([0, 2, 3]), "3": torch.tensor([1, 4])}


def test_without_zero_filters_nothing_changes() -> None:
    model = chain()
    for name, groups in filter_groups(model).items():
        groups.scale_(torch.zeros(len(groups)).index_fill(0, KEPT[name], 1.0))
    small = without_filters(model, KEPT)
    x = torch.randn(3, 2, 6, 6, generator=seeded())
    torch.testing.assert_close(small(x), model(x))
    assert [type(layer) for layer in small] == [type(layer) for layer in model]
    assert small[0].weight.shape == (3, 2, 3, 3)
    assert (small[3].in_channels, small[3].out_channels, small[4].num_features) == (3, 2, 2)
    assert small[8].weight.shape == (3, 8)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_model_is_left_as_it_is() -> None:
    model = chain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    without_filters(model, KEPT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(2, 2, 6, 6, generator=seeded())
    assert torch.equal(without_filters(model, {})(x), model(x))


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (chain(), {"1": torch.tensor([0])}),
        (chain(), {"0": torch.tensor([4])}),
        (chain(), {"0": torch.tensor([], dtype=torch.long)}),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), {"0": torch.tensor([1])}),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(6, 2)), {"0": torch.tensor([1])}),
    ],
)
def test_what_is_no_chain_is_refused(model: nn.Module, kept: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"kept|model|must read"):
        without_filters(model, kept)


class Residual(nn.Module):
    """Convolutions of which the first and the last are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.last(self.norm(self.inner(x)).relu())
        return self.head(x.mean((2, 3)).view(x.size(0), -1))


def test_filters_that_a_sum_ties_are_refused_and_others_go() -> None:
    model, x, some = Residual().eval(), torch.rand(2, 1, 5, 5), torch.tensor([0, 2])
    before = model(x)
    for name in ("first", "last"):
        with pytest.raises(ValueError, match=f"what {name} makes"):
            without_filters(model, {name: some})
    assert torch.equal(model(x), before)
    small = without_filters(model, {"first": torch.arange(4), "inner": some})
    assert small.inner.out_channels == small.last.in_channels == 2
    assert small(x).shape == before.shape


def odd_chain() -> nn.Sequential:
    """Strides, dilation, no bias, a slope for each channel, and norms that have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 5, 3, stride=2, dilation=2, bias=False),
            nn.BatchNorm2d(5),
            nn.PReLU(5),
            nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular"),
            nn.InstanceNorm2d(4, affine=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 9, 2),
        )
        model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2), model[2].weight.data.uniform_()
        return model.eval()


@pytest.mark.parametrize("kept", [{"0": [0, 3]}, {"0": [4, 1]}, {"3": [2]}, {"0": [1], "3": [3, 0]}])
def test_the_thin_network_is_the_one_with_zeros(kept: dict[str, list[int]]) -> None:
    model, x = odd_chain(), torch.rand(2, 1, 10, 10)
    zeros = copy.deepcopy(model)
    for name, filters in kept.items():
        gone = [n for n in range(len(zeros.get_submodule(name).weight)) if n not in filters]
        norm = zeros[int(name) + 1]
        for part in (zeros.get_submodule(name).weight, zeros.get_submodule(name).bias, norm.weight, norm.bias):
            if part is not None:
                part.data[gone] = 0
    small = without_filters(model, {name: torch.tensor(filters) for name, filters in kept.items()})
    torch.testing.assert_close(small(x), zeros(x))


def test_what_does_not_train_does_not_train_afterwards() -> None:
    model = odd_chain()
    model[3].weight.requires_grad_(False), model[1].bias.requires_grad_(False)
    small = without_filters(model, {"0": torch.tensor([0, 3]), "3": torch.tensor([1])})
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == wanted


@pytest.mark.parametrize(
    ("middle", "kept", "error", "message"),
    [
        (nn.ReLU(), torch.tensor([True, False, True, False]), TypeError, "vectors of indices, int64, got torch.bool"),
        (nn.ReLU(), [0, 1], TypeError, "vectors of indices, int64, got list"),
        (nn.ReLU(), torch.tensor([2, 0, 2]), ValueError, "each filter once"),
        (nn.GroupNorm(1, 4, affine=False), torch.tensor([0, 1]), ValueError, "GroupNorm"),
        (nn.ConvTranspose2d(4, 4, 1), torch.tensor([0, 1]), ValueError, "ConvTranspose2d"),
    ],
)
def test_what_would_make_another_network_is_refused(
    middle: nn.Module, kept: object, error: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), middle, nn.Conv2d(4, 2, 3))
    with pytest.raises(error, match=message):
        without_filters(model, {"0": kept})  # type: ignore[dict-item]
