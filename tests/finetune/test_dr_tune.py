from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.finetune import DRTune, procrustes_rotation, semantic_calibration


def rows(n: int = 40, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def rotation(dim: int = 5, seed: int = 3) -> Tensor:
    Q = torch.linalg.qr(rows(dim, dim, seed)).Q
    return Q * torch.linalg.det(Q).sign() ** torch.eye(dim)[0]  # a reflection is mended in one column


def model(queue_size: int = 12, **options: object) -> DRTune:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DRTune(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3), queue_size, **options)


def batch(step: int = 0, n: int = 5) -> tuple[Tensor, Tensor]:
    return rows(n, 4, seed=step), torch.arange(n) % 3


LABELS = torch.arange(40) % 4


def test_a_known_rotation_is_found() -> None:
    x, R = rows(), rotation()
    assert torch.linalg.det(R).item() == pytest.approx(1.0, abs=1e-5)
    found = procrustes_rotation(x, 3 * x @ R.T + 7)
    torch.testing.assert_close(found, R, atol=1e-4, rtol=0)


def test_a_reflection_is_answered_by_a_rotation() -> None:
    x = rows()
    found = procrustes_rotation(x, x * torch.tensor([-1.0, 1, 1, 1, 1]))
    assert torch.linalg.det(found).item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(found @ found.T, torch.eye(5), atol=1e-5, rtol=0)


def test_rotation_is_the_nearest_one() -> None:
    x, y = rows() - rows().mean(0), rows(seed=1) - rows(seed=1).mean(0)
    best = (x @ procrustes_rotation(x, y).T - y).square().sum()
    for seed in range(20):
        assert (x @ rotation(seed=seed).T - y).square().sum() > best


