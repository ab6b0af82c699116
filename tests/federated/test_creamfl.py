"""Representations of public pairs: how clients are weighted, what pulls them, and what the server distils."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.federated import (
    CreamFLClient,
    CreamFLServer,
    client_contrast,
    contrastive_weights,
    distillation,
    ensemble,
    fuse,
    inter_modal_loss,
    intra_modal_loss,
    represent,
)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_weights_are_a_softmax_over_clients_of_how_well_each_finds_its_partner() -> None:
    Z, G = unit(3, 5, 4), unit(5, 4, seed=1)
    scores = torch.stack([(part @ G.T).log_softmax(1).diagonal() for part in Z])
    weights = contrastive_weights(Z, G)
    torch.testing.assert_close(weights, scores.exp() / scores.exp().sum(0))
    torch.testing.assert_close(weights.sum(0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(contrastive_weights(Z, G, chunk=2), weights)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(contrastive_weights(Z[order], G), weights[order])


def test_equal_clients_count_alike_and_a_wrong_one_less() -> None:
    Z, G = unit(1, 5, 4).expand(3, 5, 4), torch.eye(6, dtype=torch.float64)
    weights = contrastive_weights(Z, unit(5, 4, seed=1))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
    torch.testing.assert_close(ensemble(Z, weights), Z[0])
    right, wrong = contrastive_weights(torch.stack([G, G.roll(1, 0)]), G)
    torch.testing.assert_close(right / wrong, torch.full_like(right, math.e))


def test_losses_in_closed_form() -> None:
    G, index = torch.eye(6, dtype=torch.float64), torch.tensor([4, 1])
    assert inter_modal_loss(G[index], G, index).item() == pytest.approx(-2 + math.log(math.e**2 + 5))
    assert inter_modal_loss(G[index], G, index, 1.0).item() == pytest.approx(-1 + math.log(math.e + 5))
    assert intra_modal_loss(G, G, G).item() == pytest.approx(math.log(2))
    assert intra_modal_loss(G, G, G.roll(1, 0)).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert intra_modal_loss(G, G.roll(1, 0), G, 1.0).item() == pytest.approx(math.log(1 + math.e))


def test_gradients_pass_to_the_client_alone() -> None:
    z, own, old, other = (unit(4, 3, seed=seed).requires_grad_() for seed in range(4))
    index = torch.arange(4)
    (intra_modal_loss(z, own, old) + inter_modal_loss(z, other, index)).backward()
    assert z.grad is not None
    assert own.grad is old.grad is other.grad is None
    assert torch.autograd.gradcheck(
        lambda z: intra_modal_loss(z, own, old) + inter_modal_loss(z, other, index), z.detach().requires_grad_()
    )
    target = unit(4, 3, seed=8).requires_grad_()
    distillation({"image": z}, {"image": target}, index).backward()
    assert target.grad is None


def test_what_pulls_a_client() -> None:
    shared = {"image": unit(6, 3), "text": unit(6, 3, seed=1)}
    old = {"image": unit(6, 3, seed=2), "text": unit(6, 3, seed=3)}
    index = torch.tensor([5, 0, 2])
    z = {"image": unit(3, 3, seed=4), "text": unit(3, 3, seed=5)}
    intra = {name: intra_modal_loss(z[name], shared[name][index], old[name][index]) for name in z}
    inter = {
        "image": inter_modal_loss(z["image"], shared["text"], index),
        "text": inter_modal_loss(z["text"], shared["image"], index),
    }
    one = client_contrast({"image": z["image"]}, shared, old, index)
    torch.testing.assert_close(one["total"], 0.5 * (intra["image"] + inter["image"]))
    both = client_contrast(z, shared, old, index, weight=2.0)
    torch.testing.assert_close(both["intra"], (intra["image"] + intra["text"]) / 2)
    torch.testing.assert_close(both["inter"], inter["image"] + inter["text"])
    torch.testing.assert_close(both["total"], 2 * (both["intra"] + both["inter"]))
    assert not client_contrast(z, shared, old, index, weight=0.0)["total"].any()


def test_fusing() -> None:
    shared = {"image": unit(5, 3), "text": unit(5, 3, seed=1)}
    uploads = [{"image": unit(5, 3, seed=2)}, {"image": unit(5, 3, seed=3), "text": unit(5, 3, seed=4)}]
    fused, plain = fuse(uploads, shared), fuse(uploads, shared, "mean")
    Z = torch.stack([upload["image"] for upload in uploads])
    torch.testing.assert_close(fused["image"], ensemble(Z, contrastive_weights(Z, shared["text"])))
    torch.testing.assert_close(plain["image"], Z.mean(0))
    torch.testing.assert_close(fused["text"], uploads[1]["text"])  # the only one
    assert fuse(uploads[:1], shared).keys() == {"image"}
    assert fuse([], shared) == {}


def test_distillation_adds_up_what_there_is() -> None:
    z, index = {"image": unit(2, 3), "text": unit(2, 3, seed=1)}, torch.tensor([3, 1])
    fused = {"image": unit(4, 3, seed=2), "text": unit(4, 3, seed=3)}
    apart = {name: (z[name] - fused[name][index]).square().mean() for name in z}
    torch.testing.assert_close(distillation(z, fused, index), 0.3 * (apart["image"] + apart["text"]))
    torch.testing.assert_close(distillation(z, {"text": fused["text"]}, index, 1.0), apart["text"])
    half = distillation({"image": z["image"].bfloat16()}, {"image": fused["image"].float()}, index)
    assert half.dtype == torch.float32


def test_representing_leaves_the_encoder_as_it_is() -> None:
    encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    x = 5 + torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    found = represent(encoder, x, batch_size=2)
    torch.testing.assert_close(found, F.normalize(x / (1 + 1e-5) ** 0.5, dim=1))
    assert encoder.training
    assert not encoder[0].running_mean.any()
    assert not found.requires_grad


def parties() -> tuple[CreamFLServer, list[CreamFLClient], dict[str, Tensor]]:
    """A server of images and texts, a client of texts and one of both, with networks of their own, and public pairs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        server = CreamFLServer({"image": nn.Linear(6, 4), "text": nn.EmbeddingBag(10, 4)})
        texts = CreamFLClient({"text": nn.EmbeddingBag(10, 4, mode="max")})
        image = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
        both = CreamFLClient({"image": image, "text": nn.EmbeddingBag(10, 4)}, temperature=0.2, weight=2.0)
        return server, [texts, both], {"image": torch.randn(8, 6), "text": torch.randint(10, (8, 5))}


