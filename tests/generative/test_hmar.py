"""HMAR: who sees whom, weights and schedules, the masked head, and what generation keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from trimtab.generative import HierarchicalMaskedAR, MultiScaleQuantizer, next_scale_mask, scale_loss_weights
from trimtab.generative.blocks import Block, causal, draw, in_groups, up_to_groups

FULL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES = (1, 2, 3)
SIZES = [1, 4, 9]
LABELS = torch.tensor([3, 0, 7])


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(**options) -> HierarchicalMaskedAR:
    """With random weights everywhere, so that nothing is hidden by what starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = HierarchicalMaskedAR(
            MultiScaleQuantizer(SCALES, 8, 4), 10, **({"dim": 16, "depth": 2, "masked_depth": 1, "heads": 2} | options)
        ).double()
        for p in made.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    return made


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(8, (3, 14), generator=gen(seed))


def test_the_mask_is_as_sparse_as_the_paper_says() -> None:
    own, coarser = next_scale_mask(FULL), next_scale_mask(FULL, "coarser scales")
    assert own.shape == (680, 680)
    assert int(own.sum()) == sum(side**4 for side in FULL) == 110_468
    assert int(coarser.sum()) == 286_434
    assert 2.5 < coarser.sum() / own.sum() < 2.6
    assert bool((coarser | ~own).all())
    assert torch.equal(own, own.T)


@pytest.mark.parametrize("context", ["own scale", "coarser scales"])
def test_calls_by_scale_are_attention_under_the_mask(context) -> None:
    q, k, v = torch.randn(3, 2, 2, 14, 5, dtype=torch.float64, generator=gen())
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=next_scale_mask(SCALES, context))
    found = (in_groups if context == "own scale" else up_to_groups)(q, k, v, SIZES)
    torch.testing.assert_close(found, expected)


def test_groups_of_one_up_to_themselves_are_causal_attention() -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 5, generator=gen())
    torch.testing.assert_close(up_to_groups(q, k, v, [1] * 6), causal(q, k, v))


def test_a_block_without_condition_is_an_ordinary_one() -> None:
    block, x = Block(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64, generator=gen())
    attended = block._attention(F.layer_norm(x, (8,)), F.scaled_dot_product_attention)
    middle = x + attended
    torch.testing.assert_close(block(x), middle + block.mlp(F.layer_norm(middle, (8,))))
    shut = torch.zeros(2, 6, 8, dtype=torch.float64)
    shut[:, [2, 5]] = -1.0
    assert torch.equal(block(x, shut), x)  # both gates closed


def test_cosine_attention_knows_no_lengths() -> None:
    block, x = Block(8, 2, unit_queries=True).double(), torch.randn(2, 5, 8, dtype=torch.float64, generator=gen())
    torch.nn.init.zeros_(block.qkv.bias)
    weight = block.qkv.weight.data.clone()
    before = block(x)
    block.qkv.weight.data[:16] = 7 * weight[:16]  # queries and keys
    torch.testing.assert_close(block(x), before)


def test_cosine_attention_is_as_sharp_as_four_cosines_at_first() -> None:
    block, x = Block(12, 3, unit_queries=True).double(), torch.randn(2, 5, 12, dtype=torch.float64, generator=gen())
    q, k, v = block.qkv(F.layer_norm(x, (12,))).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    scores = (4.0 * F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)).softmax(-1)
    attended = x + block.out((scores @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), attended + block.mlp(F.layer_norm(attended, (12,))))


def test_weights() -> None:
    for weighting in ("middle", "scales", "tokens"):
        weights = scale_loss_weights(FULL, weighting)
        assert weights.shape == (680,)
        assert float(weights.double().sum()) == pytest.approx(1.0)
    by_scale = torch.stack([part.sum() for part in scale_loss_weights(FULL).split([s * s for s in FULL])])
    sides = torch.tensor(FULL, dtype=torch.float64)
    expected = torch.tensor(norm.pdf(((sides.flip(0) - sides.mean()) / sides.std()).numpy()))
    torch.testing.assert_close(by_scale.double(), expected / expected.sum(), rtol=1e-5, atol=0)
    assert 2 < int(by_scale.argmax()) < 7  # a middle scale
    assert scale_loss_weights(FULL, "tokens").unique().numel() == 1
    assert scale_loss_weights((4,)).tolist() == [1 / 16] * 16


