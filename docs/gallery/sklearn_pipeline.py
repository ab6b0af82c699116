"""Fill in missing values and classify in a scikit-learn pipeline.

A third of a medical table is missing. `MatrixCompletion` fills it in by a low-rank fit, after scikit-learn's scaler and
before its classifier or the naive Bayes probe, which learns from few samples. Grid search and cross-validation work as
always.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from trimtab.losses import NaiveBayesProbe
from trimtab.solvers import MatrixCompletion

X, y = load_breast_cancer(return_X_y=True)
X[np.random.default_rng(0).random(X.shape) < 1 / 3] = np.nan

pipeline = Pipeline(
    [
        ("scale", StandardScaler()),
        ("fill", MatrixCompletion(reg=0.1, random_state=0)),
        ("classifier", NaiveBayesProbe()),
    ]
)
search = GridSearchCV(
    pipeline,
    {
        "fill__rank": [2, 5],
        "classifier": [NaiveBayesProbe(), LogisticRegression()],
    },
    cv=3,
)
search.fit(X, y)
print(f"{search.best_params_}: {search.best_score_:.1%} right in cross-validation")
