"""Marginalisation models: consistency on an enumerated Ising model, gradients, training on data and on an energy."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.generative import (
    MarginalFM,
    MarginalKL,
    MarginalLikelihood,
    Marginals,
    any_order_log_prob,
    marginal_consistency_loss,
    reverse_kl_surrogate,
)
from trimtab.nets import MaskedMLP, SequenceScore

LENGTH, VALUES, MASK = 4, 2, 2
STATES = torch.tensor(list(itertools.product(range(VALUES), repeat=LENGTH)))
PARTS = torch.tensor(list(itertools.product(range(VALUES + 1), repeat=LENGTH)))


def log_density(tokens: Tensor) -> Tensor:
    """An Ising model of 2 x 2 sites with a field."""
    spins = 2.0 * tokens - 1
    pairs = (
        spins[:, 0] * spins[:, 1] + spins[:, 1] * spins[:, 3] + spins[:, 3] * spins[:, 2] + spins[:, 2] * spins[:, 0]
    )
    return 0.4 * pairs + 0.3 * spins[:, 0] - 0.2 * spins.sum(1)


LOGS = log_density(STATES).double().log_softmax(0)
TABLE = torch.stack([LOGS[((part == STATES) | (part == MASK)).all(1)].logsumexp(0) for part in PARTS])


def code(tokens: Tensor) -> Tensor:
    return (tokens * (VALUES + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(1)


def log_marginal(tokens: Tensor) -> Tensor:
    """Exact, from the table."""
    return TABLE[code(tokens)]


def conditional(tokens: Tensor) -> Tensor:
    """Exact: marginals with one more known, over values."""
    scores = torch.empty(len(tokens), LENGTH, VALUES, dtype=torch.float64)
    for i, v in itertools.product(range(LENGTH), range(VALUES)):
        more = tokens.clone()
        more[:, i] = torch.where(tokens[:, i] == MASK, v, tokens[:, i])
        scores[:, i, v] = log_marginal(more)
    return scores


class Exact(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(tokens)  # type: ignore[operator]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(hidden: int = 32) -> Marginals:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Marginals(MaskedMLP(LENGTH, VALUES, hidden, 1), SequenceScore(LENGTH, VALUES, hidden, 1), MASK)


def every_place() -> list[tuple[Tensor, Tensor]]:
    """All orders and positions in them."""
    return [
        (torch.tensor(order).expand(len(STATES), -1), torch.full((len(STATES),), n))
        for order in itertools.permutations(range(LENGTH))
        for n in range(LENGTH)
    ]


def test_exact_marginals_and_conditionals_are_consistent_everywhere() -> None:
    for ranks, position in every_place():
        found = marginal_consistency_loss(log_marginal, conditional, STATES, MASK, ranks=ranks, position=position)
        assert float(found.max()) < 1e-20
    assert float(log_marginal(torch.full((1, LENGTH), MASK))) == pytest.approx(0.0, abs=1e-12)


def test_consistent_everywhere_means_marginals_add_up() -> None:
    """A marginal is the sum over completions of itself, and the number a whole state has is any order's likelihood."""
    for part in PARTS:
        complete = STATES[((part == STATES) | (part == MASK)).all(1)]
        expected = torch.logsumexp(log_marginal(complete), 0)
        torch.testing.assert_close(log_marginal(part[None])[0], expected)
    torch.testing.assert_close(any_order_log_prob(conditional, STATES, MASK).double(), LOGS)


def test_an_error_in_one_marginal_shows_where_it_is_used_and_nowhere_else() -> None:
    wrong = torch.tensor([1, MASK, 0, MASK])

    def off(tokens: Tensor) -> Tensor:
        return log_marginal(tokens) + 0.5 * (tokens == wrong).all(1)

    for ranks, position in every_place():
        before = torch.where(ranks < position[:, None], STATES, MASK)
        after = torch.where(ranks <= position[:, None], STATES, MASK)
        touched = (before == wrong).all(1) | (after == wrong).all(1)
        found = marginal_consistency_loss(off, conditional, STATES, MASK, ranks=ranks, position=position)
        torch.testing.assert_close(found, 0.25 * touched.double())


