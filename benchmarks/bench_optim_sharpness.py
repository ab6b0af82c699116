"""What sharpness-aware steps cost beside their base optimizer's, and exact stability beside sampled sharpness."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab import optim
from trimtab.nets import small_cnn

Call = Callable[[], object]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The base optimizer of every contestant."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def network() -> nn.Module:
    """The same small CNN for every contestant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small_cnn()


def base_step(x: Tensor, y: Tensor) -> Call:
    """One step of SGD."""
    model = network()
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def two_pass_step(make: Callable[[nn.Module], torch.optim.Optimizer], x: Tensor, y: Tensor) -> Call:
    """One step of a member whose closure returns the loss."""
    model = network()
    optimizer = make(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def peer_step(x: Tensor, y: Tensor) -> Call:
    """One step of pytorch_optimizer's SAM, with the statistics of batch normalisation as it leaves them."""
    model = network()
    optimizer = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=1e-3, momentum=0.9)

    def passed() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        passed()
        optimizer.first_step(zero_grad=True)
        passed()
        optimizer.second_step(zero_grad=True)

    return step


def tram_step(kind: str, x: Tensor, y: Tensor) -> Call:
    """One step of TRAM from an anchor, or from a divergence that costs nothing."""
    model = network()
    base = sgd(model)
    optimizer = optim.TRAM(base, model)
    anchor = (
        optim.ParameterAnchor(model, 0.9, optimizer=base) if kind == "theta" else optim.InputNoiseAnchor(model, 0.1)
    )

    def closure() -> tuple[Tensor, object]:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        if kind == "given":
            return loss, 0.05
        return loss, lambda: optim.trust_region_divergence(anchor(x), logits)

    return lambda: optimizer.step(closure)


def with_forward_pass(step: Call, x: Tensor) -> Call:
    """A step, and what an anchor cannot do without: a forward pass of a network of the same kind, without gradient."""
    model = network()

    def run() -> None:
        step()
        with torch.no_grad():
            model(x)

    return run


def saf_epoch(x: Tensor, y: Tensor, batch_size: int) -> Call:
    """One epoch of SAF with the term at work."""
    model = network()
    optimizer = sgd(model)
    criterion = optim.TrajectoryLoss(len(y), 10, start_epoch=1, lag=1)
    epoch = 0

    def run() -> None:
        nonlocal epoch
        criterion.set_epoch(epoch)
        epoch += 1
        for index in torch.arange(len(y)).split(batch_size):
            optimizer.zero_grad()
            criterion(model(x[index]), y[index], index).backward()
            optimizer.step()

    return run


def epoch_of(step: Callable[[Tensor, Tensor], Call], x: Tensor, y: Tensor, batch_size: int) -> Call:
    """One epoch of steps that are each made for a batch; only the first batch's network is trained."""
    call = step(x[:batch_size], y[:batch_size])

    def run() -> None:
        for _ in range(len(y) // batch_size):
            call()

    return run


def hutchinson(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> float:
    """The trace as one writes it down: a backward pass through the gradient for every random sign vector."""
    params = list(model.parameters())
    total = 0.0
    for _ in range(probes):
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        signs = [torch.randn_like(p).sign() for p in params]
        inner = torch.stack([(g * z).sum() for g, z in zip(gradient, signs, strict=True)]).sum()
        product = torch.autograd.grad(inner, params, materialize_grads=True)
        total += float(torch.stack([(h * z).sum() for h, z in zip(product, signs, strict=True)]).sum())
    return total / probes


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _steps(16 if quick else 128, 3 if quick else 40)
        yield from _epochs(16 if quick else 128, 2 if quick else 15)
        yield from _stability(8 if quick else 100, 4 if quick else 100, 1 if quick else 7)
    finally:
        torch.set_num_threads(threads)


def _batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 28, 28, generator=generator), torch.randint(10, (size,), generator=generator)


def _steps(batch_size: int, repeats: int) -> Iterator[dict[str, object]]:
    x, y = _batch(batch_size)
    calls: dict[str, Call] = {
        "SGD": base_step(x, y),
        "SAM": two_pass_step(lambda model: optim.SAM(sgd(model), model=model), x, y),
        "SAM and a forward pass": with_forward_pass(
            two_pass_step(lambda model: optim.SAM(sgd(model), model=model), x, y), x
        ),
        "pytorch_optimizer SAM": peer_step(x, y),
        "TRAM, divergence given": tram_step("given", x, y),
        "TRAM-theta": tram_step("theta", x, y),
        "TRAM-x": tram_step("x", x, y),
    }
    times = medians(calls, repeats)
    yield compared(
        "SAM, small CNN: step", times, 1.1, "against pytorch_optimizer SAM", ours="SAM", peer="pytorch_optimizer SAM"
    )
    yield compared("SAM, small CNN: step", times, None, "against SGD; two passes", ours="SAM", peer="SGD")
    yield compared("TRAM, divergence given: step", times, 1.1, "against SAM", ours="TRAM, divergence given", peer="SAM")
    for name in ("TRAM-theta", "TRAM-x"):
        limit = "SAM and a forward pass"
        yield compared(f"{name}: step", times, 1.1, f"against {limit}, its anchor's", ours=name, peer=limit)
        yield compared(f"{name}: step", times, None, "against SAM", ours=name, peer="SAM")
        yield compared(f"{name}: step", times, 2.4, "against SGD", ours=name, peer="SGD")


def _epochs(batch_size: int, repeats: int) -> Iterator[dict[str, object]]:
    x, y = _batch(8 * batch_size)

    def sam(x: Tensor, y: Tensor) -> Call:
        return two_pass_step(lambda model: optim.SAM(sgd(model), model=model), x, y)

    calls = {
        "SAF": saf_epoch(x, y, batch_size),
        "SGD": epoch_of(base_step, x, y, batch_size),
        "SAM": epoch_of(sam, x, y, batch_size),
    }
    times = medians(calls, repeats)
    yield compared(
        "SAF: epoch",
        times,
        1.1,
        f"against SGD; SAM's takes {times['SAM'] / times['SGD']:.2f} times SGD's",
        ours="SAF",
        peer="SGD",
    )


def _stability(samples: int, probes: int, repeats: int) -> Iterator[dict[str, object]]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 1))
    x, _ = _batch(samples)
    y = model(x).detach()
    found: dict[str, float] = {}

    def report() -> None:
        found["ours"] = optim.stability_report(model, x, y, lr=0.01).trace

    def loop() -> None:
        found["loop"] = hutchinson(model, x, y, probes)

    times = medians({"stability_report": report, "Hutchinson loop": loop}, repeats, warmup=1)
    off = abs(found["loop"] / found["ours"] - 1)
    note = f" of {probes} probes, whose trace is off by {off:.1%}; the report is exact, with eigenvalue and radius"
    yield compared(
        f"stability of an MLP on {samples} samples",
        times,
        1.0,
        f"against Hutchinson loop{note}",
        ours="stability_report",
        peer="Hutchinson loop",
    )
