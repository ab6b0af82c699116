"""AutoDiffusion: what every candidate keeps, optima that are known, the two stages, and skipped blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    Candidate,
    EDMPreconditioned,
    LayerSkipping,
    ddim,
    deis_rk,
    grids,
    sampling_search,
    skipped,
)
from trimtab.nets import DenoisingMLP


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(wanted: tuple[int, ...]):
    return lambda candidate: sum((a - b) ** 2 for a, b in zip(candidate.steps, wanted, strict=True))


def test_every_candidate_keeps_the_rules_and_is_scored_once() -> None:
    seen: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        assert len(candidate.steps) == len(candidate.skips)
        assert list(candidate.steps) == sorted(set(candidate.steps))
        assert candidate.steps[0] >= 0
        assert candidate.steps[-1] < 50
        assert candidate.cost(6) <= 4 * 6
        assert all(0 <= block < 6 for skip in candidate.skips for block in skip)
        assert max(map(len, candidate.skips)) <= 3  # half of six
        seen.append(candidate)
        return float(torch.rand((), generator=noise))

    noise = seeded(9)
    found = sampling_search(evaluate, 50, 4, blocks=6, max_skip=0.5, generations=12, population=20, mutations=8,
                            crossovers=6, generator=seeded())  # fmt: skip
    assert len(set(seen)) == len(seen) == found.evaluations
    assert seen[0] == Candidate((0, 12, 25, 37), (frozenset(),) * 4)
    assert list(found.history) == sorted(found.history, reverse=True)
    assert len(found.history) == 12
    assert found.score == found.history[-1]
    # What is saved by skipping pays for steps, at most twice as many here.
    assert 4 < max(len(candidate.steps) for candidate in seen) <= 8
    assert min(len(candidate.steps) for candidate in seen) >= 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_known_optimum_is_found(seed: int) -> None:
    found = sampling_search(distance((2, 3, 17)), 20, 3, generator=seeded(seed))
    assert found.best.steps == (2, 3, 17)
    assert found.score == 0
    assert found.evaluations <= 500


def test_uniform_steps_are_among_those_compared() -> None:
    found = sampling_search(distance((0, 5, 10, 15)), 20, 4, generations=1, population=2, mutations=1, crossovers=1)
    assert found.best.steps == (0, 5, 10, 15)


def test_equal_seeds_give_equal_searches() -> None:
    runs = [sampling_search(distance((7, 300, 801)), 1000, 3, generator=seeded(seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0].history != runs[2].history


def test_evolution_is_better_than_as_many_draws() -> None:
    """Without children all of the population is drawn at random."""
    wanted = (100, 222, 333, 444, 555)
    evolved, drawn = (
        [sampling_search(distance(wanted), 1000, 5, generator=seeded(seed), **settings).score for seed in range(3)]
        for settings in ({}, {"mutations": 0, "crossovers": 0})
    )
    assert max(evolved) < min(drawn)


def test_blocks_are_skipped_in_the_second_stage_only() -> None:
    """The steps are right at once, so that stage two begins after the second generation; then the share grows."""
    order: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        order.append(candidate)
        even = candidate.steps == (0, 25, 50, 75) and not any(candidate.skips)
        return 1.0 if even else 2.0 - 0.01 * sum(map(len, candidate.skips))

    settings = {"blocks": 10, "max_skip": 0.5, "generations": 8, "population": 20, "mutations": 8, "crossovers": 6}
    sampling_search(evaluate, 100, 4, generator=seeded(), **settings)
    most = [max(len(skip) for candidate in order[i : i + 20] for skip in candidate.skips) for i in (0, 20, 40, 60, 120)]
    assert most[0] == most[1] == 0
    assert most[2] <= 1
    assert most[3] <= 2
    assert 3 <= most[4] <= 5


def test_the_best_blocks_are_found() -> None:
    """Skipping block 1 is free and every further step is a gain."""

    def evaluate(candidate: Candidate) -> float:
        harm = sum(len(skip - {1}) for skip in candidate.skips)
        return harm - len(candidate.steps)

    found = sampling_search(evaluate, 30, 2, blocks=2, max_skip=0.9, generations=20, generator=seeded())
    assert len(found.best.steps) == 4
    assert all(skip == {1} for skip in found.best.skips)


def test_the_cost_of_a_candidate_is_the_blocks_that_are_run() -> None:
    assert Candidate((0, 5), (frozenset({1, 3}), frozenset())).cost(6) == 4 + 6


def test_children_have_the_steps_of_their_parents_and_keep_the_budget() -> None:
    for seed in range(5):
        seen: list[Candidate] = []
        values = seeded(seed)

        def evaluate(candidate: Candidate, seen: list = seen, values: torch.Generator = values) -> float:
            assert sum(20 - len(skip) for skip in candidate.skips) <= 4 * 20
            seen.append(candidate)
            return float(torch.rand((), generator=values))

        sampling_search(evaluate, 10**6, 4, blocks=20, max_skip=0.8, generations=12, population=12, top_k=6,
                        mutations=0, crossovers=8, generator=seeded(seed))  # fmt: skip
        mixed = 0
        for place, candidate in enumerate(seen):
            before = {step for other in seen[:place] for step in other.steps}
            mixed += set(candidate.steps) <= before
        assert mixed > 20  # of a million times, nobody draws the same again


def test_skipping_starts_after_five_generations_at_the_latest_and_has_a_least_share_after_six() -> None:
    seen: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:  # the best is another one in every generation
        seen.append(candidate)
        return -float(len(seen))

    sampling_search(evaluate, 1000, 5, blocks=20, max_skip=0.5, min_skip=0.5, generations=10, population=10,
                    mutations=0, crossovers=0, generator=seeded())  # fmt: skip
    generations = [seen[k : k + 10] for k in range(0, len(seen), 10)]
    most = [max(len(skip) for candidate in part for skip in candidate.skips) for part in generations]
    assert most[:6] == [0] * 6  # those drawn before, and in five generations
    assert all(0 < found <= 2 * (k + 1) for k, found in enumerate(most[6:]))  # a fifth of the largest share more
    least = [min(len(skip) for candidate in part for skip in candidate.skips) for part in generations]
    assert least[6] == 0
    assert least[7:] == most[7:]  # from then on both shares are the same


def test_a_mutation_changes_each_time_at_its_rate() -> None:
    seen: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        seen.append(candidate)
        return 0.0 if len(seen) == 1 else 1.0  # the first stays the best, and the only parent

    sampling_search(evaluate, 10**6, 20, generations=3, population=60, top_k=1, mutations=60, crossovers=0, rate=0.25,
                    generator=seeded())  # fmt: skip
    kept = [len(set(candidate.steps) & set(seen[0].steps)) for candidate in seen[60:]]
    assert sum(kept) / len(kept) == pytest.approx(15, abs=0.6)


def test_what_is_not_finite_counts_as_the_worst() -> None:
    def evaluate(candidate: Candidate) -> float:
        return math.nan if candidate.steps[0] else float(candidate.steps[1])

    found = sampling_search(evaluate, 20, 2, generator=seeded())
    assert found.best.steps == (0, 1)
    assert math.isinf(sampling_search(lambda candidate: math.nan, 20, 2, generations=2).score)


def test_few_candidates_end_the_search() -> None:
    """Three steps of four: there are four candidates, and tries end."""
    found = sampling_search(distance((0, 1, 3)), 4, 3, generator=seeded())
    assert found.evaluations == 4
    assert found.score == 0


def test_bad_arguments() -> None:
    for settings, message in (
        ({"steps": 21}, r"steps must be in \[1, 20\]"),
        ({"population": 10}, "crossovers must be in"),
        ({"rate": 1.5}, "rate must be in"),
        ({"max_skip": 1.0}, "max_skip must be in"),
        ({"min_skip": 0.5}, "min_skip must be in"),
        ({"generations": 0}, "generations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling_search(distance((0, 1, 2)), 20, **({"steps": 3} | settings))


def network(blocks: int = 3) -> EDMPreconditioned:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DenoisingMLP(4, hidden=16, blocks=blocks)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return EDMPreconditioned(net)


def noisy(model: EDMPreconditioned) -> Tensor:
    return model.schedule.prior(8, 4, generator=seeded())


def test_skipping_none_is_the_model_and_all_is_a_network_without_blocks() -> None:
    model = network()
    times = grids.karras(model.schedule, 3)
    none = LayerSkipping(model, model.net.blocks, [(), (), ()])
    assert torch.equal(ddim(none, noisy(model), times), ddim(model, noisy(model), times))
    every = LayerSkipping(model, model.net.blocks, [range(3)] * 3)
    out = ddim(every, noisy(model), times)
    model.net.blocks = nn.ModuleList()
    assert torch.equal(out, ddim(model, noisy(model), times))


def test_each_evaluation_skips_its_own_and_a_skipped_block_is_not_run() -> None:
    model = network()
    ran: list[int] = []
    for i, block in enumerate(model.net.blocks):
        block.first.register_forward_hook(lambda *_, i=i: ran.append(i))
    fast = LayerSkipping(model, model.net.blocks, [{0, 2}, {1}, set()])
    for _ in range(2):  # a run begins anew
        ran.clear()
        ddim(fast, noisy(model), grids.karras(model.schedule, 3))
        assert ran == [1, 0, 2, 0, 1, 2]
    assert all("forward" not in vars(block) for block in model.net.blocks)


def test_blocks_run_again_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes"), skipped([layer]):
        nn.Sequential(layer, nn.Linear(3, 1))(torch.ones(1, 2))
    assert layer(torch.ones(1, 2)).shape == (1, 2)
    layer.forward = lambda x: -x
    with skipped([layer]):
        assert layer(3) == 3
    assert layer(3) == -3


def test_skipping_refuses() -> None:
    model = network()
    with pytest.raises(ValueError, match="skips must be of the 3 blocks, got 3"):
        LayerSkipping(model, model.net.blocks, [{3}])
    with pytest.raises(TypeError, match="denoiser must have a schedule"):
        LayerSkipping(nn.Identity(), model.net.blocks, [])
    short = LayerSkipping(model, model.net.blocks, [(), ()])
    with pytest.raises(ValueError, match="skips must have an entry for every evaluation"):
        deis_rk(short, noisy(model), grids.karras(model.schedule, 2), method="heun")