def test_rows_that_are_not_kept_do_not_count() -> None:
    x, y, keep = rows(), rows(seed=1), torch.arange(40) < 30
    garbled = torch.where(keep[:, None], x, 9 * x)
    torch.testing.assert_close(
        procrustes_rotation(garbled, y, keep), procrustes_rotation(x[:30], y[:30]), atol=1e-4, rtol=0
    )
    W = rows(4)
    part = semantic_calibration(garbled, y, LABELS, W, keep=keep)[:30]
    torch.testing.assert_close(part, semantic_calibration(x[:30], y[:30], LABELS[:30], W), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rotate", [True, False])
def test_same_features_stay_where_they_are(rotate: bool) -> None:
    x = rows()
    moved = semantic_calibration(x, 5 * x, LABELS, torch.zeros(4, 5), scale=2.0, rotate=rotate)
    torch.testing.assert_close(moved, 2 * F.normalize(x), atol=1e-5, rtol=0)


def test_drift_by_a_rotation_is_undone_up_to_length() -> None:
    x, R = rows(), rotation()
    moved = semantic_calibration(x, x @ R.T, LABELS, torch.zeros(4, 5))
    torch.testing.assert_close(moved, F.normalize(x @ R.T), atol=1e-4, rtol=0)
    unturned = semantic_calibration(x, x @ R.T, LABELS, torch.zeros(4, 5), rotate=False)
    assert not torch.allclose(unturned, moved, atol=0.1)


def test_shift_is_the_equation() -> None:
    x, z, W = F.normalize(rows()), F.normalize(rows(seed=1)), rows(5, seed=2)  # class 4 is empty
    expected = x.clone()
    for c in range(4):
        own = c == LABELS
        weights = (z[own] @ (W[c] / W[c].norm())).softmax(0)
        expected[own] += (weights[:, None] * z[own]).sum(0) - x[own].mean(0)
    found = semantic_calibration(x, z, LABELS, W, scale=3.0, rotate=False)
    torch.testing.assert_close(found, 3 * F.normalize(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.full((40,), 3.0))
    assert not torch.allclose(found, semantic_calibration(x, z, LABELS, -W, scale=3.0, rotate=False), atol=1e-3)
    torch.testing.assert_close(semantic_calibration(x, z, LABELS, 9 * W, 3.0, False), found, atol=1e-5, rtol=0)


def test_queues_are_first_in_first_out_and_wrap() -> None:
    held = model(queue_size=7)
    x, y = rows(10, 4), torch.arange(10) % 3
    held.warmup([(x[:5], y[:5]), (x[5:], y[5:]), (x, y)])  # the last is not needed
    assert sorted(held.downstream.payload.tolist()) == sorted(y[3:].tolist())
    features = F.normalize(held.reference(x[3:]))
    there = (held.pretrained.features[:, None] - features).norm(dim=2) < 1e-5
    assert there.any(0).all()
    assert torch.equal(held.pretrained.features, held.downstream.features)


def test_loss_is_the_mean_over_batch_and_queue() -> None:
    held = model()
    held.warmup([batch(seed) for seed in range(3)])
    before = copy.deepcopy(held)
    x, y = batch(7)
    found = held.loss(x, y)
    z, labels = before.encoder(x), before.downstream.payload
    stored = semantic_calibration(
        before.pretrained.features, before.downstream.features, labels, before.head.weight, z.norm(dim=1).mean()
    )
    expected = F.cross_entropy(before.head(torch.cat([z, stored.detach()])), torch.cat([y, labels]))
    torch.testing.assert_close(found["total"], expected)
    weighted = copy.deepcopy(before)
    weighted.reg_weight = 0.25
    other = weighted.loss(x, y)
    torch.testing.assert_close(other["total"], other["task"] + 0.25 * other["queue"])


def test_the_queue_teaches_the_head_alone() -> None:
    held = model()
    held.warmup([batch(seed) for seed in range(3)])
    x, y = batch(7)
    plain = copy.deepcopy(held)
    F.cross_entropy(plain(x), y).backward()
    held.reg_weight = 1.0
    held.loss(x, y)["total"].backward()
    for p, q in zip(held.encoder.parameters(), plain.encoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert not torch.allclose(held.head.weight.grad, plain.head.weight.grad, atol=1e-3)
    assert all(p.grad is None for p in held.reference.parameters())


@pytest.mark.parametrize("why", ["empty queues", "no weight"])
def test_switched_off_it_is_cross_entropy(why: str) -> None:
    held = model(reg_weight=0.0 if why == "no weight" else None)
    if why == "no weight":
        held.warmup([batch(3)])
    x, y = batch()
    found = held.loss(x, y)
    torch.testing.assert_close(found["total"], F.cross_entropy(held(x), y))
    assert torch.isfinite(found["queue"])


def test_rotation_on_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = []
    import trimtab.finetune.dr_tune as module

    def noted(*args: object, **kwargs: object) -> Tensor:
        turned.append(args[5])
        return semantic_calibration(*args, **kwargs)

    monkeypatch.setattr(module, "semantic_calibration", noted)
    held = model(rotate_every=3)
    for step in range(5):
        held.loss(*batch(step))
    assert turned == [True, False, False, True, False]
    model(calibrate=False).loss(*batch())
    assert len(turned) == 5


def test_the_copy_stays_as_it_was_and_in_eval_mode() -> None:
    held = DRTune(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Linear(6, 3), queue_size=8).train()
    before = copy.deepcopy(held.reference.state_dict())
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        held.loss(*batch(step))["total"].backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in held.reference.state_dict().items())
    assert held.training
    assert held.encoder.training
    assert not held.reference.training
    assert not torch.equal(held.encoder[0].weight, held.reference[0].weight)


def test_warming_up_reads_no_more_than_fills_the_queues_and_the_copy_has_nothing_to_train() -> None:
    held, seen = model(queue_size=10), []
    held.reference.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    held.warmup(batch(step) for step in range(9))
    assert held.downstream.filled.all()
    assert seen == [5, 5]
    assert not any(p.requires_grad for p in held.reference.parameters())
    assert all(p.requires_grad for p in held.encoder.parameters())


def test_the_queues_take_what_either_encoder_makes_of_the_batch() -> None:
    held, (x, y) = model(queue_size=5), batch()
    held.encoder[0].weight.data += 0.5
    expected = [F.normalize(encoder(x)).detach() for encoder in (held.encoder, held.reference)]
    held.loss(x, y)
    torch.testing.assert_close(held.downstream.features, expected[0])
    torch.testing.assert_close(held.pretrained.features, expected[1])
    assert not torch.allclose(*expected)


def test_resumes_and_learns() -> None:
    def train(held: DRTune, steps: range) -> list[float]:
        optimizer = torch.optim.SGD([*held.encoder.parameters(), *held.head.parameters()], lr=0.5)
        losses = []
        for step in steps:
            x = rows(16, 4, seed=step % 4)
            found = held.loss(x, x[:, :3].argmax(1))
            optimizer.zero_grad()
            found["total"].backward()
            optimizer.step()
            losses.append(found["task"].item())
        return losses

    one, other = model(queue_size=32, rotate_every=2), model(queue_size=32, rotate_every=2)
    first = train(one, range(3))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    later = train(one, range(3, 150))
    assert train(other, range(3, 150)) == later
    assert later[-1] < 0.7 * first[0]


def test_half_precision_autocast() -> None:
    held = model()
    held.warmup([batch(3)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert math.isfinite(held.loss(*batch())["total"].item())


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="^head must be a linear layer"):
        DRTune(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))  # type: ignore[arg-type]
    for options in ({"rotate_every": -1}, {"reg_weight": -1.0}, {"queue_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            model(**options)
    held = model()
    with pytest.raises(TypeError, match="^targets must be int64"):
        held.loss(batch()[0], batch()[1].float())
    with pytest.raises(ValueError, match="^targets must be one for each"):
        held.loss(batch()[0], batch()[1][:-1])
    with pytest.raises(ValueError, match="at least 1"):
        held.loss(batch()[0][:0], batch()[1][:0])
    with pytest.raises(ValueError, match="^pretrained must have a row"):
        semantic_calibration(rows(), rows(), LABELS[:-1], rows(4))
    with pytest.raises(ValueError, match="^downstream must be of shape"):
        semantic_calibration(rows(), rows(3), LABELS, rows(4))
    with pytest.raises(ValueError, match="^target must be of shape"):
        procrustes_rotation(rows(), rows(3))


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_none_is_refused_before_anything_moves(label: int) -> None:
    with torch.random.fork_rng():
        held = DRTune(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Linear(6, 3), 12)
    x, y = batch()
    held.loss(x, y)
    before = copy.deepcopy(held.state_dict())
    wrong = y.clone()
    wrong[2] = label
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 3\), got {label}"):
        held.loss(x, wrong)
    with pytest.raises(ValueError, match="targets must be in"):
        held.warmup([(x, wrong)])
    for name, part in held.state_dict().items():
        assert part == before[name] if isinstance(part, dict) else torch.equal(part, before[name])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        semantic_calibration(rows(2), rows(2), torch.tensor([0, 2]), rows(2))
    with pytest.raises(ValueError, match="scale must be"):
        semantic_calibration(rows(2), rows(2), torch.tensor([0, 1]), rows(2), scale=-1)
