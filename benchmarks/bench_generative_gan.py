"""AugSelf's step over DiffAugment's and over its network calls, and augmentations over one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.timing import medians
from trimtab.generative import GAN, AugSelfGAN, AugSelfHead, DiffAugment
from trimtab.nets import ImageDiscriminator, ImageGenerator

POLICY = DiffAugment(("light", "translation", "cutout"))
SIDE = 16


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step of both networks on a batch of 16 x 16 images, and of augmenting a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _steps(size=4 if quick else 32, repeats=2 if quick else 15)
        yield _augment(size=4 if quick else 128, repeats=2 if quick else 20)
    finally:
        torch.set_num_threads(threads)


def _steps(size: int, repeats: int) -> Iterator[dict[str, object]]:
    x, labels = torch.rand(size, 1, SIDE, SIDE) * 2 - 1, torch.arange(size) % 10
    rules = {name: _rule(name) for name in ("AugSelfGAN", "GAN")}

    def step(rule: GAN) -> Callable[[], object]:
        return lambda: rule.step(x, labels)

    def bare() -> None:
        """The same passes: images made twice, four seen for the discriminator, two for the generator."""
        rule = rules["AugSelfGAN"]
        with torch.no_grad():
            rule.make(size, labels)
        rule.discriminator.score(
            rule.discriminator.features(torch.cat([x, x, x, x])), labels.repeat(4)
        ).sum().backward()
        made = rule.make(size, labels)
        rule.discriminator.score(
            rule.discriminator.features(torch.cat([made, made])), labels.repeat(2)
        ).sum().backward()

    seconds = medians({**{name: step(rule) for name, rule in rules.items()}, "bare": bare}, repeats, warmup=1)
    for peer, aim, note in (("GAN", 2.2, "peer: DiffAugment's step"), ("bare", 1.5, "peer: its passes alone")):
        ratio = seconds["AugSelfGAN"] / seconds[peer]
        yield {
            "what": "AugSelfGAN, a step",
            "ours": 1e3 * seconds["AugSelfGAN"],
            "peer": 1e3 * seconds[peer],
            "ratio": ratio,
            "unit": "ms",
            "aim": aim,
            "met": ratio <= aim,
            "note": note,
        }


def _rule(name: str) -> GAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maker, critic = ImageGenerator(SIDE), ImageDiscriminator()
        head = AugSelfHead(critic.num_features, POLICY.counts)
    groups = maker.parameters(), [*critic.parameters(), *(head.parameters() if name == "AugSelfGAN" else [])]
    optimizers = [torch.optim.Adam(group, lr=1e-3) for group in groups]
    if name == "AugSelfGAN":
        return AugSelfGAN(maker, critic, head, optimizers, 32, augment=POLICY)
    return GAN(maker, critic, optimizers, 32, augment=POLICY)


def _augment(size: int, repeats: int) -> dict[str, object]:
    x = torch.rand(size, 1, 32, 32)
    seconds = medians(
        {"ours": lambda: POLICY(x), "one by one": lambda: [POLICY(image) for image in x.split(1)]}, repeats, warmup=1
    )
    ratio = seconds["ours"] / seconds["one by one"]
    return {
        "what": f"DiffAugment, {size} images",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["one by one"],
        "ratio": ratio,
        "unit": "ms",
        "aim": 0.2,
        "met": ratio <= 0.2,
        "note": "peer: one image at a time",
    }