def test_a_constant_changes_only_what_nothing_known_has() -> None:
    marginals, shifted = networks(), networks()
    inner = shifted.marginal
    shifted.marginal = Exact(lambda tokens: inner(tokens) + 3.0)
    rules = [
        MarginalLikelihood(m, torch.optim.SGD(m.parameters(), lr=0.1), LENGTH, samples=4, generator=seeded())
        for m in (marginals, shifted)
    ]
    plain, more = (rule.consistency(STATES) for rule in rules)
    torch.testing.assert_close(more - plain, torch.tensor(9.0))


def test_gradients_reach_both_networks_or_the_marginals_alone() -> None:
    marginals = networks()
    marginal_consistency_loss(
        marginals.log_marginal, marginals.conditional, STATES, MASK, generator=seeded()
    ).mean().backward()
    assert all(bool((p.grad != 0).any()) for p in marginals.parameters())
    rule = MarginalLikelihood(
        marginals, torch.optim.Adam(marginals.parameters()), LENGTH, samples=8, generator=seeded()
    )
    before = copy.deepcopy(marginals.conditional.state_dict())
    rule.step_marginals(STATES)
    assert all(torch.equal(value, before[name]) for name, value in marginals.conditional.state_dict().items())
    before = copy.deepcopy(marginals.marginal.state_dict())
    rule.step_conditionals(STATES)
    assert all(torch.equal(value, before[name]) for name, value in marginals.marginal.state_dict().items())


def test_the_surrogate_has_the_gradient_of_the_divergence() -> None:
    """In full over all states, weighted as they are drawn: KL = sum p (log p - f)."""
    logits = torch.randn(len(STATES), generator=seeded(), dtype=torch.float64, requires_grad=True)
    log_prob = logits.log_softmax(0)
    divergence = (log_prob.exp() * (log_prob - log_density(STATES))).sum()
    expected = torch.autograd.grad(divergence, logits)[0]
    draws = torch.multinomial(logits.softmax(0), 400_000, replacement=True, generator=seeded(1))
    target = log_density(STATES).double()
    surrogate = reverse_kl_surrogate(logits.log_softmax(0)[draws], target[draws], normalize=False)
    found = torch.autograd.grad(surrogate, logits)[0]
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)
    # Constants of the target do not matter, and normalisation only scales.
    again = reverse_kl_surrogate(logits.log_softmax(0)[draws], target[draws] + 7, normalize=True)
    scaled = torch.autograd.grad(again, logits)[0]
    torch.testing.assert_close(scaled / scaled.norm(), found / found.norm())


def test_at_the_target_the_surrogate_pushes_nowhere() -> None:
    log_prob = LOGS.clone().requires_grad_()
    # Normalised, what is left would be rounding divided by rounding, which the processor decides.
    reverse_kl_surrogate(log_prob, log_density(STATES).double(), normalize=False).backward()
    assert float(log_prob.grad.abs().max()) < 1e-6