def test_a_scale_sees_its_own_input_alone() -> None:
    """No gradient from the logits of a scale to the input of another; with coarser scales, none to finer ones."""
    for context in ("own scale", "coarser scales"):
        net = model(context=context)
        inputs = net.quantizer.inputs(tokens()).detach().requires_grad_()
        logits = net.next_scale_logits(LABELS, inputs).split(SIZES, 1)
        for k, part in enumerate(logits):
            reach = torch.autograd.grad(part.square().sum(), inputs, retain_graph=True, allow_unused=True)[0]
            seen = [False] * 2 if reach is None else [bool(part.any()) for part in reach.split(SIZES[1:], 1)]
            wanted = [j == k or (context == "coarser scales" and 0 < j < k) for j in (1, 2)]
            assert seen == wanted, (context, k)


def test_the_loss_is_the_weighted_cross_entropy() -> None:
    net, indices = model(label_drop=0.0), tokens()
    log_probs = net.next_scale_logits(LABELS, net.quantizer.inputs(indices)).log_softmax(-1)
    own = -log_probs.gather(-1, indices[..., None])[..., 0]
    expected = sum(part.mean() * w for part, w in zip(own.split(SIZES, 1), _by_scale(net), strict=True))
    torch.testing.assert_close(net.next_scale_loss(LABELS, indices), expected)


def _by_scale(net: HierarchicalMaskedAR) -> list[Tensor]:
    return [part.sum().double() for part in net.token_weights.split(SIZES)]


def test_labels_are_dropped_at_their_rate() -> None:
    net, indices = model(label_drop=0.999), tokens()
    none = torch.full((3,), 10)
    logits = net.next_scale_logits(none, net.quantizer.inputs(indices))
    losses = F.cross_entropy(logits.transpose(1, 2), indices, reduction="none")
    torch.testing.assert_close(
        net.next_scale_loss(LABELS, indices, generator=gen()), (losses * net.token_weights).sum(1).mean()
    )


def test_the_masked_head_does_not_see_what_is_hidden() -> None:
    net, indices = model(), tokens()
    inputs = net.quantizer.inputs(indices)
    hidden = torch.zeros(3, 14, dtype=torch.bool)
    hidden[:, [2, 7, 8]] = True
    logits = net.masked_logits(LABELS, inputs, indices, hidden)
    other = torch.where(hidden, (indices + 1) % 8, indices)
    assert torch.equal(net.masked_logits(LABELS, inputs, other, hidden), logits)
    shown = indices.clone()
    shown[:, 9] = (shown[:, 9] + 1) % 8
    changed = net.masked_logits(LABELS, inputs, shown, hidden)
    assert torch.equal(changed[:, :5], logits[:, :5])  # another scale
    assert not torch.isclose(changed[:, 5:], logits[:, 5:]).all(-1).any()


def test_the_masked_loss_is_of_hidden_tokens_beyond_the_first_scale() -> None:
    net, indices = model(label_drop=0.0), tokens()
    hidden = torch.rand(3, 14, generator=gen()) < 0.5
    hidden[:, 0] = True
    logits = net.masked_logits(LABELS, net.quantizer.inputs(indices), indices, hidden)
    counted = hidden.clone()
    counted[:, 0] = False
    expected = F.cross_entropy(logits[counted], indices[counted])
    torch.testing.assert_close(net.masked_loss(LABELS, indices, hidden=hidden), expected)
    for seed in range(20):  # each scale hides the same share, at least one token
        drawn = net._draw_hidden(5, gen(seed))
        counts = torch.stack([part.sum(1) for part in drawn.split(SIZES, 1)], 1)
        assert bool((counts == counts[:1]).all())
        assert bool((counts >= 1).all())
        coarse, fine = int(counts[0, 1]), int(counts[0, 2])
        assert 9 * (coarse - 1) < 4 * fine <= 9 * coarse + 3  # both round one share up


