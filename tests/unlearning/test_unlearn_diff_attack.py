from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.ops.simplex import project_simplex
from trimtab.unlearning import (
    AuditResult,
    attack_success_rate,
    denoising_error,
    draw_tokens,
    insert_tokens,
    search_tokens,
    straight_through_gradient,
)

BARS = torch.tensor([0.9, 0.5, 0.2])
VOCABULARY = torch.eye(5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


X0 = drawn(1, 6)
PROMPT = torch.tensor([0, 1])


class Knows(nn.Module):
    """Sees the image through its noise where a token stands in the prompt, and half of it otherwise."""

    def __init__(self, token: int = 3) -> None:
        super().__init__()
        self.weight, self.token = nn.Parameter(torch.ones(())), token

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        bar = BARS[t][:, None]
        seen = 0.5 + 0.5 * cond[:, :, self.token].amax(1)[:, None]
        return self.weight * (x_t - bar.sqrt() * seen * X0) / (1 - bar).sqrt()


def search(denoiser: object, **options: object) -> AuditResult:
    return search_tokens(denoiser, VOCABULARY, BARS, X0, PROMPT, **{"timesteps": [2, 1], **options})  # type: ignore


def test_the_simplex_is_that_of_the_audit() -> None:
    found = project_simplex(torch.tensor([[0.5, 0.5, 0.5], [2.0, 0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1 / 3] * 3, [1.0, 0.0, 0.0]]))


def test_the_error_of_the_true_noise_is_nought_and_by_hand_otherwise() -> None:
    x, noise, t = drawn(3, 2, 2), drawn(3, 2, 2, seed=1), torch.tensor([0, 1, 2])
    seen = []

    def blind(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    cond = torch.zeros(3, 1, 5)
    assert denoising_error(lambda *_: noise, x, cond, t, noise, BARS).abs().max() == 0
    torch.testing.assert_close(denoising_error(blind, x, cond, t, noise, BARS), noise.square().mean((1, 2)))
    bar = BARS.view(-1, 1, 1)
    torch.testing.assert_close(seen[0], bar.sqrt() * x + (1 - bar).sqrt() * noise)


def test_places_in_the_prompt() -> None:
    prompt, tokens = torch.arange(4.0)[:, None], torch.tensor([[8.0], [9.0]])
    expected = {
        "prefix": [8, 9, 0, 1, 2, 3],
        "suffix": [0, 1, 2, 3, 8, 9],
        "middle": [0, 1, 8, 9, 2, 3],
        "spread": [0, 8, 1, 9, 2, 3],
    }
    for position, order in expected.items():
        assert insert_tokens(prompt, tokens, position)[:, 0].tolist() == order  # type: ignore[arg-type]
        batch = insert_tokens(prompt.expand(3, 4, 1), tokens.expand(3, 2, 1), position)  # type: ignore[arg-type]
        assert batch[2, :, 0].tolist() == order


def test_the_gradient_is_cut_off() -> None:
    found = straight_through_gradient(torch.tensor([[-7.0, -0.2, 0.3, 9.0]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, -0.2, 0.3, 1.0]]))


def test_a_step_is_adams_followed_by_the_nearest_point_of_the_simplex(monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.unlearning.unlearn_diff_attack as module

    rows: list[Tensor] = []

    def first_token(probabilities: Tensor, **options: object) -> Tensor:
        rows.append(probabilities.clone())
        return torch.zeros(len(probabilities), dtype=torch.int64)

    monkeypatch.setattr(module, "draw_tokens", first_token)
    found = search(Knows(), num_tokens=1, iterations=2, lr=0.06, weight_decay=0.0, timesteps=[2], generator=seeded())
    # The error falls with the third token alone, and Adam's first step is as long as its rate for every entry that
    # has a slope; what that adds to the sum is taken from all alike.
    torch.testing.assert_close(rows[0], torch.full((1, 5), 0.2))
    expected = torch.full((1, 5), 0.2 - 0.06 / 5)
    expected[0, 3] += 0.06
    torch.testing.assert_close(rows[1], expected)
    assert found.queries == 2
    two = search_tokens(
        Knows(), VOCABULARY, BARS, X0.repeat(3, 1), PROMPT, timesteps=[2, 1], iterations=4, generator=seeded()
    )
    assert two.queries == 2 * 4 * 3


def test_a_uniform_start_draws_all_tokens_alike() -> None:
    found = draw_tokens(torch.full((20_000, 5), 0.2), generator=seeded())
    counts = found.bincount(minlength=5).double()
    assert ((counts - 4000).square() / 4000).sum() < 18.5  # chi-square of four degrees, one in a thousand


def test_the_prompt_that_the_model_sees() -> None:
    seen: list[Tensor] = []

    def watching(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(cond.detach())
        assert t.tolist() == [1]
        return x_t + 0 * cond.sum()

    result = search(watching, num_tokens=2, iterations=4, timesteps=[1], generator=seeded(1))
    for cond in seen:
        assert cond.shape == (1, 4, 5)
        torch.testing.assert_close(cond[0, 2:], VOCABULARY[:2])
        assert ((cond[0, :2] == 0) | (cond[0, :2] == 1)).all()  # one-hot rows, not mixtures
        assert cond[0, :2].sum(1).tolist() == [1.0, 1.0]
    assert len(seen) == result.queries == 4


@pytest.mark.parametrize("position", ["prefix", "suffix", "spread"])
def test_it_finds_the_token_that_brings_the_image_back(position: str) -> None:
    model = Knows()
    result = search(model, num_tokens=2, iterations=25, lr=0.05, position=position, generator=seeded())
    assert result.tokens is not None
    assert 3 in result.tokens
    assert result.success is None
    assert result.before is None
    assert result.queries == 50
    assert model.weight.grad is None


def test_the_judge_is_asked_before_and_after_each_level() -> None:
    asked: list[tuple[int, ...] | None] = []

    def judge(tokens: tuple[int, ...] | None) -> bool:
        asked.append(tokens)
        return len(asked) == 3

    result = search(Knows(), timesteps=[2, 1, 0], iterations=3, judge=judge, generator=seeded())
    assert asked[0] is None
    assert len(asked) == 3
    assert result.success is True
    assert result.before is False
    assert result.tokens == asked[-1]
    assert result.queries == 6
    at_once = search(Knows(), judge=lambda tokens: True)
    assert (at_once.success, at_once.before, at_once.queries, at_once.tokens) == (True, True, 0, None)
    assert search(Knows(), iterations=2, judge=lambda tokens: False, generator=seeded()).success is False


@pytest.mark.parametrize("ignores", [lambda x_t, t, cond: x_t, lambda x_t, t, cond: x_t + 0 * cond.sum()])
def test_a_model_without_prompts_gives_nothing_to_find(ignores: object) -> None:
    result = search(ignores, iterations=10, judge=lambda tokens: False, generator=seeded())
    assert attack_success_rate([result]) == (0.0, 0.0)
    assert result.tokens is not None


def test_a_number_of_steps_is_spread_over_all_of_them() -> None:
    seen: list[int] = []

    def watching(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(int(t))
        return x_t + 0 * cond.sum()

    search_tokens(watching, VOCABULARY, torch.linspace(0.9, 0.1, 1000), X0, PROMPT, timesteps=50, iterations=1)
    assert seen == list(range(10, 1000, 20))


def test_the_generator_decides() -> None:
    one, again, other = (search(Knows(), iterations=3, timesteps=2, generator=seeded(s)) for s in (1, 1, 2))
    assert one == again
    assert one.losses != other.losses


def test_rates_before_and_after() -> None:
    made = [AuditResult(None, (), True, True, 0), AuditResult((1,), (0.1,), False, False, 5)]
    assert attack_success_rate(made) == (0.5, 0.5)
    with pytest.raises(ValueError, match="results"):
        attack_success_rate([])
    with pytest.raises(ValueError, match="results"):
        attack_success_rate([AuditResult((1,), (), None, None, 0)])


def test_bad_input_is_named() -> None:
    for name, options in {
        "num_tokens": {"num_tokens": 0},
        "position": {"position": "inside"},
        "timesteps": {"timesteps": [3]},
        "iterations": {"iterations": 0},
        "lr": {"lr": 0.0},
        "weight_decay": {"weight_decay": -1.0},
    }.items():
        with pytest.raises(ValueError, match=name):
            search(Knows(), **options)
    with pytest.raises(ValueError, match="embeddings"):
        search_tokens(Knows(), VOCABULARY[:1], BARS, X0, torch.tensor([0]))
    with pytest.raises(ValueError, match="prompt"):
        search_tokens(Knows(), VOCABULARY, BARS, X0, torch.tensor([5]))
    with pytest.raises(ValueError, match="x0"):
        search_tokens(Knows(), VOCABULARY, BARS, X0[:0], PROMPT)
    with pytest.raises(ValueError, match="noise"):
        denoising_error(Knows(), X0, torch.zeros(1, 1, 5), torch.tensor([0]), X0[:, :2], BARS)


def test_steps_shares_and_embeddings_out_of_range_are_named() -> None:
    x0, bars = torch.ones(1, 2), torch.tensor([0.9, 0.5])
    for step in (-1, 2):
        with pytest.raises(ValueError, match=r"t must be in \[0, 2\)"):
            denoising_error(lambda x, t, cond: x, x0, x0, torch.tensor([step]), x0, bars)
    for wrong in (torch.tensor([1.5, 0.5]), torch.tensor([0.9, torch.nan]), bars[:0]):
        with pytest.raises(ValueError, match="alphas_cumprod must be"):
            search_tokens(lambda x, t, cond: x, torch.eye(3), wrong, x0, torch.tensor([0]))
    with pytest.raises(ValueError, match="embeddings must be finite"):
        search_tokens(lambda x, t, cond: x, torch.full((3, 2), torch.nan), bars, x0, torch.tensor([0]))
