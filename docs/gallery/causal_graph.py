"""Learn a causal graph from observations.

Six variables depend on each other linearly, with noise of different sizes. `CoLiDE` estimates graph and noise at once;
`TopoSwaps` then looks for a better order of the variables, from where CoLiDE ended.
"""

import numpy as np

from trimtab.solvers import CoLiDE, TopoSwaps

rng = np.random.default_rng(0)
weights = np.triu(rng.choice([0.0, 0.0, 1.0, -1.5], size=(6, 6)), k=1)
order = rng.permutation(6)
weights = weights[np.ix_(order, order)]
noise = rng.normal(size=(1000, 6)) * rng.uniform(0.8, 1.5, size=6)
X = noise @ np.linalg.inv(np.eye(6) - weights)

colide = CoLiDE(noise="unequal", warm_iter=2000, max_iter=4000, lr=1e-3).fit(X)
swaps = TopoSwaps(init=colide.weights_).fit(X)
wrong = {}
for name, model in (("CoLiDE", colide), ("CoLiDE, then TopoSwaps", swaps)):
    wrong[name] = int((model.adjacency_ != (weights != 0)).sum())
    print(f"{name}: {wrong[name]} of {6 * 5} possible edges are wrong; there are {int((weights != 0).sum())}")