def test_a_round_is_made_of_the_pieces() -> None:
    server, clients, public = parties()
    index = torch.tensor([6, 1, 3])
    batch = {name: x[index] for name, x in public.items()}
    shared = server.share(public)
    assert {name: z.shape for name, z in shared.items()} == {"image": (8, 4), "text": (8, 4)}
    both = clients[1]
    both.begin(shared, public)
    old = {name: z.clone() for name, z in both.old.items()}
    with torch.no_grad():  # what the client learns from its own data
        both.encoders["text"].weight.mul_(-0.5).add_(0.3)
    z = both.features(batch)
    wanted = client_contrast(z, shared, old, index, temperature=0.2, weight=2.0)
    # The old representations are those of before, though the network has moved on.
    again = both.step(batch, index)
    torch.testing.assert_close(again["inter"], wanted["inter"])
    torch.testing.assert_close(again["total"], 2 * (again["intra"] + again["inter"]))
    assert not torch.allclose(both.upload(public)["text"], old["text"])
    clients[0].begin(shared, public)
    assert clients[0].step(batch, index).keys() == {"intra", "inter", "total"}
    uploads = [client.upload(public) for client in clients]
    assert [sorted(upload) for upload in uploads] == [["text"], ["image", "text"]]
    server.receive(uploads)
    torch.testing.assert_close(server.fused, fuse(uploads, shared))
    found = server.step(batch, index)
    torch.testing.assert_close(found["total"], distillation(server.features(batch), server.fused, index))
    found["total"].backward()
    assert all(p.grad is not None for p in server.parameters())
    assert all(p.grad is None for client in clients for p in client.parameters())
    server.share(public)
    assert not server.fused


