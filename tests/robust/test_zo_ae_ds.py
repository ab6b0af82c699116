from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.robust import BlackBoxDefense, Certificate, certify, num_queries, zo_gradient, zo_surrogate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Counted:
    """A function of copies that counts the samples it is asked about."""

    def __init__(self, f: object) -> None:
        self.f, self.asked, self.largest = f, 0, 0

    def __call__(self, copies: Tensor) -> Tensor:
        self.asked += copies.shape[0] * copies.shape[1]
        self.largest = max(self.largest, len(copies))
        return self.f(copies)  # type: ignore[operator]


@pytest.mark.parametrize("mu", [5e-3, 1.0])
def test_coordinates_are_exact_for_quadratic_functions_at_any_length(mu: float) -> None:
    matrix, slope, z = drawn(6, 6), drawn(6, seed=1), drawn(4, 2, 3, seed=2)
    matrix = matrix + matrix.T

    def f(copies: Tensor) -> Tensor:
        flat = copies.flatten(2)
        return 0.5 * torch.einsum("cbi,ij,cbj->cb", flat, matrix, flat) + flat @ slope

    counted = Counted(f)
    found = zo_gradient(counted, z, mu=mu, chunk=4)
    torch.testing.assert_close(found, (z.flatten(1) @ matrix + slope).view_as(z), rtol=1e-6, atol=1e-6)
    assert counted.asked == 4 * 12 == 4 * num_queries("cge", 6)
    assert counted.largest <= 4
    torch.testing.assert_close(zo_gradient(f, z, mu=mu, chunk=64), found)


def test_random_directions_are_unbiased_with_the_closed_forms_error() -> None:
    slope, dim, q = drawn(10), 10, 5
    z = torch.zeros(4000, dim, dtype=torch.float64)
    found = zo_gradient(lambda copies: copies @ slope, z, method="rge", q=q, generator=seeded())
    error = (found - slope).square().sum(1).mean() / slope.square().sum()
    assert error.item() == pytest.approx((dim - 1) / q, rel=0.05)
    torch.testing.assert_close(found.mean(0), slope, atol=0.08, rtol=0)
    many = zo_gradient(lambda copies: copies @ slope, z[:1], method="rge", q=500 * dim, generator=seeded())
    assert F.cosine_similarity(many[0], slope, dim=0) > 0.99


def test_given_directions_are_used_as_they_are() -> None:
    z = drawn(3, 4)
    directions = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4)
    counted = Counted(lambda copies: copies.square().sum(2))
    found = zo_gradient(counted, z, method="rge", mu=0.01, directions=directions, chunk=3)
    torch.testing.assert_close(found, 2 * z + 0.01)
    assert counted.asked == 3 * 5 == 3 * num_queries("rge", 4, 4)


def test_chunks_change_nothing_but_memory() -> None:
    z = drawn(3, 4)
    found = [
        zo_gradient(lambda c: c.sin().sum(2), z, method="rge", q=12, generator=seeded(3), chunk=chunk)
        for chunk in (12, 64)
    ]
    torch.testing.assert_close(found[0], found[1])


def test_estimates_are_constants_and_single_precision_is_kept() -> None:
    z = drawn(2, 3).float().requires_grad_()
    found = zo_gradient(lambda c: c.square().sum(2), z)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, 2 * z.detach(), atol=1e-2, rtol=1e-3)


def test_the_surrogate_passes_the_estimate_on() -> None:
    layer, x, gradient = nn.Linear(3, 2).double(), drawn(5, 3), drawn(5, 2, seed=1)
    zo_surrogate(layer(x), gradient.requires_grad_()).backward()
    torch.testing.assert_close(layer.weight.grad, gradient.detach().T @ x / 5)
    assert gradient.grad is None


def parts(seed: int = 0) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        query = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        denoiser = nn.Conv2d(1, 1, 3, padding=1)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        decoder = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Unflatten(1, (1, 4, 4)))
    return query.double().eval(), denoiser.double(), encoder.double(), decoder.double()


X = torch.rand(6, 1, 4, 4, generator=seeded(5), dtype=torch.float64)
NOISE = drawn(6, 1, 4, 4, seed=6)


