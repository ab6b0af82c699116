"""Training under wrong gradients as a task: what attackers send, what workers compute, what references reduce to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab import nets
from trimtab.federated import coordinate_median, plain_mean
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.byzantine import (
    Aggregation,
    Byzantine,
    attacked,
    descend,
    many_sign_flips,
    per_worker_gradients,
    sign_flip,
)

SETTING = {"lr": 0.3}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_image_is_in_two_parts() -> None:
    images = sign_flip.images(Trial())
    parts = [set(map(bytes, x.numpy())) for x in (images.x, images.x_held, images.x_test)]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts))


def test_gradients_are_each_workers_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nets.mlp(6, (5,), 3)
    x, y = torch.randn(4, 7, 6, generator=seeded()), torch.randint(3, (4, 7), generator=seeded())
    found = per_worker_gradients(model)(x, y)
    own = torch.autograd.grad(F.cross_entropy(model(x[2]), y[2]), list(model.parameters()))
    torch.testing.assert_close(found[2], torch.cat([g.flatten() for g in own]))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    descend(model, found[2], 0.5)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(after, before - 0.5 * found[2])


def test_what_attackers_send() -> None:
    honest, own = torch.randn(12, 4000, generator=seeded()) + 1, torch.randn(3, 4000, generator=seeded(1))
    mean = honest.mean(0)
    torch.testing.assert_close(attacked("sign flip", own, honest, generator=seeded())[1], -5 * mean)
    noise = attacked("random", own, honest, generator=seeded())
    assert (noise.norm(dim=1) / mean.norm()).tolist() == pytest.approx([1000.0] * 3, rel=0.05)
    assert torch.cosine_similarity(noise[0], noise[1], dim=0).abs() < 0.1
    little = attacked("little is enough", own, honest, generator=seeded())
    torch.testing.assert_close(little[0], mean - 1.5 * honest.std(0))
    dropped = attacked("dropped", own, honest, generator=seeded())
    assert 0.08 < (dropped == 0).float().mean() < 0.12
    assert torch.equal(dropped[dropped != 0], own[dropped != 0])


def test_only_the_mean_is_led_astray_and_seeds_decide() -> None:
    def run(rule, seed: int = 1) -> dict[str, float]:
        return dict(sign_flip.run(Trial(seed=seed, setting=SETTING), Aggregation(mean=lambda plan: rule)).metrics)

    mean, median = run(plain_mean), run(coordinate_median)
    assert set(mean) == set(sign_flip.metrics)
    assert mean["alignment"] < -0.5 < 0.3 < median["alignment"]
    assert median["accuracy"] > mean["accuracy"]
    assert run(coordinate_median) == median
    assert run(coordinate_median, seed=2) != median


def test_searching_scores_on_held_out_images_alone() -> None:
    result = sign_flip.run(Trial(setting=SETTING, searching=True), Aggregation(mean=lambda plan: coordinate_median))
    assert result.score is not None
    assert not result.metrics


def test_without_attackers_references_agree() -> None:
    none = Byzantine(byzantine=0)
    found = {
        name: none.run(Trial(setting=SETTING), reference).metrics["accuracy"]
        for name, reference in none.references().items()
        if name in ("mean", "trimmed mean", "Multi-Krum", "Bulyan")
    }
    assert max(found.values()) - min(found.values()) < 0.03  # sums in another order


def test_impossible_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="byzantine must be"):
        Byzantine(byzantine=8)
    with pytest.raises(ValueError, match="attack must be"):
        Byzantine(attack="bribe")


def test_who_needs_more_workers_is_told_so() -> None:
    bulyan = Byzantine.references()["Bulyan"]
    assert bulyan.unfit is not None
    assert bulyan.unfit(sign_flip) == ""
    assert bulyan.unfit(many_sign_flips) == "against 6 wrong workers it needs 27 in all"
    for name, entrant in Byzantine.references().items():
        if name != "Bulyan":
            found = many_sign_flips.run(Trial(setting=SETTING), entrant)
            assert torch.isfinite(torch.tensor(list(found.metrics.values()))).all(), name
