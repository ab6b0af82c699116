from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.federated import CCVR, GGEUR, ClassMoments, FedAvg, GaussianExpander, simulate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covariances(classes: int = 3, dim: int = 4) -> torch.Tensor:
    a = torch.randn(classes, dim, dim, generator=seeded(5), dtype=torch.float64)
    return a @ a.mT


def points(counts: list[int], dim: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.randn(len(y), dim, generator=seeded(1), dtype=torch.float64), y


class TestExpander:
    def test_counts_and_originals(self) -> None:
        x, y = points([12, 1, 0, 7])
        more, labels = GaussianExpander(covariances(4)).expand(x, y, 10, generator=seeded())
        assert torch.bincount(labels, minlength=4).tolist() == [12, 10, 0, 10]
        assert torch.equal(more[: len(x)], x)
        assert torch.equal(labels[: len(y)], y)

    def test_without_variance_draws_are_their_seeds(self) -> None:
        x, y = points([6, 2])
        expander = GaussianExpander(torch.zeros(2, 4, 4))
        more, labels = expander.expand(x, y, 10, generator=seeded())
        first = more[len(x) :][labels[len(x) :] == 0]
        # 4 are missing and 6 are there: different ones, each once.
        assert len(first.unique(dim=0)) == 4
        assert all((row == x[:6]).all(1).any() for row in first)
        more, labels = expander.expand(x, y, 100, generator=seeded())
        second = more[len(x) :][labels[len(x) :] == 1]
        assert len(second) == 98
        assert len(second.unique(dim=0)) == 2
        assert 20 < (second == x[6]).all(1).sum() < 78

    @pytest.mark.parametrize("scale", ["deviation", "eigenvalue"])
    def test_draws_around_a_point_have_its_mean_and_the_covariance(self, scale) -> None:
        cov = covariances()
        x, y = points([0, 1, 0])
        more, _ = GaussianExpander(cov, scale).expand(x, y, 60_001, generator=seeded(2))
        drawn, wanted = more[1:], cov[1] if scale == "deviation" else cov[1] @ cov[1]
        size = wanted.diagonal().sqrt()
        assert ((drawn.mean(0) - x[0]).abs() / size).max() < 0.02
        assert ((torch.cov(drawn.T) - wanted).abs() / (size[:, None] * size)).max() < 0.03

    def test_a_rank_one_covariance_draws_along_a_line(self) -> None:
        u = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
        x, y = points([1])
        more, _ = GaussianExpander(torch.outer(u, u)[None]).expand(x, y, 50, generator=seeded())
        steps = more[1:] - x
        torch.testing.assert_close(steps, torch.outer(steps @ u / (u @ u), u), rtol=0, atol=1e-6)
        assert steps.abs().max() > 0.5

    def test_reproducible_and_not_from_the_global_generator(self) -> None:
        x, y = points([3, 3])
        expander, before = GaussianExpander(covariances(2)), torch.get_rng_state()
        one, two = (expander.expand(x, y, 9, generator=seeded(7))[0] for _ in range(2))
        assert torch.equal(one, two)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(one, expander.expand(x, y, 9, generator=seeded(8))[0])

    def test_prototypes_share_evenly_and_reach_absent_classes(self) -> None:
        x, y = torch.zeros(2, 1), torch.tensor([0, 0])
        prototypes = torch.tensor([[[10.0], [20.0]], [[30.0], [40.0]]])
        known = torch.tensor([[True, False], [True, True]])
        more, labels = GaussianExpander(torch.zeros(2, 1, 1)).expand(
            x, y, 3002, prototypes=prototypes, known=known, generator=seeded()
        )
        drawn = more[2:][labels[2:] == 0].flatten()
        shares = torch.stack([(drawn == value).float().mean() for value in (0.0, 10.0, 30.0)])
        torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
        assert (more[labels == 1] == 40).all()
        assert (labels == 1).sum() == 3002

    def test_draws_by_hand(self) -> None:
        x, y, cov = torch.tensor([[1.0, 2.0]]), torch.tensor([1]), torch.diag(torch.tensor([4.0, 9.0]))
        noise = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        for scale, sizes in (("deviation", [2.0, 3.0]), ("eigenvalue", [4.0, 9.0])):
            more, _ = GaussianExpander(cov.expand(2, 2, 2), scale).expand(x, y, 3, noise=noise)
            # A factor's columns are eigenvectors up to their signs and order.
            moved = (more[1:] - x).abs().sort(dim=0).values
            wanted = torch.tensor([[sizes[0], 0.0], [0.0, 2 * sizes[1]]])
            torch.testing.assert_close(moved, wanted.sort(dim=0).values)

    def test_bad_input(self) -> None:
        x, y = points([2, 2])
        expander = GaussianExpander(covariances(2))
        with pytest.raises(ValueError, match="noise must have shape"):
            expander.expand(x, y, 5, noise=torch.zeros(5, 4))
        with pytest.raises(ValueError, match="prototypes must have shape"):
            expander.expand(x, y, 5, prototypes=torch.zeros(1, 3, 4))
        with pytest.raises(ValueError, match="x must have shape"):
            expander.expand(x[:, :2], y, 5)
        with pytest.raises(ValueError, match="y must be in"):
            expander.expand(x, y + 1, 5)
        with pytest.raises(ValueError, match="per_class"):
            expander.expand(x, y, -1)
        with pytest.raises(ValueError, match="square"):
            GaussianExpander(torch.zeros(2, 3, 4))
        with pytest.raises(ValueError, match="finite"):
            GaussianExpander(torch.full((1, 2, 2), torch.nan))
        with pytest.raises(ValueError, match="scale"):
            GaussianExpander(covariances(), "cov")  # type: ignore[arg-type]


def clients() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(points([5, 3, 2])[0] + i, points([5, 3, 2])[1]) for i in range(3)] + [
        (torch.randn(4, 4, generator=seeded(9), dtype=torch.float64), torch.tensor([0, 0, 0, 2]))
    ]