def test_block_gibbs_keeps_the_distribution_of_exact_conditionals() -> None:
    marginals = Marginals(Exact(conditional), networks().marginal, MASK)
    rule = MarginalKL(
        marginals,
        torch.optim.Adam(marginals.parameters()),
        LENGTH,
        log_density,
        samples=20_000,
        gibbs_steps=2,
        generator=seeded(),
    )
    rule.samples = STATES[torch.multinomial(LOGS.exp(), 20_000, replacement=True, generator=seeded(1))]
    start = rule.samples
    moved = rule.gibbs()
    changed = (moved != start).sum(1)
    assert int(changed.max()) == 2
    places = (moved * VALUES ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    share = torch.bincount(places, minlength=len(STATES)).double() / len(moved)
    assert float((share - LOGS.exp()).abs().max()) < 0.01
    # From anywhere it comes to the distribution.
    rule.samples = torch.zeros_like(start)
    for _ in range(12):
        moved = rule.gibbs()
    places = (moved * VALUES ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    share = torch.bincount(places, minlength=len(STATES)).double() / len(moved)
    assert float((share - LOGS.exp()).abs().max()) < 0.02


def trained(rule: object, step: object, steps: int) -> float:
    """Train, and give the root mean square error of all marginals of the enumerated model."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule.optimizer, steps)  # type: ignore[attr-defined]
    for _ in range(steps):
        step()  # type: ignore[operator]
        schedule.step()
    with torch.no_grad():
        return float((rule.marginals.log_marginal(PARTS) - TABLE).square().mean().sqrt())  # type: ignore[attr-defined]


def test_training_on_data_gives_all_marginals() -> None:
    draws = seeded(1)
    data = STATES[torch.multinomial(LOGS.exp(), 20_000, replacement=True, generator=draws)]

    def batch(count: int) -> Tensor:
        return data[torch.randint(len(data), (count,), generator=draws)]

    marginals = networks()
    optimizer = torch.optim.Adam(marginals.parameters(), lr=1e-2)
    rule = MarginalLikelihood(marginals, optimizer, LENGTH, samples=128, gibbs_steps=2, generator=seeded())
    assert trained(rule, lambda: rule.step_conditionals(batch(256)), 150) > 1
    optimizer = torch.optim.Adam(marginals.parameters(), lr=1e-2)
    rule = MarginalLikelihood(marginals, optimizer, LENGTH, samples=128, gibbs_steps=2, generator=seeded())
    assert trained(rule, lambda: rule.step_marginals(batch(128)), 200) < 0.2


@pytest.mark.parametrize("kind", ["kl", "matching"])
def test_training_on_an_energy_gives_all_marginals(kind: str) -> None:
    marginals = networks(hidden=64)
    optimizer = torch.optim.Adam(marginals.parameters(), lr=5e-3)
    if kind == "kl":
        rule = MarginalKL(marginals, optimizer, LENGTH, log_density, gibbs_steps=2, generator=seeded())
        error = trained(rule, rule.step, 250)
    else:
        matching = MarginalFM(
            marginals, optimizer, LENGTH, log_density, samples=64, gibbs_steps=2, partition_lr=0.1, generator=seeded()
        )
        error = trained(matching, lambda: matching.step(STATES.repeat(4, 1)), 1000)
        partition = log_density(STATES).logsumexp(0)
        # It starts at log 16, which is 0.4 below.
        assert float(matching.log_partition.detach()) == pytest.approx(float(partition), abs=0.1)
    assert error < 0.2
    drawn = marginals.sample(torch.full((20_000, LENGTH), MASK), generator=seeded())
    places = (drawn * VALUES ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    share = torch.bincount(places, minlength=len(STATES)).double() / len(drawn)
    assert float((share - LOGS.exp()).abs().max()) < 0.04


def test_one_evaluation_whatever_is_known() -> None:
    marginals, calls = networks(), []
    marginals.marginal.register_forward_hook(lambda *_: calls.append(1))
    marginals.conditional.register_forward_hook(lambda *_: calls.append(2))
    marginals.log_marginal(PARTS)
    assert calls == [1]
    assert float(marginals.log_marginal(torch.full((1, LENGTH), MASK)).detach()) == 0
    conditionals = marginals.log_conditional(PARTS).exp().sum(2)
    torch.testing.assert_close(conditionals, torch.ones_like(conditionals))


def test_sampling_keeps_what_is_given() -> None:
    start = torch.tensor([[1, MASK, MASK, 0]]).repeat(50, 1)
    drawn = networks().sample(start, generator=seeded())
    assert bool((drawn[:, [0, 3]] == start[:, [0, 3]]).all())
    assert bool((drawn < MASK).all())


def steps_of(kind: str, generator: torch.Generator) -> tuple[object, object]:
    marginals = networks()
    optimizer = torch.optim.Adam(marginals.parameters(), lr=1e-2)
    if kind == "likelihood":
        data = MarginalLikelihood(marginals, optimizer, LENGTH, samples=8, generator=generator)
        return data, lambda: (data.step_conditionals(STATES), data.step_marginals(STATES))
    if kind == "kl":
        energy = MarginalKL(marginals, optimizer, LENGTH, log_density, samples=8, generator=generator)
        return energy, energy.step
    matching = MarginalFM(marginals, optimizer, LENGTH, log_density, samples=8, generator=generator)
    return matching, lambda: matching.step(STATES)


@pytest.mark.parametrize("kind", ["likelihood", "kl", "matching"])
def test_a_training_continues_from_its_state_to_the_bit(kind: str) -> None:
    rule, step = steps_of(kind, seeded(3))
    for _ in range(3):
        step()  # type: ignore[operator]
    state = copy.deepcopy(rule.state_dict())  # type: ignore[attr-defined]
    other, other_step = steps_of(kind, seeded(99))
    other.load_state_dict(state)  # type: ignore[attr-defined]
    for _ in range(2):
        step()  # type: ignore[operator]
        other_step()  # type: ignore[operator]
    ours, theirs = rule.state_dict(), other.state_dict()  # type: ignore[attr-defined]
    assert torch.equal(ours["samples"], theirs["samples"])
    for name, value in ours["marginals"].items():
        assert torch.equal(value, theirs["marginals"][name]), name


@pytest.mark.parametrize("kind", ["likelihood", "matching"])
def test_a_refused_batch_changes_nothing(kind: str) -> None:
    rule, step = steps_of(kind, seeded(3))
    step()  # type: ignore[operator]
    before = copy.deepcopy(rule.state_dict())  # type: ignore[attr-defined]
    refused = rule.step_marginals if kind == "likelihood" else rule.step  # type: ignore[attr-defined]
    for bad in (STATES.float(), STATES[0], STATES + 1, STATES - 1, STATES[:, :3]):
        with pytest.raises((TypeError, ValueError), match="tokens must"):
            refused(bad)
    after = rule.state_dict()  # type: ignore[attr-defined]
    assert torch.equal(before["samples"], after["samples"])
    assert torch.equal(before["generator"], after["generator"])


def test_bad_input() -> None:
    marginals = networks()
    optimizer = torch.optim.Adam(marginals.parameters())
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 2\], got 3"):
        marginals.log_marginal(torch.tensor([[0, 3, 1, 1]]))
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 2\], got -1"):
        marginals.sample(torch.tensor([[0, -1, 1, 1]]))
    with pytest.raises(TypeError, match="tokens must be int64"):
        marginals.log_conditional(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="marginals must be a Marginals"):
        MarginalLikelihood(marginals.marginal, optimizer, LENGTH)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gibbs_steps must be in \[1, 4\]"):
        MarginalKL(marginals, optimizer, LENGTH, log_density, gibbs_steps=5)
    with pytest.raises(ValueError, match="alpha must be positive"):
        MarginalFM(marginals, optimizer, LENGTH, log_density, alpha=0)
    for kind in (MarginalKL, MarginalFM):
        with pytest.raises(ValueError, match=r"target must give one number a sequence, of shape \(128,\)"):
            kind(marginals, optimizer, LENGTH, lambda tokens: log_density(tokens)[:, None])
    with pytest.raises(ValueError, match="log_prob must be a vector of at least two"):
        reverse_kl_surrogate(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="target must be of shape"):
        reverse_kl_surrogate(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="mask_id must be at least 2"):
        Marginals(marginals.conditional, marginals.marginal, 1)
    assert math.isfinite(float(marginals.log_marginal(STATES).detach().sum()))


@pytest.mark.parametrize("position", [torch.full((2,), 4), torch.full((2,), -1), torch.zeros(3, dtype=torch.int64)])
def test_positions_outside_the_sequence_are_refused(position: Tensor) -> None:
    """Beyond the end nothing is added to what is known, and the error says nothing."""
    with pytest.raises(ValueError, match="position must be"):
        marginal_consistency_loss(
            lambda tokens: torch.zeros(len(tokens)),
            lambda tokens: torch.zeros(*tokens.shape, VALUES),
            STATES[:2],
            MASK,
            position=position,
        )


def test_consistency_is_asked_for_on_whole_sequences_alone() -> None:
    coin = lambda tokens: torch.zeros(*tokens.shape, 3)
    half = lambda tokens: torch.zeros(len(tokens))
    with pytest.raises(ValueError, match="tokens must be whole sequences without the mask, got 2 among them"):
        marginal_consistency_loss(half, coin, torch.tensor([[0, 2, 1]]), mask_id=2)
    for mask_id in (2.0, True, None):
        with pytest.raises(TypeError, match="mask_id must be an integer"):
            marginal_consistency_loss(half, coin, torch.tensor([[0, 1, 1]]), mask_id=mask_id)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_marginal must give one number a sequence, 2, got"):
        marginal_consistency_loss(lambda tokens: torch.zeros(3), coin, torch.tensor([[0, 1, 1]]), mask_id=2)


def test_a_callback_sees_every_position_and_may_replace_the_tokens() -> None:
    model = Marginals(Exact(conditional), Exact(log_marginal), MASK)
    known, seen = torch.tensor([[1, MASK, MASK, MASK], [MASK, MASK, 0, 1]]), []
    plain = model.sample(known, generator=seeded())
    assert torch.equal(model.sample(known, generator=seeded(), callback=lambda *step: seen.append(step)), plain)
    assert [(step, time) for step, time, _ in seen] == [(0, 0.5), (1, 0.25), (2, 0.0)]
    for _, time, tokens in seen:
        assert int((tokens == MASK).sum(1).max()) == time * LENGTH
        assert torch.equal(torch.where(tokens == MASK, plain, tokens), plain)
    ones = model.sample(known, callback=lambda step, time, tokens: torch.ones_like(tokens))
    assert bool((ones == 1).all())


def flat_rule(level: float = 0.0) -> MarginalLikelihood:
    """Every log-marginal is `level`, and every value is as likely as any other."""
    flat = Marginals(
        Exact(lambda tokens: torch.zeros(len(tokens), LENGTH, VALUES)),
        Exact(lambda tokens: torch.full((len(tokens),), level)),
        MASK,
    )
    flat.free = nn.Parameter(torch.zeros(1))  # what a rule looks for a device in
    return MarginalLikelihood(flat, torch.optim.SGD(flat.parameters(), lr=0.1), LENGTH, samples=64, gibbs_steps=1)


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_consistency_is_summed_over_the_sequence_and_nothing_known_is_held_to_one(level: float) -> None:
    found = flat_rule(level).consistency(STATES)
    assert found.item() == pytest.approx(LENGTH * math.log(VALUES) ** 2 + level**2)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_gibbs_move_draws_as_many_positions_anew_as_it_says(steps: int) -> None:
    rule = flat_rule()
    rule.gibbs_steps = steps
    rule.samples = torch.zeros_like(rule.samples)
    rule.marginals.conditional = Exact(lambda tokens: torch.tensor([-torch.inf, 0.0]).expand(len(tokens), LENGTH, 2))
    moved = rule.gibbs()
    assert (moved.sum(1) == steps).all()
    assert (moved.float().mean(0) > 0).all()  # of all positions


def test_marginals_are_made_consistent_on_data_and_on_samples() -> None:
    marginals, seen = networks(), []
    rule = MarginalLikelihood(marginals, torch.optim.SGD(marginals.parameters(), lr=0.1), LENGTH, samples=8)
    marginals.marginal.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    rule.step_marginals(STATES)
    assert seen == [2 * (len(STATES) + 8), 1]  # before and after a step of each, and nothing known


def test_an_energys_gradient_stays_out_and_its_constant_starts_at_that_of_even_odds() -> None:
    weight = torch.ones(1, requires_grad=True)

    def energy(tokens: Tensor) -> Tensor:
        return weight * log_density(tokens)

    marginals = networks()
    options = {"samples": 8, "generator": seeded()}
    rule = MarginalKL(marginals, torch.optim.SGD(marginals.parameters(), lr=0.1), LENGTH, energy, alpha=0.3, **options)
    found = rule.step()
    assert found["loss"].item() == pytest.approx(found["divergence"].item() + 0.3 * found["consistency"].item())
    matching = MarginalFM(marginals, torch.optim.SGD(marginals.parameters(), lr=0.1), LENGTH, energy, **options)
    assert matching.log_partition.item() == pytest.approx(LENGTH * math.log(VALUES))
    matching.step(STATES)
    assert weight.grad is None


def test_the_release_has_the_constant_in_the_other_term_and_the_same_loss() -> None:
    """There nothing known is held to log Z and log-marginals of whole sequences to the target as it is."""

    def made() -> MarginalFM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Marginals(MaskedMLP(LENGTH, VALUES, 8, 1), SequenceScore(LENGTH, VALUES, 8, 1), MASK)
        rule = MarginalFM(
            model, torch.optim.SGD(model.parameters(), lr=0.0), LENGTH, log_density, samples=16, generator=seeded()
        )
        with torch.no_grad():
            rule.log_partition.fill_(1.7)
        return rule

    here = made().step(STATES)["loss"]
    rule = made()
    with torch.no_grad():

        def log_marginal(tokens: Tensor) -> Tensor:
            return rule.marginals.log_marginal(tokens) + 1.7

        both = torch.cat([STATES, rule.gibbs()])
        along = marginal_consistency_loss(
            log_marginal, rule.marginals.conditional, both, MASK, generator=rule.generator
        ).mean()
        begin = (log_marginal(torch.full((1, LENGTH), MASK)) - 1.7).square()[0]
        end = (log_marginal(STATES) - log_density(STATES)).square().mean()
    torch.testing.assert_close(here, 4.0 * (LENGTH * along + begin) + 0.5 * end)
