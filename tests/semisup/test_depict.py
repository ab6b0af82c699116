from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_blobs
from torch import Tensor, nn

from trimtab.ops.cluster_scores import cluster_accuracy
from trimtab.semisup import (
    DEPICT,
    DenoisingAutoencoder,
    conv_autoencoder,
    depict_targets,
    layerwise_reconstruction_loss,
    mlp_autoencoder,
)


def predictions(seed: int, n: int = 30, k: int = 4) -> Tensor:
    return (2 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(1)


def test_the_closed_form() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    q = depict_targets(p)
    a, b = 0.6 / 1.5**0.5, 0.4 / 0.5**0.5
    torch.testing.assert_close(q[1], torch.tensor([a, b], dtype=torch.float64) / (a + b))
    sharp = depict_targets(p, "dec")
    torch.testing.assert_close(
        sharp[1, 0] / sharp[1, 1], torch.tensor((0.36 / 1.5) / (0.16 / 0.5), dtype=torch.float64)
    )


@pytest.mark.parametrize("k", [2, 5])
def test_clusters_of_one_size_leave_predictions_as_they_are(k: int) -> None:
    p = torch.stack([torch.roll(torch.linspace(1, 2, k, dtype=torch.float64), i) for i in range(k)])
    p = p / p.sum(1, keepdim=True)
    torch.testing.assert_close(depict_targets(p), p)
    torch.testing.assert_close(depict_targets(p, "dec"), p.square() / p.square().sum(1, keepdim=True))


def objective(q: Tensor, p: Tensor) -> float:
    sizes = q.mean(0)
    return float((q * (q / p).log()).sum(1).mean() + (sizes * (sizes * len(sizes)).log()).sum())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_targets_lower_the_objective_and_the_fixed_point_lowers_it_further(seed: int) -> None:
    p = predictions(seed)
    q = depict_targets(p)
    torch.testing.assert_close(q.sum(1), torch.ones(30, dtype=torch.float64))
    best = q
    for _ in range(200):
        step = p / best.mean(0)
        best = (best * step / step.sum(1, keepdim=True)).sqrt()
        best = best / best.sum(1, keepdim=True)
    assert objective(best, p) <= objective(q, p) + 1e-12 <= objective(p, p) + 2e-12


def test_targets_are_constants_of_the_whole_set_in_any_order() -> None:
    p = predictions(0).requires_grad_()
    q = depict_targets(p)
    assert not q.requires_grad
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(depict_targets(p[order]), q[order])
    assert not torch.allclose(depict_targets(p[:10]), q[:10])
    empty = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(depict_targets(empty), empty)


def test_layers_are_reconstructed_from_the_noisy_path_and_clean_ones_are_constants() -> None:
    torch.manual_seed(0)
    autoencoder = mlp_autoencoder(6, 2, hidden=(5, 4)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    clean = autoencoder(x)
    assert [h.shape[1] for h in clean.activations] == [6, 5, 4]
    assert [r.shape[1] for r in clean.reconstructions] == [6, 5, 4]
    assert torch.equal(clean.activations[0], x)
    assert torch.equal(clean.code, autoencoder.encode(x))
    torch.testing.assert_close(autoencoder.encoder[0](x), clean.activations[1])
    torch.testing.assert_close(autoencoder.decoder[0](clean.code), clean.reconstructions[2])
    torch.testing.assert_close(autoencoder.decoder[2](clean.reconstructions[1]), clean.reconstructions[0])
    loss = layerwise_reconstruction_loss(clean.reconstructions, clean.activations, 0.3)
    errors = [(r - h).square().mean() for r, h in zip(clean.reconstructions, clean.activations, strict=True)]
    torch.testing.assert_close(loss, errors[0] + 0.3 * (errors[1] + errors[2]))
    held = [torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    layerwise_reconstruction_loss(held[:1], held[1:]).backward()
    assert held[1].grad is None
    torch.testing.assert_close(held[0].grad, torch.full((2,), -1.0))


def test_noise_drops_a_share_and_keeps_the_mean() -> None:
    autoencoder = DenoisingAutoencoder([nn.Identity()], [nn.Identity()], dropout=0.25)
    x = torch.ones(4, 10_000)
    noisy = autoencoder(x, noisy=True, generator=torch.Generator().manual_seed(0)).code
    assert float((noisy == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(noisy.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(autoencoder(x).code, x)
    again = autoencoder(x, noisy=True, generator=torch.Generator().manual_seed(0)).code
    assert torch.equal(noisy, again)


@pytest.mark.parametrize("side", [8, 13, 14, 28])
def test_images_come_back_in_their_size(side: int) -> None:
    autoencoder = conv_autoencoder((1, side, side + 1), 7, channels=(3, 4), batch_norm=True)
    found = autoencoder(torch.zeros(2, 1, side, side + 1), noisy=True)
    assert found.code.shape == (2, 7)
    for r, h in zip(found.reconstructions, found.activations, strict=True):
        assert r.shape == h.shape


QUICK: dict[str, Any] = {"pretrain_epochs": 60, "init_epochs": 2, "epochs": 5, "random_state": 0}


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return make_blobs(150, 6, centers=3, cluster_std=1.0, random_state=seed)


@pytest.mark.parametrize("targets", ["paper", "dec"])
def test_blobs_are_found(targets: str) -> None:
    X, y = blobs()
    found = DEPICT(3, targets=targets, **QUICK).fit(X)
    assert cluster_accuracy(y, found.labels_) > 0.95
    assert found.transform(X).shape == (150, 3)
    np.testing.assert_allclose(found.targets_.sum(1), 1, rtol=1e-5)


def test_the_head_starts_at_the_normalised_centres_of_k_means() -> None:
    X, _ = blobs(1)
    found = DEPICT(3, **{**QUICK, "init_epochs": 0, "epochs": 0}).fit(X)
    norms = found.head_.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3))
    assert not found.head_.bias.detach().any()
    codes = found.transform(X)
    centers = np.stack([codes[found.initial_labels_ == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(
        found.head_.weight.detach().numpy(), centers / np.linalg.norm(centers, axis=1, keepdims=True), atol=1e-4
    )
    assert found.n_iter_ == 0


def test_units_and_origin_do_not_matter() -> None:
    X, _ = blobs(2)
    first = DEPICT(3, **QUICK).fit_predict(X)
    for moved in (X * 1e4, X + 1e3):
        assert (DEPICT(3, **QUICK).fit_predict(moved) == first).mean() > 0.98


def test_a_given_autoencoder_is_copied_and_images_are_taken() -> None:
    torch.manual_seed(0)
    autoencoder = conv_autoencoder((1, 6, 6), 4, channels=(3,))
    kept = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    X = np.random.default_rng(0).random((40, 1, 6, 6))
    found = DEPICT(3, autoencoder=autoencoder, **QUICK).fit(X)
    assert found.transform(X).shape == (40, 4)
    assert all(torch.equal(value, autoencoder.state_dict()[name]) for name, value in kept.items())
    assert DEPICT(3, **{**QUICK, "pretrain_epochs": 1}).fit(X).labels_.shape == (40,)


def test_it_stops_where_targets_rest() -> None:
    X, _ = blobs()
    assert DEPICT(3, **{**QUICK, "tol": 1.0}).fit(X).n_iter_ == 1


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: depict_targets(torch.ones(2, 2)), "p must"),
        (lambda: depict_targets(torch.tensor([[1.5, -0.5]])), "p must"),
        (lambda: depict_targets(torch.zeros(0, 2)), "p must"),
        (lambda: depict_targets(torch.full((2, 2), math.nan)), "p must be finite"),
        (lambda: depict_targets(predictions(0), "sharp"), "targets"),
        (lambda: layerwise_reconstruction_loss([], []), "reconstructions"),
        (lambda: DenoisingAutoencoder([nn.Identity()], []), "decoder"),
        (lambda: DenoisingAutoencoder([nn.Identity()], [nn.Identity()], dropout=1.0), "dropout"),
        (lambda: DEPICT(0).fit(blobs()[0]), "n_clusters"),
        (lambda: DEPICT(10).fit(blobs()[0][:5]), "n_clusters"),
        (lambda: DEPICT(3, targets="dce").fit(blobs()[0]), "targets"),
        (lambda: DEPICT(3, epochs=-1).fit(blobs()[0]), "epochs"),
        (lambda: DEPICT(3, lr=0.0).fit(blobs()[0]), "lr"),
        (lambda: DEPICT(3, layer_weight=-1.0).fit(blobs()[0]), "layer_weight"),
        (lambda: DEPICT(3).fit(np.zeros((9, 2, 2))), "X must be vectors or images"),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()
    with pytest.raises(TypeError, match="p must be floating point"):
        depict_targets(torch.ones(2, 1, dtype=torch.int64))
