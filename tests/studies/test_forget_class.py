"""Forgetting a digit as a task: what everybody sees, what it costs, and that all face the same attack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.tasks import forget_class
from trimtab.studies.tasks.forget_class import Forgetting, Lesson, brought_back, prompted_digits, prompts_of_digit
from trimtab.studies.tools.concept_diffusion import SYNONYMS, PromptedDenoiser, World
from trimtab.studies.unlearning import adapt_then_unlearn, concept_domain_correction, unlearn_diff_attack
from trimtab.unlearning import AuditResult

ENTRANTS = {
    **{
        name: entrant
        for study in (adapt_then_unlearn.study, concept_domain_correction.study, unlearn_diff_attack.study)
        for name, entrant in study.contestants(prompted_digits).items()
    }
}


def trial_of(entrant: Forgetting, **options: object) -> Trial:
    return Trial(setting=settings_of(prompted_digits.grid(entrant))[-1], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def world() -> World:
    return World.of(Trial(seed=3))


def test_a_lesson_tells_of_two_words_of_the_digit_and_of_the_others_alone(world: World) -> None:
    b = Lesson.of(Trial(seed=3), world).batch()
    assert set((b.target[:, 0] - 3 * SYNONYMS).tolist()) <= {0, 1}
    assert (b.anchor[:, 0] // SYNONYMS == world.anchor).all()
    assert torch.equal(b.anchor[:, 1:], b.target[:, 1:])
    assert not (b.kept[:, 0] // SYNONYMS == 3).any()
    assert len(b.kept) == len(b.kept_x) == len(b.target_x) == forget_class.BATCH


@pytest.mark.parametrize("name", ENTRANTS)
def test_contestants_keep_to_the_allowance_and_to_the_weights_of_attention(name: str, world: World) -> None:
    entrant = ENTRANTS[name]
    assert isinstance(entrant, Forgetting)
    if entrant.from_data:
        return
    lesson = Lesson.of(trial_of(entrant, seed=3), world)
    before = {key: value.clone() for key, value in world.model.state_dict().items()}
    counts: list[int] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: counts.append(len(given[0])) if isinstance(module, PromptedDenoiser) else None
    )
    try:
        model = entrant.forget(lesson)
    finally:
        hook.remove()
    # At so few batches each stage of a method is rounded up to a step.
    assert sum(counts) <= 1.5 * lesson.allowance * forget_class.BATCH
    for key, value in model.state_dict().items():
        assert torch.equal(world.model.state_dict()[key], before[key])
        assert key.startswith("attention") or torch.equal(value, before[key]), key


def test_steps_are_what_the_allowance_pays_for(world: World) -> None:
    lesson = Lesson.of(Trial(seed=3), world)
    assert [lesson.steps(1), lesson.steps(3), lesson.steps(1, share=0.5), lesson.steps(100)] == [12, 4, 6, 1]


def test_all_face_the_same_attack(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def search(model: object, *given: torch.Tensor, generator: torch.Generator, **_: object) -> AuditResult:
        seen.append((given[2], given[3], generator.initial_seed()))
        return AuditResult(None, (), success=len(seen) % 2 == 1, before=False, queries=0)

    monkeypatch.setattr(forget_class, "search_tokens", search)
    other = PromptedDenoiser()
    ask = partial(prompts_of_digit, world, style=0)
    found = [brought_back(model, world.model, ask, world.shown, world.trial) for model in (world.model, other)]
    assert found == [0.5, 0.5]
    for one, two in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert one[2] == two[2]
    assert seen[0][2] != seen[1][2]


def test_nobody_is_attacked_while_settings_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forget_class, "search_tokens", None)
    result = prompted_digits.run(Trial(searching=True), prompted_digits.references()["original"])
    assert result.score is not None
    assert 0 <= result.score <= 2
    assert not result.metrics


def test_the_original_knows_the_digit_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prompted_digits.run(Trial(), prompted_digits.references()["original"]).metrics
    assert found.keys() == prompted_digits.metrics.keys()
    assert found["batches"] == 0
    assert found["balance"] == pytest.approx((1 - found["returned"] + found["kept"]) / 2)
