r"""Newton's method with a regulariser that follows the gradient's norm, for exact and approximate Hessians alike.

For smooth functions of up to some thousand variables, convex or not, far from the solution too: there is nothing to
tune, and the method finds out by itself how far the Hessian, or what stands for it, can be trusted.

The gradient-normalized smoothness is about the largest radius within which $H$ predicts the change of the gradient up
to a share of it; the step is regularised by the gradient's norm over that radius, found by doubling and halving:

$$
\gamma(x) = \sup \Bigl\{ r : \lVert \nabla f(x + h) - \nabla f(x) - H h \rVert_*
\le \frac{\lVert \nabla f(x) \rVert_*}{r} \lVert h \rVert \ \ \forall\, \lVert h \rVert \le r \Bigr\}, \qquad
x^+ = x - \bigl(H + \lambda B\bigr)^{-1} \nabla f(x), \quad \lambda = \frac{\lVert \nabla f(x) \rVert_*}{\gamma}
$$

A step is accepted where $f(x) - f(x^+) \ge \lVert \nabla f(x^+) \rVert_*^2 / (8 \lambda)$; then $\gamma$ doubles for
the next one, and otherwise it halves for another try. Norms are $\lVert h \rVert^2 = h^\top B h$ and its dual.

Reference: Andrei Semenov, Martin Jaggi, Nikita Doikov, "Gradient-Normalized Smoothness for Optimization with
Approximate Hessians", ICLR 2026, arXiv 2506.13710 (Algorithm 1 for the step, Algorithm 3 for the search).

The paper asks for the inequality only for those $h$ that also lie in a set $O_{x,g}$, an ellipsoid of directions that
holds the method's steps. Over the whole ball, as here, the radius is smaller or equal: a lower bound of the paper's.

Where this differs from the authors' release: near the solution, where the decrease drowns in rounding, a step may fall
short of the inequality by as much as rounding explains (there the release tries forty shorter steps and takes the
last); and if no try is accepted, the search ends instead of taking one that was not.
"""

from trimtab.optim.gradient_normalized.functions import Curvature, HessianName
from trimtab.optim.gradient_normalized.minimize import NewtonResult, gradient_normalized_newton
from trimtab.optim.gradient_normalized.optimizer import GradientNormalizedNewton
from trimtab.optim.gradient_normalized.smoothness import gradient_normalized_smoothness
from trimtab.optim.gradient_normalized.step import GradientNormalizedStep, Metric, gradient_normalized_step

__all__ = [
    "Curvature",
    "GradientNormalizedNewton",
    "GradientNormalizedStep",
    "HessianName",
    "Metric",
    "NewtonResult",
    "gradient_normalized_newton",
    "gradient_normalized_smoothness",
    "gradient_normalized_step",
]