def model() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3).double()


def spied(**options) -> tuple[GGEUR, list[torch.Tensor]]:
    """An algorithm that keeps what its base is trained on."""
    seen: list[torch.Tensor] = []

    class Base(FedAvg):
        def client_update(self, model, broadcast, client, data, *, generator):
            assert not any(name.startswith("ggeur") for name in (*broadcast.extras, *client))
            seen.append(torch.cat([data[0], data[1][:, None].double()], 1))
            return super().client_update(model, broadcast, client, data, generator=generator)

    return GGEUR(Base(0.1, batch_size=4), 3, 8, **options), seen


class TestRounds:
    def test_the_server_holds_the_pooled_moments_once(self) -> None:
        algorithm, _ = spied()
        state = simulate(algorithm, model(), clients(), rounds=3, generator=seeded()).state
        x, y = (torch.cat(parts) for parts in zip(*clients(), strict=True))
        pooled = ClassMoments.from_features(x, y, 3)
        sent = algorithm.configure(state.server).extras["ggeur.factors"]
        torch.testing.assert_close(sent @ sent.mT, pooled.covariances(unbiased=False), rtol=0, atol=1e-10)
        assert torch.equal(state.server.memory["ggeur.counts"], pooled.counts)

    def test_with_partial_participation_each_client_is_counted_once(self) -> None:
        algorithm, _ = spied()
        history = simulate(algorithm, model(), clients(), rounds=6, fraction=0.5, generator=seeded())
        took_part = {i for entry in history.rounds for i in entry.participants}
        counts = history.state.server.memory["ggeur.counts"]
        assert counts.sum() == sum(len(clients()[i][1]) for i in took_part)

    def test_first_plain_then_the_same_expanded_data(self) -> None:
        algorithm, seen = spied()
        simulate(algorithm, model(), clients(), rounds=3, generator=seeded())
        first, second, third = seen[:4], seen[4:8], seen[8:]
        assert [len(part) for part in first] == [10, 10, 10, 4]
        assert [len(part) for part in second] == [24, 24, 24, 16]
        assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, second, strict=True))

    def test_prototypes_of_others_fill_absent_classes(self) -> None:
        algorithm, seen = spied(prototypes=True)
        state = simulate(algorithm, model(), clients(), rounds=2, generator=seeded()).state
        assert [len(part) for part in seen[4:]] == [24, 24, 24, 24]
        assert state.server.memory["ggeur.prototypes"].shape == (4, 3, 4)
        assert not state.server.memory["ggeur.known"][3, 1]

    def test_a_client_does_not_draw_around_its_own_means_as_if_they_were_anothers(self) -> None:
        alone = clients()[:1]
        data = []
        for prototypes in (False, True):
            algorithm, seen = spied(prototypes=prototypes)
            simulate(algorithm, model(), alone, rounds=2, generator=seeded())
            data.append(seen[1])
        assert torch.equal(*data)

    def test_works_under_ccvr(self) -> None:
        algorithm = CCVR(spied()[0], head="1")
        net = nn.Sequential(nn.Identity(), model())
        assert simulate(algorithm, net, clients(), rounds=2, generator=seeded()).state.server.round == 2

    def test_bad_arguments(self) -> None:
        for settings in ({"num_classes": 0, "per_class": 5}, {"num_classes": 3, "per_class": -1}):
            with pytest.raises(ValueError, match="must be at least"):
                GGEUR(FedAvg(0.1), **settings)
        with pytest.raises(ValueError, match="scale must be one of"):
            GGEUR(FedAvg(0.1), 3, 5, scale="x")  # type: ignore[arg-type]