def test_masked_training_touches_the_masked_head_alone() -> None:
    net, indices = model(), tokens()
    net.start_masked_head()
    assert torch.equal(net.masked_head.weight, net.head.weight)
    assert any(p is net.hidden for p in net.masked_parameters())
    net.requires_grad_(False)
    for p in net.masked_parameters():
        p.requires_grad_(True)
    before = net.next_scale_logits(LABELS, net.quantizer.inputs(indices))
    optimizer = torch.optim.SGD(net.masked_parameters(), lr=0.1)
    first = net.masked_loss(LABELS, indices, hidden=torch.ones(3, 14, dtype=torch.bool))
    first.backward()
    optimizer.step()
    assert torch.equal(net.next_scale_logits(LABELS, net.quantizer.inputs(indices)), before)
    assert net.masked_loss(LABELS, indices, hidden=torch.ones(3, 14, dtype=torch.bool)) < first


def test_everything_hidden_the_started_head_is_the_next_scale_head_with_one_vector_added() -> None:
    net, indices = model(), tokens()
    net.start_masked_head()
    net.hidden.data.zero_()
    inputs = net.quantizer.inputs(indices)
    all_hidden = torch.ones(3, 14, dtype=torch.bool)
    torch.testing.assert_close(
        net.masked_logits(LABELS, inputs, indices, all_hidden), net.next_scale_logits(LABELS, inputs)
    )


@pytest.mark.parametrize("context", ["own scale", "coarser scales"])
def test_generation_in_one_pass_a_scale_is_sampling_from_the_training_logits(context) -> None:
    net = model(context=context)
    made = net.generate(LABELS, top_k=1)
    logits = net.next_scale_logits(LABELS, net.quantizer.inputs(made.indices))
    assert torch.equal(made.indices, logits.argmax(-1))
    torch.testing.assert_close(made.features, net.quantizer.decode(made.indices))
    whole, part = (net.generate(LABELS, num_scales=n, generator=gen()) for n in (3, 2))
    assert torch.equal(whole.indices[:, :5], part.indices)


def test_a_schedule_of_single_passes_changes_nothing() -> None:
    net = model()
    plain, other = (net.generate(LABELS, schedule=s, generator=gen(1)) for s in (None, [[1], [4], [9]]))
    assert torch.equal(plain.indices, other.indices)


def test_refinement_keeps_the_most_confident_tokens() -> None:
    net = model()
    plain = net.generate(LABELS, top_k=1)
    refined = net.generate(LABELS, top_k=1, schedule=[[1], [1, 3], [9]])
    logits = net.next_scale_logits(LABELS, net.quantizer.inputs(plain.indices))[:, 1:5]
    best = logits.softmax(-1).max(-1).values.argmax(1)
    rows = torch.arange(3)
    assert torch.equal(refined.indices[rows, 1 + best], plain.indices[rows, 1 + best])
    hidden = torch.ones(3, 14, dtype=torch.bool)
    hidden[rows, 1 + best] = False
    again = net.masked_logits(LABELS, net.quantizer.inputs(plain.indices), plain.indices, hidden).argmax(-1)
    assert torch.equal(refined.indices[:, 1:5], torch.where(hidden, again, plain.indices)[:, 1:5])


def test_one_token_a_pass_is_next_token_prediction() -> None:
    """As many passes as tokens: each settles one, and none is changed again."""
    net = model()
    made = net.generate(LABELS, schedule=[[1], [1] * 4, [1] * 9], generator=gen())
    assert made.indices.shape == (3, 14)
    calls: list[int] = []
    net.masked_head.register_forward_hook(lambda *_: calls.append(1))
    net.generate(LABELS, schedule=[[1], [1] * 4, [1] * 9])
    assert len(calls) == 3 + 8


