"""Forgetting a style as a task: what styles are, what everybody sees, and that all face the same attack."""

from __future__ import annotations

import pytest
import torch

from trimtab.data import load
from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.tasks import forget_class
from trimtab.studies.tasks.forget_class import BATCH, Forgetting, brought_back, counted_images
from trimtab.studies.tasks.forget_concept import ForgetConcept, StyleLesson, styled_digits
from trimtab.studies.tools import style_diffusion as styles
from trimtab.studies.tools.concept_diffusion import SYNONYMS, VOCABULARY, PromptedDenoiser, without_word
from trimtab.studies.tools.style_diffusion import STYLES, StyleWorld, asked_for, drawn, prompts
from trimtab.studies.unlearning import adapt_then_unlearn, concept_domain_correction, unlearn_diff_attack
from trimtab.unlearning import AuditResult

ENTRANTS = {
    name: entrant
    for study in (adapt_then_unlearn.study, concept_domain_correction.study, unlearn_diff_attack.study)
    for name, entrant in study.contestants(styled_digits).items()
    if isinstance(entrant, Forgetting)
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> StyleWorld:
    return StyleWorld.of(Trial(seed=3))


def test_styles_change_how_a_digit_looks() -> None:
    x = load("digits").x_train[:50]
    plain, bold, negative, dotted = (drawn(x, torch.full((50,), style)) for style in range(4))
    assert torch.equal(plain, x)
    assert torch.equal(negative, 1 - x)
    assert (bold >= x).all()
    assert bold.mean() > 1.2 * x.mean()
    torch.testing.assert_close(bold[0, 0, 2, 3], x[0, 0, 2:4, 3:5].max())
    torch.testing.assert_close(dotted[:, 0, 0, 1], 0.3 * x[:, 0, 0, 1])
    assert torch.equal(dotted[:, 0, 3, 3], x[:, 0, 3, 3])
    mixed = drawn(x[:2], torch.tensor([2, 0]))
    assert torch.equal(mixed, torch.cat([negative[:1], x[1:2]]))


def test_prompts_are_of_the_vocabulary_and_begin_with_the_style() -> None:
    wanted, digits = torch.arange(4).repeat(75), torch.arange(10).repeat(30)
    prompt = prompts(wanted, digits, (1, 3), seeded())
    assert prompt.shape == (300, 3)
    assert all(map(torch.equal, asked_for(prompt), (wanted, digits)))
    assert set((prompt[:, 0] % SYNONYMS).tolist()) == {1, 3}
    assert set(prompt[:, 1].tolist()) == set(range(16, 26))
    assert prompt[:, 2].min() >= 26
    assert prompt.max() < VOCABULARY
    assert torch.equal(without_word(prompt)[:, 0], prompt[:, 2])


def test_a_lesson_tells_of_two_words_of_the_style_and_of_the_others_alone(world: StyleWorld) -> None:
    b = StyleLesson.in_style(Trial(seed=3), world).batch()
    assert set((b.target[:, 0] - world.style * SYNONYMS).tolist()) <= {0, 1}
    assert (asked_for(b.anchor)[0] == STYLES.index("plain")).all()
    assert torch.equal(b.anchor[:, 1:], b.target[:, 1:])
    assert torch.equal(b.anchor[:, 0] % SYNONYMS, b.target[:, 0] % SYNONYMS)
    assert not (asked_for(b.kept)[0] == world.style).any()


def test_every_style_but_the_plain_one_is_forgotten_by_some_seed() -> None:
    found = [StyleWorld.of(Trial(seed=seed)) for seed in range(4)]
    assert [world.style for world in found] == [1, 2, 3, 1]
    for world in found:
        assert set(world.others(200, seeded()).tolist()) == set(range(4)) - {world.style}


@pytest.mark.parametrize("name", ENTRANTS)
def test_contestants_keep_to_the_allowance_and_to_the_weights_of_attention(name: str, world: StyleWorld) -> None:
    entrant = ENTRANTS[name]
    if entrant.from_data:
        return
    setting = settings_of(styled_digits.grid(entrant))[-1]
    lesson = StyleLesson.in_style(Trial(seed=3, setting=setting), world)
    before = {key: value.clone() for key, value in world.model.state_dict().items()}
    with counted_images() as passed:
        model = entrant.forget(lesson)
    # At so few batches each stage of a method is rounded up to a step.
    assert passed[0] <= 1.5 * lesson.allowance * BATCH
    for key, value in model.state_dict().items():
        assert torch.equal(world.model.state_dict()[key], before[key])
        assert key.startswith("attention") or torch.equal(value, before[key]), key


def test_a_retrained_model_sees_neither_the_style_nor_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def watched(wanted: torch.Tensor, *given: object) -> torch.Tensor:
        seen.append(wanted)
        return prompts(wanted, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(styles, "prompts", watched)
    styles.retrained(StyleWorld(PromptedDenoiser(), styles._new_classifier(), 2, Trial(seed=1)))
    assert set(torch.cat(seen).tolist()) == {0, 1, 3}


def test_all_face_the_same_attack(world: StyleWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def search(model: object, *given: torch.Tensor, generator: torch.Generator, **_: object) -> AuditResult:
        seen.append((given[2], given[3], generator.initial_seed()))
        return AuditResult(None, (), success=len(seen) % 2 == 1, before=False, queries=0)

    monkeypatch.setattr(forget_class, "search_tokens", search)
    ask = lambda count, draws: world.prompts_of_style(count, (0, 1), draws)
    models = (world.model, PromptedDenoiser())
    assert [brought_back(model, world.model, ask, world.shown, world.trial) for model in models] == [0.5, 0.5]
    for one, two in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert one[2] == two[2]
        assert asked_for(one[1][None])[0] == world.style
    assert seen[0][2] != seen[1][2]


def test_nobody_is_attacked_while_settings_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forget_class, "search_tokens", None)
    result = styled_digits.run(Trial(searching=True), ENTRANTS["original"])
    assert result.score is not None
    assert 0 <= result.score <= 2
    assert not result.metrics


def test_the_original_costs_nothing_and_what_is_from_data_has_no_cost() -> None:
    found = styled_digits.run(Trial(), ENTRANTS["original"]).metrics
    assert found.keys() == styled_digits.metrics.keys()
    assert found["batches"] == 0
    assert found["balance"] == pytest.approx((1 - found["returned"] + found["kept"]) / 2)
    anew = styled_digits.run(Trial(), ENTRANTS["retrained"]).metrics
    assert anew.keys() == styled_digits.metrics.keys() - {"batches", "seconds"}


def test_references_are_those_of_forgetting_a_class() -> None:
    from trimtab.studies.tasks.forget_class import prompted_digits

    assert ForgetConcept.references().keys() == prompted_digits.references().keys()