@pytest.mark.parametrize("coded", [True, False])
def test_training_gradients_are_those_of_the_cross_entropy(coded: bool) -> None:
    query, denoiser, encoder, decoder = parts()
    defense = BlackBoxDefense(query, denoiser, *((encoder, decoder) if coded else ()), sigma=0.3, mu=1e-3)
    found = defense.loss(X, noise=NOISE)
    found["total"].backward()
    ours = {name: p.grad.clone() for name, p in defense.named_parameters() if p.grad is not None}
    defense.zero_grad()
    exact = F.cross_entropy(defense(X + 0.3 * NOISE), query(X).argmax(1))
    exact.backward()
    theirs = {name: p.grad for name, p in defense.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, _ in defense.named_parameters() if "decoder" not in name}
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert found["cross_entropy"].item() == pytest.approx(exact.item(), rel=1e-3)
    assert defense.queries == 6 * (1 + 2 * (4 if coded else 16))


def test_the_black_box_and_the_decoder_are_never_trained_nor_held() -> None:
    query, denoiser, encoder, decoder = parts()
    defense = BlackBoxDefense(query, denoiser, encoder, decoder).train()
    assert not decoder.training
    assert not query.training
    defense.loss(X, generator=seeded())["total"].backward()
    assert all(p.grad is None for p in [*query.parameters(), *decoder.parameters()])
    assert not any(name.startswith("query") for name in defense.state_dict())
    frozen = BlackBoxDefense(query, denoiser, encoder, decoder, train_encoder=False)
    assert not any(p.requires_grad for p in frozen.encoder.parameters())
    assert all(p.requires_grad for p in frozen.denoiser.parameters())


def test_labels_take_the_place_of_the_black_boxs_answers() -> None:
    query, *rest = parts()
    defense = BlackBoxDefense(query, *rest, sigma=0.3)
    answers = query(X).argmax(1)
    same = [defense.loss(X, targets, noise=NOISE)["total"].item() for targets in (None, answers)]
    assert same[0] == same[1]
    assert defense.loss(X, (answers + 1) % 3, noise=NOISE)["total"].item() != same[0]
    assert defense.queries == 6 * (1 + 8) + 2 * 6 * 8


def test_without_labels_the_answers_to_clean_samples_are_to_be_kept() -> None:
    query, *rest = parts()
    asked: list[Tensor] = []

    def black_box(x: Tensor) -> Tensor:
        asked.append(x)
        return query(x)

    BlackBoxDefense(black_box, *rest, sigma=5.0).loss(X, noise=NOISE)
    torch.testing.assert_close(asked[0], X, rtol=0, atol=0)
    noisy = query(X + 5.0 * NOISE).argmax(1)
    assert (noisy != query(X).argmax(1)).any()  # at this noise they would differ


def test_the_same_generator_gives_the_same_loss() -> None:
    query, *rest = parts()
    defense = BlackBoxDefense(query, *rest, method="rge", q=5)
    first, again, other = (defense.loss(X, generator=seeded(s))["total"].item() for s in (0, 0, 1))
    assert first == again != other
    assert defense.queries == 3 * 6 * (1 + 6)


def test_state_holds_the_count_of_queries() -> None:
    query, *rest = parts()
    defense = BlackBoxDefense(query, *rest)
    defense.loss(X, generator=seeded())
    other = BlackBoxDefense(query, *parts(1)[1:])
    other.load_state_dict(defense.state_dict())
    torch.testing.assert_close(other.state_dict(), defense.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other(X), defense(X))


def constant(x: Tensor) -> Tensor:
    return F.one_hot(torch.ones(len(x), dtype=torch.int64), 3).float()


def test_a_constant_classifier_has_the_largest_certificate() -> None:
    found = certify(constant, torch.zeros(3, 4), 0.25)
    assert found.labels.tolist() == [1, 1, 1]
    assert found.radius.tolist() == pytest.approx([0.7996444] * 3, abs=1e-5)
    assert found.accuracy(torch.tensor([1, 1, 0]), 0.79) == pytest.approx(2 / 3)
    assert found.accuracy(torch.tensor([1, 1, 0]), 0.81) == 0.0