def test_what_is_settled_stays_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = model(), []
    unhidden = net._unhidden

    def watched(inputs: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        seen.append((indices, hidden))
        return unhidden(inputs, indices, hidden)

    monkeypatch.setattr(net, "_unhidden", watched)
    made = net.generate(LABELS, schedule=[[1], [1, 1, 2], [2, 3, 4]], generator=gen())
    assert [hidden.sum(1).tolist() for _, hidden in seen] == [[3] * 3, [2] * 3, [7] * 3, [4] * 3]
    for (before, hidden), (after, less) in zip(seen[::2], seen[1::2], strict=True):
        assert not (less & ~hidden).any()
        assert torch.equal(before[~hidden], after[~hidden])
    for (settled, hidden), part in zip(seen[1::2], made.indices[:, 1:].split([4, 9], 1), strict=True):
        assert torch.equal(settled[~hidden], part[~hidden])


def test_guidance_grows_with_the_scale() -> None:
    net = model()
    made = net.generate(LABELS, cfg=2.0, top_k=1)
    inputs, none = net.quantizer.inputs(made.indices), torch.full((3,), 10)
    cond, uncond = (net.next_scale_logits(labels, inputs) for labels in (LABELS, none))
    t = torch.repeat_interleave(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), torch.tensor(SIZES))[:, None]
    assert torch.equal(made.indices, ((1 + t) * cond - t * uncond).argmax(-1))


def test_edited_tokens_stay() -> None:
    net, image = model(), tokens(4)
    stay = torch.rand(3, 14, generator=gen(2)) < 0.6
    for schedule in (None, [[1], [1, 1, 2], [2, 3, 4]]):
        made = net.generate(LABELS, keep=(image, stay), schedule=schedule, generator=gen())
        assert torch.equal(made.indices[stay], image[stay])
    everything = net.generate(LABELS, keep=(image, torch.ones_like(stay)), schedule=[[1], [2, 2], [9]])
    assert torch.equal(everything.indices, image)


def test_generation_is_reproducible_and_leaves_global_randomness_alone() -> None:
    net = model()
    state = torch.random.get_rng_state()
    one, two = (net.generate(LABELS, schedule=[[1], [1, 3], [4, 5]], cfg=1.0, generator=gen(3)) for _ in range(2))
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_quantizer_that_was_given_is_left_alone_and_none_of_it_trains() -> None:
    quantizer = MultiScaleQuantizer(SCALES, 8, 4)
    net = HierarchicalMaskedAR(quantizer, 10, dim=16, depth=2, masked_depth=1, heads=2)
    assert all(p.requires_grad for p in quantizer.parameters())
    net.next_scale_loss(LABELS, tokens()).backward()
    assert all(p.grad is None for p in [*quantizer.parameters(), *net.quantizer.parameters()])


def test_state_round_trip() -> None:
    first, second = model(), model(dim=16)
    for p in second.parameters():
        p.data.zero_()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.generate(LABELS, top_k=1).indices, second.generate(LABELS, top_k=1).indices)


