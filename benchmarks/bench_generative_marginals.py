"""A log-marginal from a network of marginals, over the same from an any-order model, an evaluation a known token."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.timing import medians
from trimtab.generative import Marginals, any_order_log_prob
from trimtab.nets import MaskedMLP, SequenceScore
from trimtab.ops.ordering import hide, random_ranks


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for the log-marginals of 500 sequences of which half is known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for length in (8,) if quick else (16, 64, 256):
                yield _marginal(length, batch=8 if quick else 500, repeats=2 if quick else 9)
    finally:
        torch.set_num_threads(threads)


def _marginal(length: int, batch: int, repeats: int) -> dict[str, object]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        marginals = Marginals(MaskedMLP(length, 2), SequenceScore(length, 2), mask_id=2).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, (batch, length), generator=generator)
    known = random_ranks(torch.zeros_like(tokens, dtype=torch.bool), generator=generator) < length // 2
    tokens = hide(tokens, known, 2)
    seconds = medians(
        {
            "ours": lambda: marginals.log_marginal(tokens),
            "theirs": lambda: any_order_log_prob(marginals.conditional, tokens, 2),
        },
        repeats,
        warmup=1,
    )
    ratio, aim = seconds["ours"] / seconds["theirs"], 0.1
    return {
        "what": f"log-marginal of half of {length} tokens",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["theirs"],
        "ratio": ratio,
        "unit": "ms",
        "aim": aim,
        "met": ratio <= aim,
        "note": f"peer: any_order_log_prob, {length // 2} evaluations",
    }