def test_a_linear_classifier_is_certified_almost_as_far_as_its_boundary() -> None:
    def sign(x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0], x[:, 0]], dim=1)

    x = torch.tensor([[0.3, 9.0], [-0.1, -9.0], [0.0, 0.0]])
    found = certify(sign, x, 0.5, n=20_000, generator=seeded())
    assert found.labels[:2].tolist() == [1, 0]
    assert found.labels[2] == -1
    assert found.radius[2] == 0
    for radius, true in zip(found.radius[:2].tolist(), (0.3, 0.1), strict=True):
        assert true - 0.03 < radius < true


def test_a_certificate_holds_up_to_its_radius_itself() -> None:
    found = Certificate(torch.tensor([1, 1]), torch.tensor([0.5, 0.0]))
    assert found.accuracy(torch.tensor([1, 1]), 0.5) == 0.5
    assert found.accuracy(torch.tensor([1, 1])) == 1.0


def test_votes_do_not_depend_on_how_they_are_batched() -> None:
    x = drawn(3, 4).float()
    weight = drawn(4, 3, seed=1).float()
    found = [certify(lambda v: v @ weight, x, 0.5, n=300, batch_size=b, generator=seeded()) for b in (3, 1000)]
    torch.testing.assert_close(found[0].radius, found[1].radius, atol=0.25, rtol=0)
    assert math.isfinite(found[0].radius.sum())


def test_bad_arguments_are_refused_by_name_and_ask_nothing() -> None:
    z = drawn(2, 3)
    for options, name in (({"mu": 0.0}, "mu"), ({"method": "spsa"}, "method"), ({"chunk": 0}, "chunk")):
        with pytest.raises(ValueError, match=name):
            zo_gradient(lambda c: c.sum(2), z, **options)
    with pytest.raises(ValueError, match="f must give"):
        zo_gradient(lambda c: c.sum(), z)
    with pytest.raises(ValueError, match="directions"):
        zo_gradient(lambda c: c.sum(2), z, method="rge", directions=z)
    with pytest.raises(TypeError, match="z must be floating point"):
        zo_gradient(lambda c: c.sum(2), z.long())
    with pytest.raises(ValueError, match="gradient"):
        zo_surrogate(z, z[:1])
    query, denoiser, encoder, decoder = parts()
    with pytest.raises(ValueError, match="encoder and decoder"):
        BlackBoxDefense(query, denoiser, encoder)
    for options, name in (({"sigma": -1.0}, "sigma"), ({"q": 0}, "q"), ({"method": "x"}, "method")):
        with pytest.raises(ValueError, match=name):
            BlackBoxDefense(query, denoiser, encoder, decoder, **options)
    defense = BlackBoxDefense(query, denoiser, encoder, decoder)
    before = copy.deepcopy(defense.state_dict())
    for call, name in (
        (lambda: defense.loss(X[:0]), "x must"),
        (lambda: defense.loss(X, noise=NOISE[:1]), "noise"),
        (lambda: defense.loss(X, torch.zeros(5, dtype=torch.int64)), "targets"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(TypeError, match="targets"):
        defense.loss(X, torch.zeros(6))
    torch.testing.assert_close(defense.state_dict(), before, rtol=0, atol=0)
    for options, name in (({"sigma": 0.0}, "sigma"), ({"alpha": 1.0}, "alpha"), ({"n": 0}, "n must")):
        with pytest.raises(ValueError, match=name):
            certify(constant, torch.zeros(1, 2), **{"sigma": 0.5, **options})
    with pytest.raises(ValueError, match="x must"):
        certify(constant, torch.zeros(0, 2), 0.5)
    with pytest.raises(ValueError, match="predict must give logits, got NaN"):  # NaN is the largest, to argmax
        certify(lambda x: constant(x) * torch.nan, torch.zeros(1, 2), 0.5)
    assert Certificate(torch.tensor([-1]), torch.tensor([0.0])).accuracy(torch.tensor([0])) == 0.0
