r"""Learning from bag means of the response: fit the bags' means, fit every member to its bag's mean, or interpolate.

For data whose responses are known only as averages over disjoint bags of samples, for privacy or by the way they were
collected. The bag-level loss is unbiased and noisy, the instance-level loss shrinks predictions; the weight between
them is a bias-variance trade-off.

With $m$ bags, the bag $a$ of $k_a$ samples and mean response $\bar y_a$,

$$
\mathcal{L}_\rho = \frac{1 - \rho}{m} \sum_a \ell\Bigl(\bar y_a, \frac{1}{k_a} \sum_{i \in a} f(x_i)\Bigr)
+ \frac{\rho}{m} \sum_a \frac{1}{k_a} \sum_{i \in a} \ell\bigl(\bar y_a, f(x_i)\bigr)
$$

For the squared loss $\mathcal{L}_\rho = \mathcal{L}_0 + \rho\, V$ with $V$ the mean variance of the predictions within
bags. Linear models then have, with $S$ the $m \times n$ matrix of $1 / \sqrt{k_a}$ where sample $i$ is in bag $a$,

$$
\hat\theta_\rho = \bigl((1 - \rho) X^\top S^\top S X + \rho X^\top X + \alpha I\bigr)^{-1} X^\top S^\top S y
$$

Labels are kept $\varepsilon$-differentially private by noise on the bag means of clipped responses:
$\bar y_a + \mathrm{Laplace}(2B / (k_a \varepsilon))$. The scale is twice the paper's $B / (k_a \varepsilon)$: a
response clipped to $[-B, B]$ can move its bag's mean by $2B / k_a$, and half of that noise keeps $2 \varepsilon$ alone.

Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses: Instance Level versus Bag
Level Loss Functions", ICLR 2024, arXiv 2401.11081.
"""

from trimtab.losses.aggregate_responses.objectives import AggregateLoss, bag_level_loss, instance_level_loss
from trimtab.losses.aggregate_responses.privacy import private_bag_means
from trimtab.losses.aggregate_responses.ridge import AggregateRidge
from trimtab.losses.aggregate_responses.risk import aggregate_risk

__all__ = [
    "AggregateLoss",
    "AggregateRidge",
    "aggregate_risk",
    "bag_level_loss",
    "instance_level_loss",
    "private_bag_means",
]
