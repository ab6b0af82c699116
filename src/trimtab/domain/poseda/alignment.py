"""Where poses stand before a camera, and how far two are apart."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import assured, floating_tensor, looked_at, real_problem


def project(x: Float[Tensor, "batch joints 3"], camera: Float[Tensor, "... 4"]) -> Float[Tensor, "batch joints 2"]:
    """Where points in the camera's frame are seen: focal length times x / z, plus the centre.

    Args:
        x: points with the camera looking along the third axis.
        camera: `(cx, cy, fx, fy)`, one for all or one for each pose, in the unit of the 2-D poses.

    Raises:
        ValueError: points or cameras have another number of entries, or a point is at depth 0.

    Example:
        >>> project(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([0.5, 0.0, 2.0, 2.0]))
        tensor([[[1., 1.]]])
    """
    if problem := real_problem(x=x, camera=camera):
        raise TypeError(problem)
    if x.shape[-1:] != (3,) or camera.shape[-1:] != (4,):
        raise ValueError(
            f"x and camera must be (..., 3) and (..., 4), got shapes {tuple(x.shape)} and {tuple(camera.shape)}"
        )
    if looked_at(x) and not (x[..., 2] != 0).all():
        raise ValueError("x must be at depths other than 0, got a point in the plane of the camera")
    centre, focal = camera[..., None, :2], camera[..., None, 2:]
    return focal * x[..., :2] / x[..., 2:] + centre


def global_position_alignment(
    source: Float[Tensor, "n joints 3"],
    target: Float[Tensor, "m joints 2"],
    camera: Float[Tensor, "... 4"],
    *,
    pairing: Int[Tensor, " n"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n joints 3"]:
    """Source poses moved to where they project like target poses: the same root, and about the same size.

    Args:
        source: 3-D poses, in any frame whose axes are the camera's; only their shape counts.
        target: 2-D poses of the target domain.
        camera: `(cx, cy, fx, fy)` of the target domain, in the unit of `target`; one, or one for each source pose.
        pairing: which target each source pose follows; drawn at random where it is None.
        generator: of that draw.

    Returns:
        Poses in the target camera's frame; gradients flow to `source`.

    Raises:
        TypeError: poses are not floating point, `camera` is no real tensor or `pairing` not int64.
        ValueError: joints do not match, a batch is empty, `camera` has another shape or a focal length that is not
            positive, `pairing` is not one target for each source pose, or all joints of a pose are in one place.

    Example:
        >>> source = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])
        >>> target = torch.tensor([[[0.2, 0.0], [0.7, 0.5]]])
        >>> camera = torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> project(global_position_alignment(source, target, camera), camera)
        tensor([[[0.2000, 0.0000],
                 [0.7000, 0.5000]]])
    """
    floating_tensor("source", source)
    floating_tensor("target", target)
    if source.ndim != 3 or target.ndim != 3 or source.shape[1:] != (target.shape[1], 3) or target.shape[2] != 2:
        raise ValueError(
            "source and target must have shapes (n, joints, 3) and (m, joints, 2), "
            f"got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    if len(source) == 0 or len(target) == 0:
        raise ValueError(f"source and target must not be empty, got {len(source)} and {len(target)} poses")
    if not isinstance(camera, Tensor):
        raise TypeError(f"camera must be a tensor, got {type(camera).__name__}")
    if camera.is_complex():
        raise TypeError(f"camera must be real, got {camera.dtype}")
    if camera.shape not in ((4,), (1, 4), (len(source), 4)):
        raise ValueError(f"camera must be of shape (4,) or ({len(source)}, 4), got {tuple(camera.shape)}")
    if pairing is not None and (not isinstance(pairing, Tensor) or pairing.dtype != torch.int64):
        raise TypeError(f"pairing must be int64, got {getattr(pairing, 'dtype', type(pairing).__name__)}")
    if pairing is not None and pairing.shape != source.shape[:1]:
        raise ValueError(f"pairing must be of shape ({len(source)},), got {tuple(pairing.shape)}")
    if pairing is not None and looked_at(pairing) and not ((pairing >= 0) & (pairing < len(target))).all():
        raise ValueError(f"pairing must be in [0, {len(target)}), got others")
    centre, focal = camera[..., :2], camera[..., 2:]
    assured(focal > 0, "camera must have positive focal lengths (cx, cy, fx, fy), got others")
    if pairing is None:
        device = source.device if generator is None else generator.device
        pairing = torch.randint(len(target), (len(source),), generator=generator, device=device)
    paired = target[pairing.to(target.device)]
    size = (paired.amax(1) - paired.amin(1)).mean(1)
    assured(size > 0, "target must be poses of some size, got all joints in one place")
    extent = (source.amax(1) - source.amin(1))[:, :2]
    if looked_at(extent) and not (extent.sum(1) > 0).all():
        raise ValueError("source must be poses of some size across, got all joints in one place")
    depth = (focal * extent).mean(1) / size
    ray = (paired[:, 0] - centre) / focal
    position = depth[:, None] * torch.cat([ray, torch.ones_like(ray[:, :1])], 1)
    return source - source[:, :1] + position[:, None]


@torch.no_grad()
def mpjpe(found: Float[Tensor, "batch joints 3"], truth: Float[Tensor, "batch joints 3"]) -> Float[Tensor, ""]:
    """Mean distance of joints after both roots are put in one place, in the unit of the poses.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: both are not poses of one shape, at least one.

    Example:
        >>> mpjpe(torch.zeros(1, 2, 3), torch.tensor([[[5.0, 5.0, 5.0], [5.0, 8.0, 9.0]]]))
        tensor(2.5000)
    """
    if problem := real_problem(found=found, truth=truth):
        raise TypeError(problem)
    if found.ndim != 3 or found.shape != truth.shape or len(found) == 0:
        raise ValueError(
            "found and truth must be (batch, joints, 3) of one shape, "
            f"got {tuple(found.shape)} and {tuple(truth.shape)}"
        )
    distance: Tensor = ((found - found[:, :1]) - (truth - truth[:, :1])).norm(dim=2)
    return distance.mean()
