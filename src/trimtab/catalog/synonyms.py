"""What people type, and what the papers call it."""

from __future__ import annotations

from trimtab.catalog.spelling import stem

_STOP_WORDS = """
a about all also am an and any are as at be been best better between but by can could do does doing don for from get
gets give good had has have help how i if in into is it its just like lot make makes making many me method methods
more most much my need needs no not of on one only or our out over paper papers please same should so some something
such t than that the their them then there these they thing this those to too two up us use used uses using very
want was way we well what when where which while who why will with work works would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that say nothing of what is sought."""

FAINT_WORDS = frozenset({"data", "dataset", "deep", "learn", "learning", "model", "models", "network", "networks"})
FAINT_WORDS |= {"neural", "train", "trained", "training"}
"""Words that say little, as every paper here is about them."""

_FIELD: dict[str, tuple[str, ...]] = {
    # Short forms
    "3dgs": ("gaussian splatting",),
    "adamw": ("adam",),
    "bn": ("batch normalization",),
    "cfg": ("classifier free guidance",),
    "clip": ("vision language", "image text"),
    "cnn": ("convolution", "convolutional"),
    "dag": ("causal graph", "causal discovery"),
    "da": ("domain adaptation",),
    "dg": ("domain generalization",),
    "dp": ("differential privacy", "private data"),
    "ece": ("calibration", "calibrated confidence"),
    "fl": ("federated learning",),
    "gnn": ("graph neural network",),
    "gs": ("gaussian splatting",),
    "hpo": ("hyperparameter optimization",),
    "ib": ("information bottleneck",),
    "kd": ("knowledge distillation", "self distillation"),
    "llm": ("language models", "large language models"),
    "lora": ("parameter efficient fine tuning", "low rank adaptation"),
    "lr": ("learning rate",),
    "mae": ("masked autoencoder", "mean absolute error"),
    "moe": ("mixture of experts",),
    "nas": ("architecture search",),
    "nerf": ("radiance field", "radiance fields"),
    "nlp": ("language models",),
    "ode": ("differential equation", "differential equations"),
    "ood": ("out of distribution",),
    "ot": ("optimal transport",),
    "pde": ("differential equation", "differential equations"),
    "peft": ("parameter efficient fine tuning",),
    "pinn": ("physics informed",),
    "ptq": ("quantization",),
    "qat": ("quantization aware training",),
    "rl": ("reinforcement learning",),
    "sae": ("sparse autoencoder", "sparse autoencoders"),
    "sam": ("sharpness aware", "flat minima"),
    "sr": ("super resolution",),
    "ssl": ("self supervised learning", "semi supervised learning"),
    "svd": ("singular value decomposition",),
    "tsp": ("travelling salesman",),
    "tta": ("test time adaptation",),
    "uda": ("domain adaptation",),
    "vae": ("variational autoencoder",),
    "vlm": ("vision language",),
    "vrp": ("vehicle routing",),
    # Other words for the same
    "bad annotation": ("noisy annotations", "label noise", "noisy masks"),
    "bad label": ("label noise", "noisy labels"),
    "causal": ("dag learning",),
    "catastrophic forgetting": ("continual learning",),
    "cheap": ("for free", "training cost", "sampling cost"),
    "compress": ("pruning", "quantization", "low rank factorization"),
    "corrupted label": ("label noise", "noisy labels"),
    "dirty label": ("label noise", "noisy labels"),
    "fast sampling": ("few step sampling", "few step generation"),
    "few sampling steps": ("fast sampling", "few step sampling", "few step generation"),
    "few steps": ("fast sampling", "few step sampling", "few step generation"),
    "fill missing values": ("missing values", "missing data", "imputation"),
    "finetune": ("fine tuning",),
    "gpu": ("memory",),
    "gradient free": ("derivative free",),
    "group average": ("aggregate labels", "learning from bags"),
    "hyperparameter": ("hyperparameter optimization",),
    "imbalanced": ("class imbalance", "long tail", "long tailed"),
    "imputation": ("missing values", "missing data"),
    "incorrect label": ("label noise", "noisy labels"),
    "interpretability": ("sparse autoencoder",),
    "label wrong": ("label noise", "noisy labels"),
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
    "overconfident": ("calibration", "calibrated confidence", "over confident"),
    "overconfidence": ("calibration", "calibrated confidence"),
    "privacy": ("private data", "private", "differential privacy"),
    "retrieve": ("retrieval",),
    "sampling steps": ("fast sampling", "few step sampling", "few step generation"),
    "small data": ("small training sets", "few shot"),
    "small dataset": ("small training sets", "few shot"),
    "stable diffusion": ("diffusion models", "diffusion"),
    "uncertainty": ("calibration",),
    "unlabeled": ("semi supervised",),
    "unlabelled": ("semi supervised",),
    "unlearn": ("machine unlearning",),
    "unseen class": ("zero shot", "classes unseen in training"),
    "class seen training": ("zero shot", "classes unseen in training"),
    "without gradient": ("derivative free",),
    "wrong label": ("label noise", "noisy labels"),
}


def key(terms: list[str]) -> str:
    """The form in which terms are looked up: without their endings, in one string."""
    return " ".join(map(stem, terms))


SYNONYMS = {key(term.split()): (term, *phrases) for term, phrases in _FIELD.items()}
"""Words of a query, as `key` gives them -> phrases of the papers that mean the same."""

SYNONYM_WORDS = {key([word]): word for term in _FIELD for word in term.split()}
"""Single words of `SYNONYMS`, as `key` gives them -> as people type them."""
