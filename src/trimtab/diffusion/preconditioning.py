r"""Preconditioning: what turns a raw network into a denoiser whose inputs, targets and outputs have unit size.

$$
D(x, \sigma) = c_{skip}(\sigma)\, x + c_{out}(\sigma)\, F\bigl(c_{in}(\sigma)\, x,\ c_{noise}(\sigma)\bigr),
\qquad c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad c_{noise} = \frac{\log\sigma}{4}.
$$

A denoiser (EDM), and a consistency function, which gives back $x$ at the least noise, differ in two of them:

$$
c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad c_{out} = \frac{\sigma\,\sigma_d}{\sqrt{\sigma^2+\sigma_d^2}}
\qquad\text{and}\qquad
c_{skip} = \frac{\sigma_d^2}{(\sigma-\sigma_{min})^2 + \sigma_d^2}, \quad
c_{out} = \frac{(\sigma-\sigma_{min})\,\sigma_d}{\sqrt{\sigma^2+\sigma_d^2}}.
$$

Here time is the noise level $\sigma$, as on the `EDM` schedule.

References:
    Tero Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv
    2206.00364 (Table 1).
    Yang Song et al., "Consistency Models", ICML 2023, arXiv 2303.01469 (Appendix C).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.prediction import Prediction
from trimtab.diffusion.schedules import EDM, per_sample
from trimtab.ops.arguments import positive, real_problem


class EDMPreconditioned(nn.Module):
    """A network as a denoiser on the EDM schedule, called `(x, t, cond=None, extra=None)`.

    Args:
        net: called `net(c_in x, c_noise, *further)` with whatever else the denoiser is called with.
        sigma_data: standard deviation of the data.
        schedule: the range of noise levels.

    Raises:
        TypeError: `net` is no module or `schedule` is not `EDM`.
        ValueError: `sigma_data` is not positive.

    Example:
        >>> import torch
        >>> from trimtab.diffusion import deis, grids
        >>> from trimtab.nets import DenoisingMLP
        >>> denoiser = EDMPreconditioned(DenoisingMLP(2, hidden=16))
        >>> deis(denoiser, denoiser.schedule.prior(4, 2), grids.karras(denoiser.schedule, 10)).shape
        torch.Size([4, 2])
    """

    prediction: Prediction = "x0"

    def __init__(self, net: nn.Module, sigma_data: float = 0.5, schedule: EDM | None = None) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        schedule = EDM() if schedule is None else schedule
        if not isinstance(schedule, EDM):
            raise TypeError(f"schedule must be EDM, on which time is the noise level, got {type(schedule).__name__}")
        self.net, self.schedule = net, schedule
        self.sigma_data = positive("sigma_data", sigma_data)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out at noise levels."""
        if problem := real_problem(sigma=sigma):
            raise TypeError(problem)
        square = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / square, sigma * self.sigma_data / square.sqrt()

    def weight(self, sigma: Tensor) -> Tensor:
        """EDM's weight of the squared error, 1 / c_out^2: the network's own error then weighs one everywhere."""
        return self.scalings(sigma)[1] ** -2

    def forward(
        self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], /, *further: Any, **named: Any
    ) -> Float[Tensor, "batch ..."]:
        """The clean prediction for `x` at the noise levels `t`.

        Args:
            x: noisy samples.
            t: their noise levels.
            *further: what the network takes beside them, such as a class.
            **named: likewise, by name.
        """
        skip, out = self.scalings(t)
        size = (t**2 + self.sigma_data**2).rsqrt()
        raw = self.net(per_sample(size, x) * x, t.log() / 4, *further, **named)
        return per_sample(skip, x) * x + per_sample(out, x) * raw  # type: ignore[no-any-return]


class ConsistencyPreconditioned(EDMPreconditioned):
    """A network as a consistency function: at the schedule's least noise, `t_min`, it gives back what came in.

    Arguments and errors are those of `EDMPreconditioned`.

    Example:
        >>> import torch
        >>> from trimtab.nets import DenoisingMLP
        >>> function = ConsistencyPreconditioned(DenoisingMLP(2, hidden=16))
        >>> x = torch.randn(4, 2)
        >>> torch.equal(function(x, torch.full((4,), function.schedule.t_min)), x)
        True
    """

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if problem := real_problem(sigma=sigma):
            raise TypeError(problem)
        above = sigma - self.schedule.t_min
        skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return skip, self.sigma_data * above / (sigma**2 + self.sigma_data**2).sqrt()
