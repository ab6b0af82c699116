from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.federated import FedLoGe, finish, realign_global, realign_local, simplex_etf, simulate, sparse_etf
from trimtab.federated.fedloge import _apart, _ThreeHeads
from trimtab.federated.state_dicts import model_state


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def clients() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = seeded(1)
    return [
        (torch.randn(n, 4, generator=draw), torch.randint(3, (n,), generator=draw) if i else torch.zeros(n).long())
        for i, n in enumerate((9, 12, 20))
    ]


class TestFixedHead:
    def test_a_simplex_frame(self) -> None:
        vectors = simplex_etf(12, 5, generator=seeded())
        wanted = 1.25 * torch.eye(5, dtype=torch.float64) - 0.25
        torch.testing.assert_close(vectors @ vectors.T, wanted, rtol=0, atol=1e-12)

    def test_zeros_norms_and_angles(self) -> None:
        before = sparse_etf(20, 6, steps=0, generator=seeded())
        after = sparse_etf(20, 6, steps=500, lr=2e-3, generator=seeded())
        for vectors in (before, after):
            assert int((vectors == 0).sum()) == int(0.6 * 120)
        assert torch.equal(before == 0, after == 0)
        assert (after.norm(dim=1) - 0.1).abs().max() < 0.06

        def widest(vectors: torch.Tensor) -> float:
            cosines = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
            return (cosines - 3 * torch.eye(6)).max().item()

        assert widest(after) < widest(before) - 0.1

    def test_the_objective_by_hand(self) -> None:
        """Three vectors at 60, 60 and 120 degrees to each other: nearest are 60, 60, 60."""
        angles = torch.tensor([0.0, 60.0, 120.0], dtype=torch.float64).deg2rad()
        vectors = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[0.1], [0.3], [0.2]])
        wanted = 0.2**2 + 0.1**2 - torch.pi / 3
        assert _apart(vectors, 0.1).item() == pytest.approx(wanted, abs=1e-6)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="dim must be at least num_classes"):
            sparse_etf(3, 4)
        with pytest.raises(ValueError, match="sparsity"):
            sparse_etf(8, 4, 1.0)
        with pytest.raises(ValueError, match="norm"):
            sparse_etf(8, 4, norm=0.0)


class TestRealignment:
    weight = torch.randn(4, 7, generator=seeded(2))

    def test_global(self) -> None:
        found = realign_global(self.weight)
        torch.testing.assert_close(found.norm(dim=1), torch.full((4,), 1.7))
        torch.testing.assert_close(F.cosine_similarity(found, self.weight), torch.ones(4))
        torch.testing.assert_close(realign_global(100 * self.weight), found)

    def test_local(self) -> None:
        local = torch.randn(4, 7, generator=seeded(3))
        found = realign_local(self.weight, local)
        torch.testing.assert_close(found.norm(dim=1), self.weight.norm(dim=1) * local.norm(dim=1))
        torch.testing.assert_close(F.cosine_similarity(found, self.weight), torch.ones(4))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="local must have shape"):
            realign_local(self.weight, self.weight[:2])
        with pytest.raises(ValueError, match="scale"):
            realign_global(self.weight, 0.0)
        with pytest.raises(TypeError, match="weight must be floating point"):
            realign_global(torch.ones(2, 2, dtype=torch.long))


class TestClient:
    def heads(self) -> tuple[nn.Sequential, _ThreeHeads, torch.Tensor]:
        model, etf = network(), torch.randn(3, 6, generator=seeded(4))
        return model, _ThreeHeads(model, model[2], etf, model_state(nn.Linear(6, 3))), etf

    def test_each_loss_reaches_its_own_parameters_alone(self) -> None:
        model, heads, etf = self.heads()
        x, y = clients()[1]
        for place in range(3):
            heads.zero_grad()
            F.cross_entropy(heads(x)[place], y).backward()
            touched = {name for name, p in heads.named_parameters() if p.grad is not None and p.grad.any()}
            own = [{"model.0.weight", "model.0.bias"}, {"model.2.weight", "model.2.bias"}]
            assert touched == (own[place] if place < 2 else {"local.weight", "local.bias"})
        features = model[:2](x)
        torch.testing.assert_close(heads(x), torch.stack([features @ etf.T, model(x), heads.local(features)]))

    def test_one_step_is_three_separate_steps(self) -> None:
        x, y = clients()[1]
        etf = torch.randn(3, 6, generator=seeded(4))
        algorithm, model = FedLoGe(0.2, 1, batch_size=50, etf=etf, head="2"), network()
        server = algorithm.init_server(model, 3)
        client = {name: value + 0.1 for name, value in model[2].state_dict().items()}
        update, memory = algorithm.client_update(model, algorithm.configure(server), client, (x, y), generator=seeded())

        plain, local = network(), nn.Linear(6, 3)
        local.load_state_dict(client)
        features = plain[:2](x)
        steps = [
            (plain[:2], F.cross_entropy(features @ etf.T, y)),
            (plain[2], F.cross_entropy(plain[2](features.detach()), y)),
            (local, F.cross_entropy(local(features.detach()), y)),
        ]
        for part, loss in steps:
            for p, slope in zip(part.parameters(), torch.autograd.grad(loss, list(part.parameters())), strict=True):
                p.data.sub_(0.2 * slope)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(update.params[name], value)
        for name, value in local.state_dict().items():
            torch.testing.assert_close(memory[name], value)

    def test_the_fixed_head_never_changes_and_local_heads_stay_with_their_clients(self) -> None:
        algorithm = FedLoGe(0.1, 1, etf_steps=10, head="2", generator=seeded())
        state = simulate(algorithm, network(), clients(), rounds=2, generator=seeded()).state
        again = FedLoGe(0.1, 1, etf_steps=10, head="2", generator=seeded()).init_server(network(), 3)
        assert torch.equal(state.server.memory["etf"], again.memory["etf"])
        assert set(state.clients[0]) == {"weight", "bias"}
        assert not torch.equal(state.clients[0]["weight"], state.clients[1]["weight"])
        # Client 0 has class 0 alone, and its local head began as the global one.
        moved = state.clients[0]["bias"] - network()[2].bias.detach()
        assert (moved > 0).tolist() == [True, False, False]

    def test_finish_realigns_the_head_alone_and_personal_models_begin_before(self) -> None:
        algorithm, model = FedLoGe(0.1, 1, etf_steps=10, head="2", generator=seeded()), network()
        state = simulate(algorithm, model, clients(), rounds=2, generator=seeded()).state
        done = finish(algorithm, model, clients(), state).server.params
        for name, value in state.server.params.items():
            assert torch.equal(done[name], value) == (name != "2.weight")
        torch.testing.assert_close(done["2.weight"], realign_global(state.server.params["2.weight"]))
        personal = algorithm.personal(state.server, state.clients[1])
        wanted = realign_local(state.server.params["2.weight"], state.clients[1]["weight"])
        assert torch.equal(personal["2.weight"], wanted)
        assert torch.equal(personal["0.weight"], state.server.params["0.weight"])

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="etf must have shape"):
            FedLoGe(etf=torch.ones(2, 6), head="2").init_server(network(), 3)
        with pytest.raises(ValueError, match="head must be the name"):
            FedLoGe(etf_steps=0).init_server(network(), 3)
        with pytest.raises(ValueError, match="scale"):
            FedLoGe(scale=-1.0)