def test_draws() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    assert draw(logits, top_k=2, generator=gen()).unique().tolist() == [0, 1]
    assert draw(logits, top_p=0.8, generator=gen()).unique().tolist() == [0, 1]
    assert draw(logits, top_p=0.81, generator=gen()).unique().tolist() == [0, 1, 2]
    assert draw(logits, top_p=0.1, generator=gen()).unique().tolist() == [0]
    share = torch.bincount(draw(logits, generator=gen())) / 4000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: model().generate(LABELS, schedule=[[1], [1, 2], [9]]),
            r"schedule must be counts that sum to \[1, 4, 9\]",
        ),
        (lambda: model().generate(LABELS, schedule=[[1], [4]]), "schedule must be counts"),
        (lambda: model().generate(LABELS, schedule=[[1], [4, 0], [9]]), "schedule must be at least 1, got 0"),
        (lambda: model().generate(LABELS + 5), r"labels must be in \[0, 10\), got 12"),
        (lambda: model().generate(LABELS, num_scales=4), r"num_scales must be in \[1, 3\], got 4"),
        (lambda: model().next_scale_loss(LABELS, tokens()[:, :5]), r"indices must be of shape \(batch, 14\)"),
        (lambda: model().next_scale_loss(LABELS, tokens() + 1), r"indices must be in \[0, 8\), got 8"),
        (lambda: model(masked_depth=3), r"masked_depth must be in \[1, 2\], got 3"),
        (lambda: model(heads=3), "dim must be divisible by heads, 3, got 16"),
        (lambda: next_scale_mask((1, 2), "all"), "context must be one of"),
        (lambda: scale_loss_weights((2, 2)), "scales must be at least one side"),
        (lambda: scale_loss_weights((1, 2), "none"), "weighting must be one of"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_batch_draws_nothing() -> None:
    net, generator = model(label_drop=0.5), gen()
    before = generator.get_state()
    for loss in (net.next_scale_loss, net.masked_loss):
        with pytest.raises(ValueError, match="indices"):
            loss(LABELS, tokens() + 8, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="labels must be int64"):
        model().next_scale_loss(LABELS.float(), tokens())


def test_a_pyramid_of_one_scale_and_no_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizer must have at least two scales"):
        HierarchicalMaskedAR(MultiScaleQuantizer((2,), 4, 3), 4)
    with pytest.raises(ValueError, match="dim must be divisible by heads"):
        model(heads=3)
    with pytest.raises(ValueError, match="labels must be a vector of at least one"):
        model().generate(LABELS[:0])


def test_a_callback_sees_every_scale_and_may_replace_its_tokens() -> None:
    made, seen = model().eval(), []
    plain = made.generate(LABELS, schedule=[[1], [1, 3], [4, 5]], generator=gen())
    watched = made.generate(
        LABELS, schedule=[[1], [1, 3], [4, 5]], generator=gen(), callback=lambda *step: seen.append(step)
    )
    assert torch.equal(watched.indices, plain.indices)
    assert torch.equal(watched.features, plain.features)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [time for _, time, _ in seen] == pytest.approx([13 / 14, 9 / 14, 0.0])
    assert torch.equal(torch.cat([part for _, _, part in seen], 1), plain.indices)
    # What is put in the place of a scale is what finer ones are told, and what is decoded.
    held = tokens()
    parts = made.quantizer.split(held)
    told = made.generate(LABELS, generator=gen(), callback=lambda k, time, part: parts[k])
    assert torch.equal(told.indices, held)
    torch.testing.assert_close(told.features, made.quantizer.decode(held))
    with pytest.raises(ValueError, match="callback must return None or the shape of x"):
        made.generate(LABELS, callback=lambda k, time, part: part[:1])
    with pytest.raises(TypeError, match="the callback's tokens must"):
        made.generate(LABELS, callback=lambda k, time, part: part.double())
    with pytest.raises(ValueError, match="the callback's tokens must"):
        made.generate(LABELS, callback=lambda k, time, part: part + 8)


def test_nothing_hidden_has_no_loss() -> None:
    first_alone = torch.zeros(3, 14, dtype=torch.bool)
    first_alone[:, 0] = True
    with pytest.raises(ValueError, match="hidden must hold a token of a scale after the first"):
        model().masked_loss(LABELS, tokens(), hidden=first_alone)
    with pytest.raises(TypeError, match="hidden must be bool, got torch.int64"):
        model().masked_loss(LABELS, tokens(), hidden=first_alone.long())
    with pytest.raises(ValueError, match="hidden must be of shape"):
        model().masked_loss(LABELS, tokens(), hidden=first_alone[:, :5])


def test_what_is_to_be_kept_must_fit() -> None:
    made, stay = model(), torch.ones(3, 14, dtype=torch.bool)
    with pytest.raises(TypeError, match="tokens to keep must"):
        made.generate(LABELS, keep=(tokens().double(), stay))
    with pytest.raises(TypeError, match="keep must have a mask that is bool, got torch.int64"):
        made.generate(LABELS, keep=(tokens(), stay.long()))
    with pytest.raises(ValueError, match=r"keep must be of shape \(3, 14\), got \(3, 5\)"):
        made.generate(LABELS, keep=(tokens(), stay[:, :5]))
    with pytest.raises(ValueError, match="tokens to keep must"):
        made.generate(LABELS, keep=(tokens() + 8, stay))
