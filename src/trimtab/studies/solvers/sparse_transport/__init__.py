"""Sparsity-constrained transport: is its dual solved fast for each k, is it near the least cost, does it route well?

The duals are those of pairs of MNIST digits pooled to 14 x 14 pixels, a regularisation of 20 where the largest cost is
one; the maximum they are compared with is certified by a duality gap of 0.02 %, for k = 1 it is that of a linear
programme. Where L-BFGS comes to rest on a kink before it is within 0.1 %, its iterations count as the limit of 1,000.
The mixture has 16 experts of capacity factor 1.25 and a linear path past them; its tokens are whole Fashion-MNIST
images, not patches, and it is trained for 250 steps. All routers share learning rate, steps and gates, none of them
searched; the balance loss has its authors' weight of 0.01, and the transport routers a regularisation of 1 in the unit
of the scores. Overflow is counted before tokens are dropped. Sinkhorn is given all experts for every token, without a
capacity. On the shared task the method has 20 non-zeros a column and chooses its penalty, in units of the largest cost
for each point's mass.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.ops.sinkhorn import sinkhorn
from trimtab.solvers import SparseRouter, sparse_transport
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.solvers.sparse_transport.routing import METRICS, ExpertRouting
from trimtab.studies.tasks.transport import (
    Problem,
    TransportSolver,
    clouds,
    digits_w1,
    digits_w2,
    draw,
    least_cost,
    timed,
    uniform,
)

REG = 20.0
WITHIN = 1e-3


def semidual(k: int | None, trial: Trial) -> Result:
    """L-BFGS on the semi-dual, as in the paper, from zero potentials: iterations until it is near the maximum."""
    cost, a, b = draw(trial, "images", n=0, pool=2)
    limit, most = trial.pick(smoke=60, laptop=1000, paper=5000), k or len(a)
    found, seconds = timed(lambda: sparse_transport(cost, a, b, REG, most, tol=1e-5, max_iter=limit, max_proximal=0))
    trial.report(0.3)
    values = torch.tensor(found.values)
    if most == 1:  # every column has one entry, its mass, whatever the plan
        best = least_cost(cost, a, b) + REG / 2 * float(b.square().sum())
    else:
        best, _ = timed(lambda: sparse_transport(cost, a, b, REG, most, tol=2e-4).value)
    best = max(best, float(values.max()))
    short = (best - values.cummax(0).values) / abs(best)
    within = (short <= WITHIN).nonzero()
    plan = torch.as_tensor(found.plan)
    shown = sorted({round(len(short) ** (step / 30)) - 1 for step in range(31)})
    return Result(
        {
            "iterations": float(within[0]) if len(within) else float(limit),
            "short": float(short[-1]),
            "row_error": float((plan.sum(1) - a).abs().sum()),
            "entries": float((plan > 0).sum(0).max()),
            "seconds": seconds,
        },
        {"shortfall of the dual": Curve(shown, [max(float(short[step]), 1e-9) for step in shown], "iteration")},
    )


def top_1(scores: Tensor, capacity: int) -> Tensor:
    """Every token to the expert with its highest score."""
    return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)


def expert_choice(scores: Tensor, capacity: int) -> Tensor:
    """Every expert takes the tokens with its highest gates (Zhou et al., NeurIPS 2022)."""
    return torch.zeros_like(scores).scatter_(0, scores.softmax(1).topk(capacity, dim=0).indices, 1.0)


def entropic(scores: Tensor, capacity: int) -> Tensor:
    """The plan of Sinkhorn's algorithm: every token to every expert, in parts."""
    tokens, experts = scores.shape
    a, b = scores.new_full((tokens,), 1 / tokens), scores.new_full((experts,), 1 / experts)
    plan = sinkhorn(-scores, a, b, 1.0, tol=1e-3).plan
    return tokens * torch.as_tensor(plan).clamp_min(torch.finfo(scores.dtype).tiny)


def s_base(scores: Tensor, capacity: int) -> Tensor:
    """Every token to the expert that has most of it in Sinkhorn's plan (Clark et al., ICML 2022)."""
    return top_1(entropic(scores.detach(), capacity), capacity)


def sparse(scores: Tensor, capacity: int) -> Tensor:
    """At most the capacity of tokens to every expert."""
    weights: Tensor = SparseRouter(reg=1.0, k=capacity)(scores)
    return weights


def sparsest(problem: Problem) -> Tensor:
    """At most 20 non-zeros in a column, with the penalty and tolerance that were chosen."""
    reg, tol = problem.setting["reg"] * len(problem.b), problem.setting["tol"]
    return torch.as_tensor(sparse_transport(problem.cost, problem.a, problem.b, reg, 20, tol=tol, max_proximal=10).plan)


digits = Experiment(
    "the semi-dual between two digits",
    {f"k = {k or 'all'}": partial(semidual, k) for k in (1, 5, 20, None)},
    {
        "iterations": Metric("iterations until the dual is within 0.1 % of its maximum", best="min"),
        "short": Metric("final shortfall of the dual, as a share", best="min"),
        "row_error": Metric("L1 error of the plan's rows", best="min"),
        "entries": Metric("most non-zeros in a column", best=None),
        "seconds": Metric("time (s)", best="min"),
    },
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    reads=("mnist",),
    log="xy",
    cost=1.3,
)
routing = ExpertRouting()
experts = Experiment(
    "routing to 16 experts",
    {
        "sparse transport": partial(routing.train, sparse),
        "top-1": partial(routing.train, top_1),
        "top-1 with balance loss": partial(routing.train, top_1, balance=0.01),
        "S-BASE": partial(routing.train, s_base),
        "expert choice": partial(routing.train, expert_choice),
        "Sinkhorn": partial(routing.train, entropic),
    },
    METRICS,
    reads=("fashion_mnist",),
    cost=3.2,
)

study = Study(
    paper="sparse_transport",
    entrants={
        "sparse transport": TransportSolver(
            plan=sparsest, search={"reg": (3e-2, 1e-2, 3e-3, 1e-3, 3e-4), "tol": (1e-3, 1e-5)}
        )
    },
    on=[uniform, clouds, digits_w1, digits_w2],
    experiments=[digits, experts],
    headline=Claim("k = 20", below="k = 5", on="iterations", at=digits),
    claims=[
        Claim("k = 5", below="k = 1", on="iterations", at=digits),
        Claim("k = all", below="k = 20", on="iterations", at=digits),
        Claim("sparse transport", beats="S-BASE", on="accuracy", at=experts),
        Claim("sparse transport", beats="expert choice", on="accuracy", by=-0.005, at=experts),
        Claim("sparse transport", below="top-1 with balance loss", on="overflow", by=0.02, at=experts),
        Claim("sparse transport", below="Sinkhorn", on="seconds", at=experts),
        Claim("sparse transport", below="Sinkhorn", on="seconds", at=clouds),
    ],
)
