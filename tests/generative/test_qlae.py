"""QLAE: its loss by its definition, what decays and what does not, and the effect of both on a toy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.generative import QuantizedAutoencoder, ScalarQuantizer, decay_groups


def autoencoder(latents: int = 4, **options) -> QuantizedAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, latents))
        decoder = nn.Sequential(nn.Linear(latents, 16), nn.Tanh(), nn.Linear(16, 6), nn.Unflatten(1, (2, 3)))
        return QuantizedAutoencoder(encoder, decoder, ScalarQuantizer(latents, **options)).double()


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_loss_is_cross_entropy_and_one_per_cent_of_each_distance() -> None:
    model, x = autoencoder(), images()
    z = model.encoder(x)
    values = model.quantizer.values
    nearest = (z[..., None] - values).abs().argmin(-1)
    q = torch.stack([values[j][nearest[:, j]] for j in range(4)], 1)
    fit = F.binary_cross_entropy(model.decoder(q).sigmoid(), x)
    torch.testing.assert_close(model.loss(x), fit + 0.02 * (z - q).square().mean())
    assert torch.equal(model.encode(x), nearest)
    torch.testing.assert_close(model.decode(nearest), model.decoder(q).sigmoid())


def test_codebooks_learn_by_their_loss_alone() -> None:
    """The reconstruction's gradient passes the quantizer by: values move only to the latents."""
    model, x = autoencoder(codebook_weight=0.0), images()
    model.loss(x).backward()
    assert not model.quantizer.values.grad.any()
    assert all(bool(p.grad.any()) for p in model.encoder.parameters())


def test_weights_decay_and_biases_and_codebooks_do_not() -> None:
    model = autoencoder()
    groups = decay_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed = {id(p) for p in groups[0]["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == name.endswith("weight"), name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    # A step without gradients shows it: AdamW takes lr * decay off the weights.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=0.5).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name.endswith("weight") else 1.0))


def test_fixed_values_are_in_no_group() -> None:
    model = autoencoder(learnable=False)
    held = [id(p) for group in decay_groups(model) for p in group["params"]]
    assert id(model.quantizer.values) not in held


def test_training_lowers_the_loss_and_codes_stay_in_the_codebook() -> None:
    model, x = autoencoder(), images(32).round()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=1e-2)
    first = model.loss(x).item()
    for _ in range(150):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    code = model(x).code
    for j in range(4):
        distance = (code.values[:, j, None] - model.quantizer.values[j]).abs().min(1).values
        assert distance.max() < 1e-12


def test_state_round_trip() -> None:
    model, other = autoencoder(), autoencoder()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.loss(images()), other.loss(images()))


def test_refusals() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match=r"logits must be of shape \(5, 6\) as x, got shape \(5, 2, 3\)"):
        model.loss(images().flatten(1))
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        decay_groups(model, -0.1)
    with pytest.raises(ValueError, match="z must be of shape"):
        QuantizedAutoencoder(nn.Flatten(), nn.Identity(), ScalarQuantizer(4)).loss(torch.rand(3, 6))
