from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.semisup import (
    TJEPA,
    ColumnMasks,
    TabularEncoder,
    TabularTokenizer,
    code_variance,
    sample_column_masks,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(batch: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    x_num = torch.randn(batch, 4, generator=seeded(seed))
    return x_num, torch.stack([torch.arange(batch) % 3, torch.arange(batch) % 2], 1)


def model(**options: object) -> TJEPA:
    settings = {"dim": 8, "num_layers": 1, "num_heads": 2, "predictor_dim": 4, "predictor_layers": 1, "dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TJEPA(4, [3, 2], **{**settings, **options})  # type: ignore[arg-type]


# --- masks


def test_context_and_targets_share_no_column() -> None:
    for seed in range(30):
        masks = sample_column_masks(5, 9, generator=seeded(seed))
        assert masks.context.shape[0] == 5
        assert masks.targets.shape[:2] == (5, 4)
        assert not (masks.context[:, None, :, None] == masks.targets[:, :, None]).any()
        for held in (masks.context, masks.targets.flatten(0, 1)):
            assert ((held >= 0) & (held < 9)).all()
            assert all(len(row.unique()) == len(row) for row in held)
        assert masks.context.shape[1] + masks.targets.shape[2] <= 9


def test_numbers_of_columns_are_rounded_uniform_ones() -> None:
    """2 to 5 of 20 columns, the ends half as likely, where there is room for all."""
    generator = seeded()
    counts = torch.zeros(6)
    for _ in range(3000):
        masks = sample_column_masks(
            1, 20, context_share=(0.1, 0.25), target_share=(0.2, 0.2), num_targets=1, generator=generator
        )
        counts[masks.context.shape[1]] += 1
        assert masks.targets.shape[2] == 4
    torch.testing.assert_close(counts / 3000, torch.tensor([0, 0, 1, 2, 2, 1]) / 6, rtol=0, atol=0.03)


def test_every_column_is_drawn_alike() -> None:
    masks = sample_column_masks(4000, 5, context_share=(0.4, 0.4), target_share=(0.4, 0.4), generator=seeded())
    for held in (masks.context, masks.targets):
        share = held.flatten().bincount(minlength=5) / held.numel()
        torch.testing.assert_close(share, torch.full((5,), 0.2), rtol=0, atol=0.015)
    assert masks.context[0].ne(masks.context[1:]).any()  # each row its own
    assert (masks.targets[:, 0].sort(1).values != masks.targets[:, 1].sort(1).values).any()  # and each set


def test_masks_are_decided_by_the_generator() -> None:
    before = torch.get_rng_state()
    one, same, other = (sample_column_masks(20, 9, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one.context, same.context)
    assert torch.equal(one.targets, same.targets)
    assert one.context.shape != other.context.shape or not torch.equal(one.context, other.context)
    assert torch.equal(torch.get_rng_state(), before)


# --- encoder


def test_tokens_of_numbers_and_categories() -> None:
    tokenizer = model().encoder.tokenizer
    x_num, x_cat = rows()
    tokens = tokenizer(x_num, x_cat)
    torch.testing.assert_close(tokens[:, 0], tokenizer.extra.expand(6, -1))
    for j in range(4):
        torch.testing.assert_close(tokens[:, 1 + j], x_num[:, j, None] * tokenizer.weight[j] + tokenizer.bias[j])
    torch.testing.assert_close(tokens[:, 5], tokenizer.categories[:3][x_cat[:, 0]] + tokenizer.bias[4])
    torch.testing.assert_close(tokens[:, 6], tokenizer.categories[3:][x_cat[:, 1]] + tokenizer.bias[5])


def test_only_the_columns_shown_matter() -> None:
    encoder = model().encoder
    x_num, x_cat = rows()
    columns = torch.tensor([[0, 4]] * 3 + [[5, 2]] * 3)
    seen = encoder(x_num, x_cat, columns=columns)
    assert seen.shape == (6, 2, 8)
    x_num[:, [1, 3]] += 5
    torch.testing.assert_close(encoder(x_num, x_cat, columns=columns), seen)
    x_num[:, 2] += 5
    moved = encoder(x_num, x_cat, columns=columns)
    torch.testing.assert_close(moved[:3], seen[:3])
    assert not torch.allclose(moved[3:], seen[3:])


def test_codes_follow_their_columns() -> None:
    """Columns in another order give the codes in another order, with positions or, if they are renamed, without."""
    encoder = model().encoder
    x_num, x_cat = rows()
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    all_columns = encoder(x_num, x_cat)
    torch.testing.assert_close(encoder(x_num, x_cat, columns=order.expand(6, -1)), all_columns[:, order])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = TabularEncoder(TabularTokenizer(4, [], 8), 1, 2, 0.0)
    plain.positions.zero_()
    renamed = copy.deepcopy(plain)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        renamed.tokenizer.weight.copy_(plain.tokenizer.weight[order])
        renamed.tokenizer.bias.copy_(plain.tokenizer.bias[order])
    torch.testing.assert_close(renamed(x_num[:, order]), plain(x_num)[:, order])


# --- the model


def test_the_loss_is_the_error_of_told_codes() -> None:
    held = model()
    x_num, x_cat = rows()
    masks = sample_column_masks(6, 6, num_targets=3, generator=seeded())
    codes = held.teacher.model(x_num, x_cat)
    told = held.predictor(held.encoder(x_num, x_cat, columns=masks.context), masks.context, masks.targets)
    errors = [
        (told[row, k, place] - codes[row, column]).square().mean()
        for row in range(6)
        for k in range(3)
        for place, column in enumerate(masks.targets[row, k])
    ]
    found = held.loss(x_num, x_cat, masks=masks)
    torch.testing.assert_close(found["total"], torch.stack(errors).mean())
    torch.testing.assert_close(found["variance"], codes.var(0, correction=0).mean())


def test_a_set_is_told_by_itself() -> None:
    """What else is asked in another set changes nothing."""
    held = model()
    x_num, x_cat = rows()
    masks = sample_column_masks(6, 6, num_targets=4, generator=seeded())
    seen = held.encoder(x_num, x_cat, columns=masks.context)
    together = held.predictor(seen, masks.context, masks.targets)
    alone = held.predictor(seen, masks.context, masks.targets[:, 2:3])
    torch.testing.assert_close(together[:, 2:3], alone)


def test_gradients_reach_all_but_the_averaged_encoder() -> None:
    held = model()
    held.loss(*rows(), generator=seeded())["total"].backward()
    assert all(p.grad is None for p in held.teacher.parameters())
    for part in (held.encoder, held.predictor):
        assert all(p.grad is not None for p in part.parameters())


def test_the_averaged_encoder_follows_and_stops() -> None:
    held = model(decay=0.9)
    before = copy.deepcopy(held.teacher.model.tokenizer.weight)
    with torch.no_grad():
        held.encoder.tokenizer.weight.add_(1)
    held.update(progress=0.5)
    torch.testing.assert_close(held.teacher.model.tokenizer.weight, before + 0.05)
    held.update(progress=1.0)
    torch.testing.assert_close(held.teacher.model.tokenizer.weight, before + 0.05)


def test_it_learns_a_table_of_low_rank() -> None:
    factors = torch.randn(256, 2, generator=seeded())
    x = factors @ torch.randn(2, 8, generator=seeded(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held = TJEPA(8, dim=16, num_layers=1, num_heads=2, predictor_dim=8, predictor_layers=1, dropout=0.0)
    optimizer = torch.optim.Adam(held.parameters(), lr=3e-3)
    generator, values = seeded(2), []
    for step in range(120):
        loss = held.loss(x[step % 4 :: 4], generator=generator)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        held.update(step / 120)
        values.append(loss.item())
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
    assert held.encode(x).shape == (256, 8, 16)


def test_without_the_further_token() -> None:
    held = model(num_extra=0)
    assert held.encode(*rows()).shape == (6, 6, 8)
    assert held.loss(*rows(), generator=seeded())["total"].isfinite()


def test_variance_is_zero_where_rows_are_the_same() -> None:
    codes = torch.randn(1, 3, 4, generator=seeded())
    assert code_variance(codes.expand(5, -1, -1)).item() == 0
    torch.testing.assert_close(code_variance(torch.cat([codes, -codes])), codes.square().mean())


def test_a_row_does_not_depend_on_its_batch() -> None:
    held = model()
    torch.testing.assert_close(held.encode(*rows())[:1], held.encode(*(part[:1] for part in rows())))
    assert held.loss(*(part[:1] for part in rows()), generator=seeded())["total"].isfinite()


def test_other_precisions() -> None:
    x_num, x_cat = rows()
    masks = sample_column_masks(6, 6, generator=seeded())
    held = model()
    value = held.loss(x_num, x_cat, masks=masks)["total"]
    with torch.autocast("cpu", torch.bfloat16):
        half = held.loss(x_num, x_cat, masks=masks)["total"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value, rtol=0.05, atol=0.02)
    double = held.double().loss(x_num.double(), x_cat, masks=masks)["total"]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), value)


def test_it_resumes() -> None:
    held, again = model(), model()
    for other in (held, again):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        other.loss(*rows(), generator=seeded())["total"].backward()
        optimizer.step()
        other.update(0.0)
        if other is held:
            again.load_state_dict(held.state_dict())
            assert torch.equal(held.encode(*rows()), again.encode(*rows()))
    assert F.mse_loss(held.encode(*rows()), again.encode(*rows())) < 1


def test_refused() -> None:
    held = model()
    x_num, x_cat = rows()
    before = copy.deepcopy(held.state_dict())
    masks = ColumnMasks(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 4, 2, dtype=torch.int64))
    generator = seeded(7)
    state = generator.get_state()
    for error, match, call in [
        (ValueError, "number of columns must be at least 3", lambda: TJEPA(2)),
        (ValueError, "num_features must be at least 3", lambda: sample_column_masks(4, 2)),
        (ValueError, "leave room", lambda: sample_column_masks(4, 4, context_share=(0.9, 0.95))),
        (ValueError, "leave room", lambda: model(target_share=(0.95, 0.95))),
        (ValueError, "context_share must be in", lambda: sample_column_masks(4, 9, context_share=(0.0, 0.5))),
        (ValueError, "target_share must be", lambda: sample_column_masks(4, 9, target_share=(0.5, 0.2))),
        (ValueError, "num_targets must be", lambda: sample_column_masks(4, 9, num_targets=0)),
        (ValueError, "num_heads must divide", lambda: model(num_heads=3)),
        (ValueError, "predictor_dim must be", lambda: model(predictor_dim=5)),
        (ValueError, "decay must be", lambda: model(decay=1.5)),
        (ValueError, "dropout must be", lambda: model(dropout=1.0)),
        (ValueError, "cardinalities must be", lambda: TabularTokenizer(2, [0], 8)),
        (ValueError, "at least one column", lambda: TabularTokenizer(0, [], 8)),
        (ValueError, "x_num must be of shape", lambda: held.loss(x_num[:, :3], x_cat, generator=generator)),
        (ValueError, "x_num must be of shape", lambda: held.loss(x_num[:0], x_cat[:0], generator=generator)),
        (ValueError, "x_cat must be of shape", lambda: held.loss(x_num, generator=generator)),
        (ValueError, "as many rows", lambda: held.loss(x_num, x_cat[:2], generator=generator)),
        (ValueError, r"x_cat\[:, 0\] must be in", lambda: held.loss(x_num, x_cat + 1, generator=generator)),
        (TypeError, "x_cat must be int64", lambda: held.loss(x_num, x_cat.float(), generator=generator)),
        (TypeError, "x_num must be floating", lambda: held.loss(x_num.long(), x_cat, generator=generator)),
        (ValueError, "masks must be of 6 rows", lambda: held.loss(x_num, x_cat, masks=masks)),
        (ValueError, "progress must be", lambda: held.update(1.5)),
        (ValueError, "state_dict must be", lambda: held.load_state_dict({})),
        (ValueError, "codes must be", lambda: code_variance(torch.zeros(3, 2))),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(generator.get_state(), state)
    after = held.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if isinstance(before[name], Tensor))


def test_masks_and_shares_of_another_form_are_named() -> None:
    model, x = TJEPA(4, dim=8, num_layers=1, num_heads=2, predictor_dim=4, predictor_layers=1), torch.randn(3, 4)
    seen, told = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 2, 1, dtype=torch.int64)
    for masks in (ColumnMasks(seen[:, :0], told), ColumnMasks(seen, told[:, :0]), ColumnMasks(seen, told[..., :0])):
        with pytest.raises(ValueError, match="^masks must show and tell a column"):
            model.loss(x, masks=masks)
    with pytest.raises(ValueError, match="^context_share must be"):
        TJEPA(4, context_share=(0.2,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^x_num must be a tensor, got list"):
        model.loss(x.tolist())  # type: ignore[arg-type]
