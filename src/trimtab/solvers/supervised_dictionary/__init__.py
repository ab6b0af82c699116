r"""A dictionary of few atoms that reconstructs the data and tells their classes apart at once.

For tasks in which a handful of features must both describe the samples and predict a label, above all where the
directions that matter for the label carry little of the variance, so that PCA or NMF before a classifier loses them.

With data $X$ ($p \times n$), dictionary $W$ ($p \times r$), codes $H$, covariates $z_i$ that go past the dictionary and
the negative log-likelihood $\ell$ of a logistic regression whose first class is the reference, it minimises

$$
\sum_i \ell\big(y_i,\; \beta^\top f_i + \Gamma^\top z_i + b\big) + \xi \lVert X - W H \rVert_F^2
    + \tfrac{\nu}{2} \big(\lVert A \rVert_F^2 + \lVert \Gamma \rVert_F^2\big),
$$

where $f_i$ is what the dictionary's filters answer, $W^\top x_i$ with $A = W \beta$ ("filter"), or the sample's code,
$h_i$ with $A = \beta^\top H$ ("feature").

*Low-rank projected gradient descent* lifts this to $(A, B = W H, \Gamma)$, in which it is convex but for one
constraint: $[A, B]$, side by side or one above the other, has rank $r$. Each step descends along the gradient and goes
back by a truncated SVD. *Block coordinate descent* goes through $W$, $H$ and $(\beta, \Gamma, b)$, each within a ball
around its last value that shrinks; there, $W$ and $H$ may be kept from being negative.

Reference:
    Joowon Lee, Hanbaek Lyu and Weixin Yao, "Supervised Dictionary Learning with Auxiliary Covariates", 2022,
    arXiv 2206.06774.

Of the many units in which $A$ can be measured beside $B$, which change neither the objective nor the constraint, the
projected gradient takes the one that gives both blocks the same Lipschitz constant. At the step $1 / L$ this makes the
step in $B$ land on $X$ itself, so that $B$ need not be stored and a projection is an eigenproblem of the Gram matrix of
$X$ with a change of rank one for each class. It starts from the minimum without the rank constraint, or from a
truncated SVD, where the authors' release starts at random. The intercept is not penalised, as is usual. In each block
of coordinate descent a quadratic bound is minimised, where the authors' release takes decreasing steps, so that the
objective never rises. A test sample's code is the best one for its reconstruction. (The paper also searches over
labels: with two classes and free codes that gives the same label.)
"""

from trimtab.solvers.supervised_dictionary.estimator import SupervisedDictionary

__all__ = ["SupervisedDictionary"]
