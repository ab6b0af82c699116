r"""How well clusters of embeddings agree with classes.

$$
\mathrm{NMI} = \frac{2 \, I(\text{clusters}; \text{classes})}{H(\text{clusters}) + H(\text{classes})}
$$
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.metric.pairs import checked_points


def nmi(embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], *, random_state: int = 0) -> float:
    """Normalised mutual information between classes and as many k-means clusters of the normalised embeddings.

    Args:
        embeddings: one row per sample, of any length; a tensor or an array.
        labels: classes.
        random_state: decides the starts of k-means.

    Returns:
        The score, in [0, 1].

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, a value is not finite or there is only one class.

    Example:
        >>> import torch
        >>> points = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
        >>> nmi(points, torch.tensor([5, 5, 8, 8]))
        1.0
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    embeddings, labels = checked_points(embeddings, labels)
    points = F.normalize(embeddings, dim=1)
    num_classes = len(labels.unique())
    if num_classes < 2:
        raise ValueError("labels must be of two classes at least, got one")
    clusters = KMeans(num_classes, n_init=5, random_state=random_state).fit_predict(points.cpu().numpy())
    return float(normalized_mutual_info_score(labels.cpu().numpy(), clusters))
