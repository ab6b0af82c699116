"""Which states fit: names and shapes decide, at any depth."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.ops.states import fits


def test_names_and_shapes_decide() -> None:
    own: dict[str, Any] = {"net": {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, "step": 4, "generator": None}
    assert fits(
        {"net": {"bias": torch.ones(3), "weight": torch.ones(2, 3)}, "step": 9, "generator": torch.ones(1)}, own
    )
    for net in ({"weight": torch.zeros(2, 3)}, {**own["net"], "more": torch.zeros(1)}, None, torch.zeros(2, 3),
                {**own["net"], "bias": torch.zeros(2)}, {**own["net"], "bias": None}):  # fmt: skip
        assert not fits({**own, "net": net}, own)
    assert not fits({name: own[name] for name in ("net", "step")}, own)
    assert not fits([], own)
