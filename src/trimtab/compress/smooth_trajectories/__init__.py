r"""Dataset distillation by matching smooth experts: a few synthetic images that train a network as the real ones do.

For replacing a training set by one or some images a class. Experts are trained on the real data, and their weights kept
after each epoch. The images are such that a student, started at an expert's weights $\theta^*_t$ and trained on them
for $N$ steps, comes to where the expert is $M$ epochs later. Experts that move too fast cannot be followed: here they
are smoothed while they train (a loss that begins small, a penalty that holds input gradients near 1), and the student
is made less sensitive (perturbed starts, targets on the way, a loss balanced over starts, representative first images):

$$
\mathcal{L} = \frac{\| \theta_N - \theta^*_{t+M} \|^2}{\| \theta_0 - \theta^*_{t+M} \|^2}
+ \sum_{m=1}^{M-1} \beta_m \frac{\| \theta_{m \lfloor N/M \rfloor} - \theta^*_{t+m} \|^2}
{\| \theta_0 - \theta^*_{t+m} \|^2}, \qquad
\theta_0 = \theta^*_t \Bigl( 1 + \alpha \frac{d}{\| d \|} \Bigr), \quad d \sim \mathcal{N}(0, I)
$$

With no perturbation, $\beta = 0$ and no balance it is matching training trajectories (MTT).

Reference: Jiyuan Shen, Wenzhuo Yang and Kwok-Yan Lam, "Efficient Dataset Distillation through Alignment with Smooth and
High-Quality Expert Trajectories", 2023, arXiv 2310.10541.
"""

from trimtab.compress.smooth_trajectories.experts import clip_weight, gradient_penalty, train_expert
from trimtab.compress.smooth_trajectories.matcher import TrajectoryMatcher
from trimtab.compress.smooth_trajectories.student import balance_factor, perturb, representative_init, trajectory_loss

__all__ = [
    "TrajectoryMatcher",
    "balance_factor",
    "clip_weight",
    "gradient_penalty",
    "perturb",
    "representative_init",
    "train_expert",
    "trajectory_loss",
]
