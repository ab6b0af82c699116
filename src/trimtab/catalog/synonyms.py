"""What people type, and what the papers call it."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.catalog.spelling import stem, words

_STOP_WORDS = """
a about all also am an and any are as at be been best better between but by can could do does doing don for from get
gets give good had has have help how i if in into is it its just like lot lots make makes making many me method methods
more most much my need needs no not of on one only or our out over paper papers please same should so some something
such t than that the their them then there these they thing this those to too two up us use used uses using very
want was way we well what when where which while who why will with work works would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that say nothing of what is sought."""

FAINT_WORDS = frozenset({"data", "dataset", "deep", "learn", "learning", "model", "models", "network", "networks"})
FAINT_WORDS |= {"neural", "train", "trained", "training"}
"""Words that say little, as every paper here is about them."""

_SHORT_FORMS: dict[str, tuple[str, ...]] = {
    "3DGS": ("gaussian splatting",),
    "BN": ("batch normalization",),
    "CFG": ("classifier free guidance",),
    "CLIP": ("vision language", "image text"),
    "CNN": ("convolution", "convolutional"),
    "DAG": ("causal graph", "causal discovery"),
    "DA": ("domain adaptation",),
    "DG": ("domain generalization",),
    "DP": ("differential privacy", "private data"),
    "ECE": ("calibration", "calibrated confidence"),
    "EMA": ("weight averaging", "mean teacher", "averaged teacher"),
    "FL": ("federated learning",),
    "GNN": ("graph neural network",),
    "GS": ("gaussian splatting",),
    "HPO": ("hyperparameter optimization",),
    "IB": ("information bottleneck",),
    "KD": ("knowledge distillation", "self distillation"),
    "LCM": ("latent consistency", "consistency models"),
    "LLM": ("language models", "large language models"),
    "LoRA": ("parameter efficient fine tuning", "low rank adaptation"),
    "LR": ("learning rate",),
    "MAE": ("masked autoencoder", "mean absolute error"),
    "MOE": ("mixture of experts",),
    "NAS": ("architecture search",),
    "NeRF": ("radiance field", "radiance fields"),
    "NLP": ("language models",),
    "ODE": ("differential equation", "differential equations"),
    "OOD": ("out of distribution",),
    "OT": ("optimal transport",),
    "PDE": ("differential equation", "differential equations"),
    "PEFT": ("parameter efficient fine tuning",),
    "PINN": ("physics informed",),
    "PTQ": ("quantization",),
    "QAT": ("quantization aware training",),
    "RL": ("reinforcement learning",),
    "SAE": ("sparse autoencoder", "sparse autoencoders"),
    "SAM": ("sharpness aware", "flat minima"),
    "SR": ("super resolution",),
    "SSL": ("self supervised learning", "semi supervised learning"),
    "SVD": ("singular value decomposition",),
    "TSP": ("travelling salesman",),
    "TTA": ("test time adaptation",),
    "UAP": ("universal perturbation",),
    "UDA": ("domain adaptation",),
    "VAE": ("variational autoencoder",),
    "VLM": ("vision language",),
    "VQ": ("vector quantization", "image tokens"),
    "VRP": ("vehicle routing",),
}

_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "adamw": ("adam",),
    "adapt test data": ("test time adaptation",),
    "bad annotation": ("noisy annotations", "label noise", "noisy masks"),
    "bad label": ("label noise", "noisy labels"),
    "catastrophic forgetting": ("continual learning",),
    "causal": ("dag learning",),
    "cheap": ("for free", "training cost", "sampling cost"),
    "cheaper fine tuning": ("parameter efficient fine tuning",),
    "class seen training": ("zero shot", "classes unseen in training"),
    "cluster images": ("deep clustering", "clusters without labels"),
    "compress": ("pruning", "quantization", "low rank factorization"),
    "corrupted label": ("label noise", "noisy labels"),
    "dirty label": ("label noise", "noisy labels"),
    "erase concept": ("concept erasure",),
    "explain": ("attribution", "interpretability"),
    "fast sampling": ("few step sampling", "few step generation"),
    "fed avg": ("federated learning",),
    "fedavg": ("federated learning",),
    "few sampling steps": ("fast sampling", "few step sampling", "few step generation"),
    "few steps": ("fast sampling", "few step sampling", "few step generation"),
    "fill missing values": ("missing values", "missing data", "imputation"),
    "finetune": ("fine tuning",),
    "fixmatch": ("semi supervised learning",),
    "gptq": ("quantization",),
    "gpu": ("memory",),
    "gradient free": ("derivative free",),
    "gradients leak": ("gradient inversion", "privacy audit"),
    "group average": ("aggregate labels", "learning from bags"),
    "hyperparameter": ("hyperparameter optimization",),
    "images text": ("multimodal", "vision language", "image text"),
    "imbalanced": ("class imbalance", "long tail", "long tailed"),
    "imputation": ("missing values", "missing data"),
    "incorrect label": ("label noise", "noisy labels"),
    "interpretability": ("sparse autoencoder",),
    "label noise": ("noisy labels",),
    "label wrong": ("label noise", "noisy labels"),
    "labels unlabeled": ("semi supervised learning", "few labels"),
    "little data": ("small training sets", "few shot"),
    "little labelled data": ("small training sets", "few shot"),
    "long tail": ("imbalanced", "imbalanced targets"),
    "mislabeled": ("label noise", "noisy labels"),
    "mislabelled": ("label noise", "noisy labels"),
    "missing value": ("missing data", "imputation", "matrix completion"),
    "modality": ("multimodal", "several modalities"),
    "noisy label": ("label noise",),
    "non iid clients": ("non iid", "client drift", "label skew", "domain skew"),
    "non iid": ("client drift", "label skew", "domain skew"),
    "optimizer": ("optimization",),
    "overconfidence": ("calibration", "calibrated confidence"),
    "overconfident": ("calibration", "calibrated confidence", "over confident"),
    "overfit": ("overfitting",),
    "point clouds": ("matching distributions",),
    "privacy": ("private data", "private", "differential privacy"),
    "remove concept": ("concept erasure",),
    "retrieve": ("retrieval",),
    "sampling steps": ("fast sampling", "few step sampling", "few step generation"),
    "skip channels": ("dynamic pruning", "filter selection"),
    "slow": ("cheap", "training cost", "sampling cost", "single step", "fast sampling", "sparse attention"),
    "small data": ("small training sets", "few shot"),
    "small dataset": ("small training sets", "few shot"),
    "stable diffusion": ("diffusion models", "diffusion"),
    "synthetic real": ("domain adaptation", "synthetic to real"),
    "uncertainty": ("calibration",),
    "unlabeled": ("semi supervised",),
    "unlabelled": ("semi supervised",),
    "unlearn": ("machine unlearning",),
    "unseen class": ("zero shot", "classes unseen in training"),
    "without forgetting": ("catastrophic forgetting",),
    "without gradient": ("derivative free",),
    "wrong label": ("label noise", "noisy labels"),
}


def key(terms: list[str]) -> str:
    """The form in which terms are looked up: without their endings, in one string."""
    return " ".join(map(stem, terms))


_FIELD = _SHORT_FORMS | _OTHER_WORDS
SYNONYMS = {
    key(words(term)): tuple(" ".join(words(phrase)) for phrase in (term, *phrases)) for term, phrases in _FIELD.items()
}
"""Words of a query, as `key` gives them -> phrases of the papers that mean the same."""

SYNONYM_WORDS = {key([word]): word for term in _FIELD for word in words(term)}
"""Single words of `SYNONYMS`, as `key` gives them -> as people type them."""


def short_forms(terms: Iterable[str]) -> list[str]:
    """The short forms that people type for some terms of a paper.

    Example:
        >>> short_forms(["sharpness-aware minimization", "flat minima"])
        ['SAM']
    """
    text = f" {' | '.join(key(words(term)) for term in terms)} "
    return [form for form, phrases in _SHORT_FORMS.items() if any(f" {key(words(p))} " in text for p in phrases)]
