"""The study of FOA-Attack: pictures and their sentences, the models of both, and how a description is judged."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from trimtab.studies.engine.study import Trial
from trimtab.studies.robust.foa_attack import described
from trimtab.studies.robust.foa_attack.captioned import COLOURS, DIGITS, PATTERNS, SIDE, WORDS, Scenes, by_digit, coded
from trimtab.studies.robust.foa_attack.image_text import Describer, Pair


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    y = torch.arange(20) % 10
    return by_digit(torch.rand(20, 1, 28, 28, generator=seeded()), y)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return Pair(described.SURROGATES[1]).eval().requires_grad_(False)


class TestScenes:
    def test_every_scene_and_sentence_is_there_once(self):
        every = Scenes.every()
        assert len(every) == len(set(every.sentences())) == 10 * 6 * 5 * 4
        assert (every.colour != every.shade).all()

    def test_sentences_say_what_is_there_however_they_put_it(self):
        scenes = Scenes.drawn(200, seeded())
        assert scenes[:1].sentences() == [scenes.sentences()[0]]
        said = scenes.sentences(seeded(1))
        assert len({sentence.split()[0] for sentence in said}) > 2
        for number, sentence in enumerate(said):
            thing = f"a {list(COLOURS)[scenes.colour[number]]} {DIGITS[scenes.digit[number]]}"
            ground = f"{list(COLOURS)[scenes.shade[number]]} {PATTERNS[scenes.pattern[number]]}"
            assert thing in sentence
            assert ground in sentence

    def test_targets_have_nothing_in_common(self):
        scenes = Scenes.drawn(500, seeded())
        other = scenes.unlike(seeded(1))
        assert torch.equal(scenes.agreement(other), torch.zeros(500))
        assert (other.colour != other.shade).all()
        assert (other.colour != scenes.shade).all()
        assert (other.shade != scenes.colour).all()

    def test_agreement_counts_words_in_their_place(self):
        one = Scenes(*(torch.tensor([0]) for _ in range(3)), torch.tensor([1]))
        same_digit = Scenes(*(torch.tensor([value]) for value in (0, 1, 1, 0)))
        assert one.agreement(one).item() == 1
        assert one.agreement(same_digit).item() == 0.25

    def test_codes_are_words_and_end_in_none(self):
        codes = coded(["a red seven on blue dots", "a red seven"])
        assert [WORDS[number] for number in codes[1]] == ["a", "red", "seven", "", "", ""]

    def test_pictures_show_digit_colour_and_ground(self, images):
        n = 64
        fixed = Scenes(*(torch.full((n,), value) for value in (3, 0, 0, 2)))  # a red three on a blue wall
        x = fixed.pictures(images, seeded())
        assert x.shape == (n, 3, SIDE, SIDE)
        assert x.min() >= 0
        assert x.max() <= 1
        blue = torch.tensor(COLOURS["blue"])[:, None, None]
        corners = torch.stack([x[:, :, 0, 0], x[:, :, -1, -1]])
        # One corner at least is ground, whose channels are those of the wall's colour, darkened alike.
        ratio = corners / blue[:, 0, 0]
        even = (ratio.amax(2) - ratio.amin(2)).amin(0)
        assert even.max() < 1e-5
        assert torch.equal(x, fixed.pictures(images, seeded()))
        assert not torch.equal(x, fixed.pictures(images, seeded(1)))


class TestPair:
    def test_loss_is_the_mean_of_both_cross_entropies(self, pair, images):
        scenes = Scenes.drawn(5, seeded())
        x, codes = scenes.pictures(images, seeded()), coded(scenes.sentences())
        cosines = F.normalize(pair.image(x), dim=1) @ F.normalize(pair.text(codes), dim=1).T
        logits, own = pair.log_scale.exp() * cosines, torch.arange(5)
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        torch.testing.assert_close(pair.loss(x, codes), expected)

    def test_padding_does_not_matter(self, pair):
        alone, beside = coded(["a red seven"]), coded(["a red seven", "there is a red seven on blue dots"])[:1]
        torch.testing.assert_close(pair.text(alone), pair.text(beside))

    @pytest.mark.parametrize("design", [*described.SURROGATES, *described.UNSEEN])
    def test_towers_show_a_global_feature_and_tokens(self, design, images):
        tower = Pair(design).image.eval()
        x = Scenes.drawn(2, seeded()).pictures(images, seeded())
        whole, tokens = tower.look(x)
        assert whole.ndim == 2
        assert tokens.shape[1] in {9, 16, 36}
        torch.testing.assert_close(tower.head(whole), tower(x))

    def test_training_leaves_it_still_and_learns(self, images):
        torch.manual_seed(0)
        pair = Pair(described.SURROGATES[0])
        before = {name: value.clone() for name, value in pair.named_parameters()}
        pair.train_on(images, 2, seeded(), batch_size=16)
        assert not pair.training
        assert not any(p.requires_grad for p in pair.parameters())
        assert all(not torch.equal(value, before[name]) for name, value in pair.named_parameters())

    def test_describes_by_the_nearest_sentence(self, pair, images):
        scenes = Scenes.drawn(3, seeded())
        x = scenes.pictures(images, seeded())
        describe = Describer(pair)
        said = describe(x)
        best = describe.cosines(x, said)
        others = Scenes.every()[torch.randperm(1200, generator=seeded())[:50]]
        for number in range(50):
            other = others[torch.full((3,), number)]
            assert (describe.cosines(x, other) <= best + 1e-6).all()


class TestAttackOnLanguage:
    @pytest.fixture(scope="class")
    def stage(self):
        return described.stage(Trial(0, "smoke"))

    def test_every_contestant_stays_in_the_ball(self, stage):
        for craft in (described.align, described.momentum_ascent, described.untouched):
            moved = craft(stage)
            assert (moved - stage.x).abs().max() <= described.EPS + 1e-6
            assert moved.min() >= 0
            assert moved.max() <= 1

    def test_rivals_bring_the_attackers_features_nearer(self, stage):
        def near(x):
            return sum(
                F.cosine_similarity(p.image.look(x)[0], p.image.look(stage.targets)[0]) for p in stage.surrogates
            )

        for craft in (described.align, described.momentum_ascent):
            assert near(craft(stage)).mean() > near(stage.x).mean()

    def test_the_target_itself_succeeds_and_models_are_the_same_for_all_seeds(self, stage):
        found = described.attack_language(lambda scene: scene.targets, Trial(0, "smoke"))
        assert all(found.metrics[name] == 1 for name in ("success", "words", "every_word", "digit"))
        assert found.metrics["cosine"] == pytest.approx(1)
        other = described.stage(Trial(1, "smoke"))
        assert not torch.equal(other.x, stage.x)
        for mine, theirs in zip([*stage.surrogates, *stage.unseen], [*other.surrogates, *other.unseen], strict=True):
            for ours, same in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(ours, same)

    def test_scenes_are_frozen(self, stage):
        with pytest.raises(dataclasses.FrozenInstanceError):
            stage.scenes.digit = stage.scenes.colour
