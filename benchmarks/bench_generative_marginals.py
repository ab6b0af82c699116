"""A log-marginal from a network of marginals, over the same from an any-order model, an evaluation a known token."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.timing import compared, medians
from trimtab.generative import Marginals, any_order_log_prob
from trimtab.nets import MaskedMLP, SequenceScore
from trimtab.ops.ordering import hide, random_ranks


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for the log-marginals of 500 sequences that are known in part or whole.

    Eight known tokens are eight evaluations of the peer, so that nobody is ten times as fast there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for known, length in ((4, 8),) if quick else ((8, 16), (16, 16), (32, 64), (128, 256)):
                yield _marginal(known, length, batch=8 if quick else 500, repeats=2 if quick else 9)
    finally:
        torch.set_num_threads(threads)


def _marginal(known: int, length: int, batch: int, repeats: int) -> dict[str, object]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        marginals = Marginals(MaskedMLP(length, 2), SequenceScore(length, 2), mask_id=2).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, (batch, length), generator=generator)
    tokens = hide(tokens, random_ranks(torch.zeros_like(tokens, dtype=torch.bool), generator=generator) < known, 2)
    seconds = medians(
        {
            "ours": lambda: marginals.log_marginal(tokens),
            "peer": lambda: any_order_log_prob(marginals.conditional, tokens, 2),
        },
        repeats,
        warmup=1,
    )
    note = f"peer: any_order_log_prob, {known} evaluations"
    return compared(f"log-marginal of {known} of {length} tokens", seconds, 0.1 if known > 10 else None, note)
