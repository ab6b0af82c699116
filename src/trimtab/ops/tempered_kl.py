"""The divergence that distillation minimises: between two softmaxes at a common temperature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import positive, same_shape, tensor_problem


def tempered_kl(
    logits: Float[Tensor, "batch classes"], teacher_logits: Float[Tensor, "batch classes"], temperature: float = 1.0
) -> Float[Tensor, " batch"]:
    r"""$T^2\, KL(\operatorname{softmax}(t/T) \,\|\, \operatorname{softmax}(z/T))$ of each row.

    The factor keeps the gradient's size about the same at every temperature. No gradient goes to the teacher.

    Args:
        logits: z, the scores that are trained.
        teacher_logits: t, the scores to agree with.
        temperature: T, positive.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: the shapes differ, or the temperature is not positive or too large.

    Example:
        >>> import torch
        >>> round(tempered_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 6)
        0.462117
    """
    if problem := tensor_problem(logits=logits, teacher_logits=teacher_logits):
        raise TypeError(problem)
    same_shape("teacher_logits", teacher_logits, "logits", logits)
    temperature = positive("temperature", temperature)
    if temperature**2 > torch.finfo(torch.promote_types(logits.dtype, teacher_logits.dtype)).max:
        raise ValueError(f"temperature must have a square that fits {logits.dtype}, got {temperature}")
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    student = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2
