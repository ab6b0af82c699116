"""GigaTok: the regulariser, the queries' averages, where gradients go, and the probe."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.generative import AutoregressiveProbe, Tokenizer1D, level_averages, semantic_regularization


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=gen(seed))


def tokenizer(**options) -> Tokenizer1D:
    settings = {"side": 4, "width": 16, "num_tokens": 8, "num_codes": 32, "target_dim": 5, "heads": 2, "code_dim": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = nn.Conv2d(1, 16, 2, stride=2), nn.ConvTranspose2d(16, 1, 2, stride=2)
        return Tokenizer1D(encoder, decoder, **(settings | options)).double()


IMAGES, TARGET = drawn(3, 1, 8, 8), drawn(3, 16, 5, seed=1)


def test_the_regulariser_is_a_cosine() -> None:
    features, target = drawn(2, 4, 6).requires_grad_(), drawn(2, 4, 6, seed=1).requires_grad_()
    assert semantic_regularization(3 * target, target).item() == pytest.approx(-1.0)
    assert semantic_regularization(-target, target).item() == pytest.approx(1.0)
    value = semantic_regularization(features, target)
    torch.testing.assert_close(semantic_regularization(features * 1e4, target * 1e-4), value)
    expected = -(F.normalize(features, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert target.grad is None
    # A step along the gradient turns the features, and lowers the loss.
    torch.testing.assert_close((features.grad * features).sum(-1).abs().max(), torch.zeros((), dtype=torch.float64))
    assert semantic_regularization(features - 0.1 * features.grad, target) < value


def test_averages_go_from_the_whole_to_its_parts() -> None:
    grid = drawn(2, 3, 4, 4)
    found = level_averages(grid, 16)
    assert found.shape == (2, 16, 3)
    whole = grid.mean((2, 3))
    torch.testing.assert_close(found[:, 0], whole)
    torch.testing.assert_close(found[:, 1], whole)
    # First the columns are halved, then the rows, then the columns again.
    torch.testing.assert_close(found[:, 2], grid[:, :, :, :2].mean((2, 3)))
    torch.testing.assert_close(found[:, 5], grid[:, :, :2, 2:].mean((2, 3)))
    torch.testing.assert_close(found[:, 8], grid[:, :, :2, 0].mean(2))
    for first, last in ((1, 2), (2, 4), (4, 8), (8, 16)):  # every level holds the whole once
        torch.testing.assert_close(found[:, first:last].mean(1), whole)


def test_the_loss_is_its_parts() -> None:
    model = tokenizer()
    found = model(IMAGES)
    plain = F.mse_loss(found.images, IMAGES) + found.code.loss
    torch.testing.assert_close(
        model.loss(IMAGES, TARGET), plain + 0.5 * semantic_regularization(found.features, TARGET)
    )
    model.semantic_weight = 0.0
    torch.testing.assert_close(model.loss(IMAGES), plain)
    torch.testing.assert_close(model.loss(IMAGES, TARGET), plain)


def test_alignment_is_behind_the_quantizer() -> None:
    """Features are made of tokens alone: images with the same tokens have the same, and later layers have no say."""
    model = tokenizer(align_depth=1)
    found = model(IMAGES)
    rebuilt, features = model._images(model.quantizer.lookup(found.code.indices))
    torch.testing.assert_close(found.features, model.project(features))
    torch.testing.assert_close(found.images, rebuilt)
    torch.testing.assert_close(model.decode(model.encode(IMAGES)), found.images)
    value = semantic_regularization(found.features, TARGET)
    value.backward()
    assert all(p.grad is None for layer in model.write[1:] for p in layer.parameters())
    assert all(p.grad is None for p in model.decoder.parameters())
    assert all(bool(p.grad.any()) for p in model.write[0].linear1.parameters())
    assert bool(model.encoder.weight.grad.any())  # through the tokens


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_are_those_of_the_layer_that_is_named(depth: int) -> None:
    made = tokenizer(decoder_depth=3, align_depth=depth)
    seen: list[Tensor] = []
    for layer in made.write:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    found = made(IMAGES)
    torch.testing.assert_close(found.features, made.project(seen[depth - 1]))


def test_training_lowers_the_loss_and_aligns() -> None:
    model = tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = semantic_regularization(model(IMAGES).features, TARGET).item()
    start = model.loss(IMAGES, TARGET).item()
    for _ in range(40):
        loss = model.loss(IMAGES, TARGET)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < start - 0.3
    assert semantic_regularization(model(IMAGES).features, TARGET).item() < first - 0.3


def test_state_round_trip() -> None:
    first, second = tokenizer(), tokenizer()
    for p in second.parameters():
        p.data.mul_(0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.encode(IMAGES), second.encode(IMAGES))


def probe(**options) -> AutoregressiveProbe:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoregressiveProbe(12, 5, 10, **({"dim": 16, "heads": 2} | options)).double()


CODES, LABELS = torch.randint(12, (4, 5), generator=gen()), torch.tensor([1, 9, 0, 3])


def test_the_probe_looks_only_back() -> None:
    model = probe()
    scores = model(CODES, LABELS)
    assert scores.shape == (4, 5, 12)
    for place in range(5):
        changed = CODES.clone()
        changed[:, place] = (changed[:, place] + 1) % 12
        other = model(changed, LABELS)
        torch.testing.assert_close(other[:, : place + 1], scores[:, : place + 1])
        if place < 4:
            assert not torch.isclose(other[:, place + 1 :], scores[:, place + 1 :]).all()
    torch.testing.assert_close(model(CODES[:, :2], LABELS), scores[:, :3])


def test_the_probe_s_loss() -> None:
    model = probe(label_drop=0.5).eval()
    expected = -model(CODES, LABELS).log_softmax(-1).gather(-1, CODES[..., None]).mean()
    torch.testing.assert_close(model.loss(CODES, LABELS), expected)
    model.head[1].weight.data.zero_()
    model.head[1].bias.data.zero_()
    assert model.loss(CODES, LABELS).item() == pytest.approx(math.log(12))
    # In training, labels that are dropped are those of no class.
    model = probe(label_drop=0.999).train()
    none = torch.full((4,), 10)
    expected = F.cross_entropy(model(CODES, none).transpose(1, 2), CODES)
    torch.testing.assert_close(model.loss(CODES, LABELS, generator=gen()), expected)


def test_greedy_samples_are_the_most_probable_tokens() -> None:
    model = probe()
    codes = model.sample(LABELS, top_k=1)
    assert torch.equal(codes, model(codes, LABELS).argmax(-1))
    guided = model.sample(LABELS, cfg=1.5, top_k=1)
    logits = 2.5 * model(guided, LABELS) - 1.5 * model(guided, torch.full((4,), 10))
    assert torch.equal(guided, logits.argmax(-1))


def test_samples_follow_the_model_and_the_generator() -> None:
    model = probe()
    many = model.sample(torch.full((4000,), 3), generator=gen(1))
    assert torch.equal(many, model.sample(torch.full((4000,), 3), generator=gen(1)))
    probs = model(many[:1, :0], torch.tensor([3])).softmax(-1)[0, 0]
    torch.testing.assert_close(torch.bincount(many[:, 0], minlength=12) / 4000, probs.float(), atol=0.03, rtol=0)


def test_features_are_those_of_half_the_blocks() -> None:
    made = AutoregressiveProbe(6, 5, 3, dim=8, depth=4, heads=2)
    codes = torch.randint(6, (2, 5), generator=gen())
    before = made.features(codes)
    made.blocks[2].mlp[0].weight.data.normal_(generator=gen())
    torch.testing.assert_close(made.features(codes), before, rtol=0, atol=0)
    made.blocks[1].mlp[0].weight.data.normal_(generator=gen())
    assert not torch.allclose(made.features(codes), before)


def test_features_see_all_tokens_and_no_class() -> None:
    model = probe()
    base = model.features(CODES)
    assert base.shape == (4, 16)
    for place in range(5):
        changed = CODES.clone()
        changed[:, place] = (changed[:, place] + 1) % 12
        assert not torch.isclose(model.features(changed), base).all(1).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: semantic_regularization(drawn(1, 2, 3), drawn(1, 3, 3)), "features must be of shape"),
        (lambda: level_averages(drawn(1, 1, 4, 4), 12), "num_tokens must be a power of two, got 12"),
        (lambda: level_averages(drawn(1, 1, 4, 4), 64), "num_tokens must be at most twice the parts of a 4 x 4 grid"),
        (lambda: tokenizer(align_depth=5), r"align_depth must be in \[1, 4\], got 5"),
        (lambda: tokenizer(semantic_weight=-1.0), "semantic_weight must be at least 0"),
        (lambda: tokenizer().loss(IMAGES), "target must be features of a frozen encoder"),
        (lambda: tokenizer()(drawn(1, 1, 6, 6)), "encoder must give a grid of shape"),
        (lambda: probe().loss(CODES[:, :3], LABELS), r"codes must be of shape \(batch, 5\)"),
        (lambda: probe().loss(CODES + 12, LABELS), r"codes must be in \[0, 12\), got 2"),
        (lambda: probe().loss(CODES, LABELS + 1), r"labels must be in \[0, 10\), got 10"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="codes must be int64"):
        probe().loss(CODES.float(), LABELS)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="width must be divisible by heads, 3"):
        tokenizer(heads=3)
    model = tokenizer()
    count = model.num_tokens
    with pytest.raises(ValueError, match=r"indices must be of shape \(batch, "):
        model.decode(torch.zeros(1, 2, count, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be in \[0, "):
        model.decode(torch.full((2, count), 10**6))
    probe = AutoregressiveProbe(8, 3, 4, dim=8)
    for labels in (torch.tensor([5]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 4\]"):
            probe.sample(labels)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 8\)"):
        probe.features(torch.full((2, 3), 8))
    for options in ({"top_k": -1}, {"top_p": math.nan}, {"top_p": 1.5}, {"cfg": math.nan}, {"cfg": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            probe.sample(torch.tensor([0]), **options)
    with pytest.raises(TypeError, match="top_k must be an integer"):
        probe.sample(torch.tensor([0]), top_k=2.5)  # type: ignore[arg-type]


def test_a_callback_sees_every_token_and_may_replace_what_was_drawn() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = AutoregressiveProbe(num_codes=6, length=4, num_classes=3, dim=8, heads=2)
    labels, seen = torch.tensor([0, 2]), []
    plain = probe.sample(labels, generator=gen())
    assert torch.equal(probe.sample(labels, generator=gen(), callback=lambda *step: seen.append(step)), plain)
    assert [(step, time) for step, time, _ in seen] == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    for step, _, codes in seen:
        assert torch.equal(codes, plain[:, : step + 1])
    held = probe.sample(labels, generator=gen(), callback=lambda step, time, codes: torch.full_like(codes, 5))
    assert held.tolist() == [[5] * 4] * 2
    with pytest.raises(ValueError, match="the callback's codes must"):
        probe.sample(labels, callback=lambda step, time, codes: codes + 6)
    with pytest.raises(TypeError, match="the callback's tokens must"):
        probe.sample(labels, callback=lambda step, time, codes: codes.float())