def test_distillation_brings_the_server_to_the_clients() -> None:
    server, clients, public = parties()
    shared = server.share(public)
    for client in clients:
        client.begin(shared, public)
    server.receive([client.upload(public) for client in clients])
    optimizer, index = torch.optim.Adam(server.parameters(), lr=0.05), torch.arange(8)
    losses = []
    for _ in range(30):
        loss = server.step(public, index)["total"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_the_contrast_brings_a_client_to_the_server() -> None:
    server, (client, _), public = parties()
    shared, index = server.share(public), torch.arange(8)
    client.begin(shared, public)
    before = (client.old["text"] * shared["text"]).sum(1).mean()
    optimizer = torch.optim.Adam(client.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        client.step(public, index)["intra"].backward()
        optimizer.step()
    assert (client.upload(public)["text"] * shared["text"]).sum(1).mean() > before + 0.2


def test_a_party_goes_on_where_it_stopped() -> None:
    server, (_, client), public = parties()
    index = torch.arange(8)
    client.begin(server.share(public), public)
    server.receive([client.upload(public)])
    for party, other in ((server, CreamFLServer(server.encoders)), (client, CreamFLClient(client.encoders))):
        other.load_state_dict(party.state_dict())
        other.weight = party.weight
        if isinstance(other, CreamFLClient):
            other.temperature = 0.2
        assert torch.equal(other.step(public, index)["total"], party.step(public, index)["total"])
        with pytest.raises(ValueError, match="state"):
            other.load_state_dict({"weights.image": index})
    assert sorted(client.state_dict()) == ["old.image", "old.text", "shared.image", "shared.text"]


def test_weights_of_zero_switch_it_off() -> None:
    server, (_, client), public = parties()
    server.weight = client.weight = 0.0
    client.begin(server.share(public), public)
    server.receive([client.upload(public)])
    for party in (server, client):
        party.step(public, torch.arange(8))["total"].backward()
        assert not any(p.grad.any() for p in party.parameters() if p.grad is not None)


def test_parties_out_of_turn_are_refused() -> None:
    server, (client, _), public = parties()
    index = torch.arange(8)
    with pytest.raises(ValueError, match="after begin"):
        client.step(public, index)
    with pytest.raises(ValueError, match="after share"):
        server.receive([client.upload(public)])
    shared = server.share(public)
    with pytest.raises(ValueError, match="after receive"):
        server.step(public, index)
    with pytest.raises(ValueError, match="modalities"):
        server.share({"image": public["image"]})
    with pytest.raises(ValueError, match="modalities"):
        CreamFLClient({"sound": nn.Linear(6, 4)}).begin(shared, public)
    with pytest.raises(ValueError, match="encoders"):
        CreamFLServer({"image": nn.Linear(6, 4)})
    with pytest.raises(ValueError, match="encoders"):
        CreamFLClient({})
    with pytest.raises(ValueError, match="temperature"):
        CreamFLClient(client.encoders, temperature=0.0)
    with pytest.raises(ValueError, match="weighting"):
        CreamFLServer(server.encoders, weighting="median")  # type: ignore[arg-type]


def test_what_does_not_fit_is_named() -> None:
    G, index = unit(4, 3), torch.arange(4)
    shared = {"image": G, "text": G}
    with pytest.raises(ValueError, match="Z and G_other"):
        contrastive_weights(G, G)
    with pytest.raises(ValueError, match="Z and G_other"):
        contrastive_weights(unit(0, 4, 3), G)
    with pytest.raises(ValueError, match="chunk"):
        contrastive_weights(G[None], G, chunk=0)
    with pytest.raises(ValueError, match="weights"):
        ensemble(G[None], torch.ones(2, 4))
    with pytest.raises(ValueError, match="index"):
        inter_modal_loss(G, G, index[:2])
    with pytest.raises(TypeError, match="index"):
        inter_modal_loss(G, G, index.double())
    with pytest.raises(ValueError, match="filled"):
        inter_modal_loss(G[:0], G, index[:0])
    with pytest.raises(ValueError, match="temperature"):
        inter_modal_loss(G, G, index, 0.0)
    with pytest.raises(ValueError, match="old"):
        intra_modal_loss(G, G, G[:2])
    with pytest.raises(ValueError, match="shared"):
        client_contrast({"image": G}, {"image": G}, shared, index)
    with pytest.raises(ValueError, match="modalities"):
        client_contrast({"sound": G}, shared, shared, index)
    with pytest.raises(ValueError, match="old"):
        client_contrast({"image": G}, shared, {"text": G}, index)
    with pytest.raises(ValueError, match="uploads' image"):
        fuse([{"image": G[:2]}], shared)
    with pytest.raises(ValueError, match="weighting"):
        fuse([], shared, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fused"):
        distillation({"image": G}, {"text": G}, index)
    with pytest.raises(ValueError, match="features' image"):
        distillation({"image": G}, {"image": G[:, :2]}, index)


@pytest.mark.parametrize("wrong", [-1, -100, 3])
def test_pairs_that_there_are_not_are_refused(wrong: int) -> None:
    G, index = torch.eye(3), torch.tensor([0, wrong])
    both, one = {"image": G, "text": G}, {"image": G[:2]}
    for call in (
        lambda: inter_modal_loss(G[:2], G, index),
        lambda: client_contrast(one, both, both, index),
        lambda: distillation(one, {"image": G}, index),
    ):
        with pytest.raises(ValueError, match=rf"index must be in \[0, 3\), got {wrong}"):
            call()


def test_a_fused_modality_counts_once_whoever_sent_it() -> None:
    """The release counts it once more where a client has both."""
    shared = {"image": unit(5, 4), "text": unit(5, 4, seed=1)}
    uploads = [
        {"image": unit(5, 4, seed=2)},
        {"text": unit(5, 4, seed=3)},
        {"image": unit(5, 4, seed=4), "text": shared["image"]},
    ]
    fused, features, index = (
        fuse(uploads, shared),
        {"image": unit(2, 4, seed=5), "text": unit(2, 4, seed=6)},
        torch.tensor([4, 1]),
    )
    once = sum((features[name] - fused[name][index]).square().sum() / 8 for name in ("image", "text"))
    torch.testing.assert_close(distillation(features, fused, index), 0.3 * once)
