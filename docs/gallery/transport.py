"""Match two clouds of points by optimal transport, and learn the map.

`sinkhorn_newton_sparse` finds the entropic plan between two samples to high accuracy at a small regularisation, where
Sinkhorn's iteration crawls. `MongeMap` learns a map that also moves points it has not seen.
"""

import torch

from trimtab.solvers import MongeMap, sinkhorn_divergence, sinkhorn_newton_sparse

generator = torch.Generator().manual_seed(0)
source = torch.randn(300, 2, generator=generator)
angle = 2 * torch.pi * torch.rand(300, generator=generator)
ring = torch.stack([angle.cos(), angle.sin()], 1) * 2 + 0.1 * torch.randn(300, 2, generator=generator)

cost = torch.cdist(source, ring) ** 2
share = torch.full((300,), 1 / 300)
plan = sinkhorn_newton_sparse(cost, share, share, reg=0.01 * float(cost.mean()))
matched = (plan.plan.float() @ ring) * 300
print(f"plan: {plan.n_newton} Newton steps, transport cost {float((plan.plan * cost).sum()):.3f}")

monge = MongeMap(max_iter=150, batch_size=128, lr=5e-3, random_state=0).fit(source, ring)
unseen = torch.randn(300, 2, generator=generator)
before = float(sinkhorn_divergence(unseen, ring))
after = float(sinkhorn_divergence(monge.transform(unseen), ring))
print(f"map: unseen points are {before:.3f} from the ring before and {after:.3f} after (Sinkhorn divergence)")
