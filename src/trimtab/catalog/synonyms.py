"""What people type, and what the papers call it."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.catalog.spelling import stem, words

_STOP_WORDS = """
a about across after all also alternative alternatives always am among an and any anything appear appears approach
approaches are as at available avoid be become becomes been before best better between both but by can cannot come
comes compare comparison contain contains could do does doing don drop during each easy enough even every existing
find finding fix for from get gets getting give goes good got had half handle happen happens has have having help how
however i idea if implementation improve improved improving in instead into is it its just keep keeps kind kinds
latest let lets library like look looking looks lot lots make makes making many match matches me method methods more
most much must my near need needs never nice no not of often on one only or our out over paper papers please problem
problems pytorch quite rather really recent reduce replace replacement run running s same scratch should simple simply
so solve solving some something sota still such suitable system systems t take takes taking technique techniques than
that the their them then there these they thing this those to together too tool tools trick tricks try trying two up
us use used uses using version versus very vs want wants was way we well what when where whether which while who whole
why will with work works would yet you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that say nothing of what is sought."""

FAINT_WORDS = frozenset({"data", "dataset", "deep", "learn", "learning", "model", "models", "network", "networks"})
FAINT_WORDS |= {
    "accuracy",
    "addition",
    "algorithm",
    "error",
    "errors",
    "expected",
    "experiment",
    "higher",
    "lower",
    "performance",
    "predict",
    "user",
    "users",
}
FAINT_WORDS |= {"classifier", "classifiers", "image", "images", "neural", "train", "trained", "training"}
"""Words that say little, as every paper here is about them."""

_SHORT_FORMS: dict[str, tuple[str, ...]] = {
    "3DGS": ("gaussian splatting",),
    "AT": ("adversarial training",),
    "BN": ("batch normalization",),
    "CFG": ("classifier free guidance",),
    "CIFAR-10N": ("label noise", "noisy labels"),
    "CLIP": ("vision language", "image text"),
    "CNN": ("convolution", "convolutional"),
    "DA": ("domain adaptation",),
    "DAG": ("causal graph", "causal discovery"),
    "DDIM": ("fast sampling", "few step sampling"),
    "DG": ("domain generalization",),
    "DP": ("differential privacy", "private data"),
    "DRO": ("distributionally robust",),
    "ECE": ("calibration", "calibrated confidence"),
    "EMA": ("weight averaging", "mean teacher", "averaged teacher"),
    "EMD": ("optimal transport",),
    "FGSM": ("adversarial training",),
    "FL": ("federated learning",),
    "GAN": ("generative adversarial",),
    "GCD": ("category discovery",),
    "GNN": ("graph neural network",),
    "GPT": ("language models", "closed source"),
    "GS": ("gaussian splatting",),
    "HPO": ("hyperparameter optimization",),
    "IB": ("information bottleneck",),
    "IRM": ("domain generalization", "invariance"),
    "KD": ("knowledge distillation", "self distillation"),
    "LCM": ("latent consistency", "consistency models"),
    "LLM": ("language models", "large language models"),
    "LLMs": ("language models", "large language models"),
    "LoRA": ("parameter efficient fine tuning", "low rank adaptation"),
    "LR": ("learning rate",),
    "MAE": ("masked autoencoder", "mean absolute error"),
    "MIM": ("masked image modelling",),
    "MOE": ("mixture of experts",),
    "NAS": ("architecture search",),
    "NeRF": ("radiance field", "radiance fields"),
    "NFE": ("fast sampling", "few step sampling"),
    "NLP": ("language models",),
    "NMF": ("matrix factorization",),
    "ODE": ("differential equation", "differential equations"),
    "OOD": ("out of distribution",),
    "OSR": ("out of distribution",),
    "OT": ("optimal transport",),
    "PCA": ("low rank", "principal components"),
    "PDE": ("differential equation", "differential equations"),
    "PEFT": ("parameter efficient fine tuning",),
    "PGD": ("adversarial training", "adversarial attack"),
    "PINN": ("physics informed",),
    "PTQ": ("quantization",),
    "QAT": ("quantization aware training",),
    "RL": ("reinforcement learning",),
    "SAE": ("sparse autoencoder", "sparse autoencoders"),
    "SAM": ("sharpness aware", "flat minima"),
    "SDE": ("stochastic differential equation",),
    "SEM": ("structural equation model", "causal discovery"),
    "SR": ("super resolution",),
    "SSDG": ("single source",),
    "SSL": ("self supervised learning", "semi supervised learning"),
    "SVD": ("singular value decomposition",),
    "SVM": ("support vector machine", "surrogate loss"),
    "TSP": ("travelling salesman",),
    "TTA": ("test time adaptation",),
    "UAP": ("universal perturbation",),
    "UDA": ("domain adaptation",),
    "VAE": ("variational autoencoder",),
    "ViT": ("vision transformer",),
    "VLM": ("vision language",),
    "VQ": ("vector quantization", "image tokens"),
    "VRP": ("vehicle routing",),
    "W4A4": ("quantization",),
    "W8A8": ("quantization",),
}

_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "one source": ("single source",),
    "orthogonal": ("orthonormality", "orthonormal"),
    "regularized ot": ("entropic regularization", "optimal transport"),
    "regularized transport": ("entropic regularization", "optimal transport"),
    "2 bit": ("quantization",),
    "3 bit": ("quantization",),
    "4 bit": ("quantization",),
    "8 bit": ("quantization", "8 bit float"),
    "adamw": ("adam",),
    "adapt test data": ("test time adaptation",),
    "adapter": ("parameter efficient fine tuning",),
    "ambiguous label": ("label noise",),
    "anneal": ("derivative free", "global optimization"),
    "annotation error": ("label noise", "noisy annotations"),
    "annotator": ("label noise", "noisy labels", "noisy annotations"),
    "annotators disagree": ("label noise", "noisy labels"),
    "arcface": ("face recognition", "margin softmax"),
    "asam": ("sharpness aware", "flat minima"),
    "attack gpt": ("closed source", "transfer attack"),
    "audio": ("multimodal", "several modalities"),
    "automl": ("hyperparameter optimization", "architecture search"),
    "b test": ("bandits",),
    "bad annotation": ("noisy annotations", "label noise", "noisy masks"),
    "bad gradient": ("byzantine robustness",),
    "bad label": ("label noise", "noisy labels"),
    "bandwidth": ("communication cost", "communication rounds"),
    "bayesian network": ("causal discovery", "dag learning"),
    "bayesian optimization": ("hyperparameter optimization", "derivative free"),
    "best arm": ("bandits",),
    "bits": ("quantization", "bit width"),
    "black box function": ("derivative free", "global optimization"),
    "black box optimization": ("derivative free", "global optimization"),
    "byol": ("self supervised learning",),
    "calibrated": ("calibrated confidence",),
    "catastrophic forgetting": ("continual learning",),
    "causal": ("dag learning",),
    "census": ("private data", "tabular data"),
    "certificate": ("certified",),
    "certify": ("certified",),
    "channel": ("structured pruning", "filter selection", "dynamic pruning"),
    "channel pruning": ("structured pruning", "filter selection"),
    "chatgpt": ("closed source", "language models"),
    "cheap": ("for free", "training cost", "sampling cost"),
    "cheaper fine tuning": ("parameter efficient fine tuning",),
    "class imbalance": ("imbalanced", "long tail", "rare classes"),
    "class seen training": ("zero shot", "classes unseen in training"),
    "classifier calibrated": ("calibrated confidence",),
    "cluster images": ("deep clustering", "clusters without labels"),
    "collaborative filtering": ("matrix completion",),
    "communication": ("communication rounds", "communication cost"),
    "compress": ("pruning", "quantization", "low rank factorization"),
    "concept drift": ("distribution shift", "continual learning"),
    "confidence": ("calibration", "calibrated confidence"),
    "confidence score": ("calibration", "calibrated confidence"),
    "confident": ("calibration", "calibrated confidence"),
    "contrastive learning without augmentation": ("augmentation free",),
    "copyright": ("concept erasure", "machine unlearning"),
    "corrupted label": ("label noise", "noisy labels"),
    "cosface": ("face recognition", "margin softmax"),
    "covariate shift": ("distribution shift", "test time adaptation"),
    "cross silo": ("federated learning",),
    "crowdsourced": ("label noise", "noisy labels"),
    "crowdsourced label": ("label noise", "noisy labels"),
    "cutmix": ("mixup", "data augmentation"),
    "cyclegan": ("domain translation",),
    "dann": ("domain adaptation",),
    "deep leakage": ("gradient inversion",),
    "delivery": ("vehicle routing",),
    "deploy phone": ("quantization", "pruning"),
    "dino": ("self supervised learning",),
    "dirty label": ("label noise", "noisy labels"),
    "disagree": ("label noise", "noisy annotations"),
    "distill": ("distillation",),
    "distill bert": ("distilling language models", "language models"),
    "distribution shift": ("out of distribution", "domain generalization", "test time adaptation"),
    "domain gap": ("domain adaptation", "domain generalization"),
    "domain shift": ("domain adaptation", "domain generalization"),
    "dora": ("parameter efficient fine tuning",),
    "dpm solver": ("fast sampling", "few step sampling", "exponential integrator"),
    "dropout rate": ("hyperparameter optimization",),
    "earth mover": ("optimal transport",),
    "earth mover distance": ("optimal transport",),
    "edge device": ("quantization", "pruning"),
    "erase": ("concept erasure", "machine unlearning"),
    "erase concept": ("concept erasure",),
    "evolution strategy": ("derivative free",),
    "evolutionary": ("derivative free", "evolutionary search", "genetic algorithm"),
    "explain": ("attribution", "interpretability"),
    "face verification": ("face recognition",),
    "fast sampling": ("few step sampling", "few step generation"),
    "faster": ("cheap", "training cost", "sampling cost", "fast sampling", "pruning", "quantization"),
    "fed avg": ("federated learning",),
    "fedavg": ("federated learning",),
    "fedprox": ("federated learning",),
    "few parameters": ("parameter efficient fine tuning",),
    "few sampling steps": ("fast sampling", "few step sampling", "few step generation"),
    "few steps": ("fast sampling", "few step sampling", "few step generation"),
    "few steps generate": ("few step generation",),
    "fill missing values": ("missing values", "missing data", "imputation"),
    "finetune": ("fine tuning",),
    "fixmatch": ("semi supervised learning",),
    "flat minimum": ("flat minima", "sharpness aware"),
    "flatter minima": ("flat minima", "sharpness aware"),
    "flux": ("diffusion models",),
    "forgotten": ("machine unlearning",),
    "gdpr": ("machine unlearning",),
    "gdpr right forgotten": ("machine unlearning",),
    "generalize unseen domain": ("domain generalization",),
    "genetic": ("genetic algorithm", "derivative free"),
    "gpt4": ("closed source",),
    "gptq": ("quantization",),
    "gpu": ("memory",),
    "gradient free": ("derivative free",),
    "gradient leakage": ("gradient inversion", "privacy audit"),
    "gradients leak": ("gradient inversion", "privacy audit"),
    "grid search": ("hyperparameter optimization",),
    "group average": ("aggregate labels", "learning from bags"),
    "gsam": ("sharpness aware", "flat minima"),
    "harmful image": ("concept erasure",),
    "heterogeneity": ("non iid", "client drift"),
    "heterogeneous client": ("non iid", "client drift"),
    "hospital": ("federated learning", "medical imaging"),
    "hyperparameter": ("hyperparameter optimization",),
    "image retrieval": ("retrieval", "deep metric learning"),
    "image search": ("retrieval", "deep metric learning"),
    "images text": ("multimodal", "vision language", "image text"),
    "imbalanced": ("class imbalance", "long tail", "long tailed"),
    "imputation": ("missing values", "missing data"),
    "incorrect label": ("label noise", "noisy labels"),
    "inference": ("quantization", "pruning", "sampling cost"),
    "int4": ("quantization",),
    "int8": ("quantization",),
    "integer": ("discrete optimization",),
    "integer programming": ("discrete optimization", "combinatorial optimization"),
    "interpretability": ("sparse autoencoder",),
    "invariant": ("domain generalization",),
    "jailbreak": ("transfer attack", "closed source"),
    "krum": ("byzantine robustness",),
    "label error": ("label noise", "noisy labels"),
    "label mechanical turk": ("label noise", "noisy labels"),
    "label noise": ("noisy labels",),
    "label smoothing": ("calibration", "self distillation"),
    "label wrong": ("label noise", "noisy labels"),
    "labels unlabeled": ("semi supervised learning", "few labels"),
    "latency": ("quantization", "pruning", "sampling cost"),
    "leak": ("gradient inversion", "privacy audit"),
    "little data": ("small training sets", "few shot"),
    "little labelled data": ("small training sets", "few shot"),
    "logistics": ("vehicle routing",),
    "long tail": ("imbalanced", "imbalanced targets"),
    "loss landscape": ("flat minima", "sharpness aware"),
    "low bit": ("quantization",),
    "low precision": ("quantization", "8 bit float"),
    "low rank adapter": ("parameter efficient fine tuning", "low rank adaptation"),
    "malicious": ("byzantine robustness", "adversarial attack"),
    "mean teacher": ("semi supervised", "self training"),
    "mechanical turk": ("label noise", "noisy labels"),
    "medical image": ("medical imaging", "medical segmentation"),
    "microcontroller": ("quantization",),
    "mislabeled": ("label noise", "noisy labels"),
    "mislabelled": ("label noise", "noisy labels"),
    "missing value": ("missing data", "imputation", "matrix completion"),
    "mistake": ("label noise", "noisy labels"),
    "mobile": ("quantization", "pruning"),
    "moco": ("self supervised learning",),
    "modality": ("multimodal", "several modalities"),
    "mode collapse": ("gan",),
    "mri": ("medical imaging", "medical segmentation"),
    "negative prompt": ("classifier free guidance",),
    "netflix": ("matrix completion",),
    "new class": ("category discovery",),
    "noisy label": ("label noise",),
    "non iid": ("client drift", "label skew", "domain skew"),
    "non iid clients": ("non iid", "client drift", "label skew", "domain skew"),
    "notears": ("dag learning",),
    "novel class": ("category discovery",),
    "nsfw": ("concept erasure",),
    "nsfw image": ("concept erasure",),
    "nudity": ("concept erasure",),
    "one step": ("one step generation", "few step generation", "one step inference"),
    "open world": ("category discovery", "out of distribution"),
    "optimizer": ("optimization",),
    "optuna": ("hyperparameter optimization",),
    "or tools": ("combinatorial optimization",),
    "outlier label": ("label noise",),
    "overconfidence": ("calibration", "calibrated confidence"),
    "overconfident": ("calibration", "calibrated confidence", "over confident"),
    "overfit": ("overfitting",),
    "personalised": ("personalization",),
    "personalized": ("personalization",),
    "pgd train": ("adversarial training",),
    "pix2pix": ("domain translation",),
    "point clouds": ("matching distributions",),
    "poison": ("byzantine robustness",),
    "pose estimation": ("human pose",),
    "post training": ("quantization",),
    "privacy": ("private data", "private", "differential privacy"),
    "private": ("differential privacy", "private data", "privacy audit"),
    "prove": ("certified", "provable"),
    "pseudo label": ("pseudo labels", "self training"),
    "qlora": ("parameter efficient fine tuning",),
    "quasi newton": ("second order optimization", "newton method"),
    "rating": ("matrix completion",),
    "ratings": ("matrix completion",),
    "real time": ("few step generation", "fast sampling"),
    "recommendation": ("matrix completion",),
    "recommender": ("matrix completion",),
    "rectified flow": ("flow matching",),
    "reliability": ("calibration", "calibrated confidence"),
    "reliability diagram": ("calibration", "calibrated confidence"),
    "remove concept": ("concept erasure",),
    "retrieve": ("retrieval",),
    "right forgotten": ("machine unlearning",),
    "robust pca": ("robust matrix recovery",),
    "rounding": ("discrete optimization", "quantization"),
    "route": ("vehicle routing", "routing"),
    "sampler": ("fast sampling",),
    "sampling steps": ("fast sampling", "few step sampling", "few step generation"),
    "scaffold": ("client drift", "federated learning"),
    "scheduler": ("fast sampling",),
    "sdxl": ("diffusion models",),
    "second order": ("second order optimization", "newton method"),
    "self training": ("pseudo labels",),
    "sharp minima": ("flat minima", "sharpness aware"),
    "shortcut": ("simplicity bias", "spurious correlation"),
    "sim real": ("synthetic to real", "domain adaptation"),
    "sim2real": ("synthetic to real", "domain adaptation"),
    "simclr": ("self supervised learning",),
    "similar image": ("retrieval", "deep metric learning"),
    "single cell": ("matching distributions", "transport map"),
    "single step": ("one step generation", "single step", "few step generation"),
    "skewed": ("imbalanced", "long tail"),
    "skip channels": ("dynamic pruning", "filter selection"),
    "slow": ("cheap", "training cost", "sampling cost", "single step", "fast sampling", "sparse attention"),
    "small data": ("small training sets", "few shot"),
    "small dataset": ("small training sets", "few shot"),
    "softmax probabilities": ("calibration", "calibrated confidence"),
    "sparsity": ("pruning", "sparse training"),
    "speed": ("cheap", "training cost", "sampling cost", "fast sampling", "pruning", "quantization"),
    "speed up": ("cheap", "training cost", "sampling cost", "fast sampling", "pruning", "quantization"),
    "spurious": ("simplicity bias", "spurious correlation"),
    "spurious correlation": ("simplicity bias",),
    "stable diffusion": ("diffusion models", "diffusion"),
    "structure learning": ("dag learning", "causal discovery"),
    "student": ("knowledge distillation", "distillation"),
    "style erased": ("concept erasure",),
    "swarm": ("derivative free", "consensus based optimization"),
    "synthetic real": ("domain adaptation", "synthetic to real"),
    "teacher": ("knowledge distillation", "self distillation"),
    "temperature scaling": ("calibration", "calibrated confidence"),
    "text diffusion": ("discrete diffusion", "masked diffusion"),
    "text image": ("diffusion models", "image text"),
    "text image model": ("diffusion models", "text to image"),
    "train diffusion": ("diffusion training",),
    "train diffusion model": ("diffusion training",),
    "train diffusion model faster": ("diffusion training",),
    "transfer learn": ("transfer learning", "fine tuning"),
    "triplet": ("deep metric learning",),
    "turbo": ("few step generation",),
    "unbalanced": ("imbalanced", "imbalanced data", "long tail"),
    "uncertain": ("calibration", "uncertain samples"),
    "uncertainty": ("calibration",),
    "undo": ("unlearning audit",),
    "unipc": ("fast sampling", "few step sampling"),
    "unlabeled": ("semi supervised",),
    "unlabeled clients": ("semi supervised",),
    "unlabelled": ("semi supervised",),
    "unlearn": ("machine unlearning",),
    "unreliable": ("noisy",),
    "unreliable label": ("label noise", "noisy labels"),
    "unsafe image": ("concept erasure",),
    "unseen class": ("zero shot", "classes unseen in training"),
    "vicreg": ("self supervised learning",),
    "video": ("video generation",),
    "wasserstein": ("optimal transport",),
    "wasserstein distance": ("optimal transport",),
    "weak supervision": ("aggregate labels", "learning from bags"),
    "without augmentation": ("augmentation free",),
    "without forgetting": ("catastrophic forgetting",),
    "without gradient": ("derivative free",),
    "worker": ("byzantine robustness", "distributed training"),
    "worst case": ("worst error", "min max", "distributionally robust"),
    "wrong label": ("label noise", "noisy labels"),
    "x ray": ("medical imaging", "medical segmentation"),
}


def key(terms: list[str]) -> str:
    """The form in which terms are looked up: without their endings, in one string."""
    return " ".join(map(stem, terms))


# Words before words, in any pairing -> what the pair means.
_PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "ambiguous bad corrupted crowdsourced dirty erroneous flipped imperfect inaccurate incorrect noisy swapped "
        "unreliable wrong",
        "annotation annotators label labeling mask target",
        ("label noise", "noisy labels"),
    ),
    (
        "few limited little scarce small tiny",
        "data dataset example sample training",
        ("small training sets", "few shot", "data efficient"),
    ),
    (
        "different new other unknown unseen",
        "domain environment hospital site scanner style",
        ("domain generalization",),
    ),
    ("new novel unknown unseen", "category class", ("category discovery", "zero shot", "classes unseen in training")),
    (
        "imbalanced long-tailed rare skewed unbalanced uneven",
        "category class label",
        ("imbalanced data", "class imbalance", "long tail", "long tailed"),
    ),
    (
        "bad broken faulty hostile malicious poisoned",
        "client gradient node participant update worker",
        ("byzantine robustness",),
    ),
    ("cheap cheaper fast faster quick", "generation sampler sampling", ("fast sampling", "few step generation")),
    ("delete erase forget remove unlearn", "class data sample user", ("machine unlearning",)),
)

# What papers are about -> what people type for it.
_TYPED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("label noise", "noisy labels"),
        "scraped; web scraped; crawled; cleanlab; confident learning; co teaching; dividemix; generalized cross "
        "entropy; symmetric cross entropy; label quality; annotation quality; labeling error; labelling mistake; "
        "annotation mistake; label cleaning; relabel; mislabeling; mechanical turkers; crowd label; clothing1m; "
        "webvision",
    ),
    (
        ("calibration", "calibrated confidence"),
        "trustworthy; predicted probabilities; probability estimate; class probabilities; brier score; platt "
        "scaling; isotonic regression; miscalibrated; miscalibration; trust the confidence",
    ),
    (
        ("sharpness aware", "flat minima"),
        "sharpness; esam; looksam; flatness; flat minimizers",
    ),
    (
        ("optimizer memory", "memory"),
        "oom; vram; gb; gpu memory; optimizer state; memory footprint; gb card",
    ),
    (
        ("optimizer", "adam"),
        "lion; sophia; shampoo; muon; rmsprop; nadam; radam; adafactor; lamb; nesterov",
    ),
    (
        ("hyperparameter optimization",),
        "raytune; hyperopt; population based training; regularization strength; tune regularization; tune "
        "augmentation; choose weight decay; pick weight decay; set weight decay; select weight decay; tune weight "
        "decay",
    ),
    (
        ("grokking",),
        "delayed generalization; modular addition; modular arithmetic; softmax overflow; long overfitting; sudden "
        "generalization",
    ),
    (
        ("fast sampling", "few step sampling"),
        "k diffusion; heun; pndm; dpm; inference steps; sampling speed; denoising steps; number function "
        "evaluations; step sampler",
    ),
    (
        ("few step generation", "consistency models"),
        "hyper sd; lcm lora; schnell; lightning; progressive distillation",
    ),
    (
        ("classifier free guidance",),
        "prompt adherence; prompt following; guidance scale; guidance",
    ),
    (
        ("oversaturation", "high guidance scale"),
        "oversaturated; burnt; overexposed; saturated; saturated colours; burnt colours; overcooked; fried; deep "
        "fried; washed out",
    ),
    (
        ("few shot adaptation", "style transfer"),
        "few shot image generation; few shot generation; dreambooth; textual inversion",
    ),
    (
        ("likelihood",),
        "log likelihood; bits per dimension; density estimation",
    ),
    (
        ("memorization",),
        "replicate training images; copies training images; copy training data",
    ),
    (
        ("discrete diffusion", "masked diffusion"),
        "diffusion language model; text generation diffusion; mdlm; llada; d3pm",
    ),
    (
        ("optimal transport",),
        "geomloss; hungarian; transport plan; coupling; entropic",
    ),
    (
        ("matching distributions", "transport map"),
        "align distributions; cell perturbation; distribution matching; map distribution",
    ),
    (
        ("matrix completion", "missing values"),
        "missing entries; ratings matrix; softimpute; soft impute; incomplete table; incomplete data; nan; knn "
        "imputer; missing cells; user item; user rating; predict rating; rate movies; movie ratings",
    ),
    (
        ("robust matrix recovery",),
        "principal component pursuit; gross errors; corrupted matrix; corrupted entries",
    ),
    (
        ("causal discovery", "dag learning"),
        "acyclic; acyclic graph; causal structure; causal inference; causality; golem; dagma; pc algorithm; linear "
        "sem; structural equation; cause effect; causes effects",
    ),
    (
        ("federated learning",),
        "flower; fedml; on device training; decentralized hospitals; cross device; fedavg; fedopt; phones",
    ),
    (
        ("client drift", "label skew", "non iid clients"),
        "label distribution; different label distributions; clients different; heterogeneous; heterogeneous data; "
        "data heterogeneity; client data differs",
    ),
    (
        ("byzantine robustness",),
        "straggler; attacker; backdoor; hostile client; krum; trimmed mean; poisoning attack; failing worker; "
        "crash; sabotage; outlier gradients; robust aggregation",
    ),
    (
        ("quantization",),
        "mixed precision; bitwidth; awq; smoothquant; bitsandbytes; gguf; fp8; int2; ternary; binary weights; low "
        "bitwidth; bits per weight; weight precision",
    ),
    (
        ("pruning", "sparse training"),
        "wanda; sparsegpt; magnitude pruning; unstructured pruning; prune",
    ),
    (
        ("pruning", "quantization", "structured pruning"),
        "flops; macs; smaller model; tiny model; raspberry pi; jetson; tensorrt; embedded device; android; iphone; "
        "cpu inference; compress network; compress model; shrink network; shrink model",
    ),
    (
        ("low rank factorization",),
        "factorize weights; low rank weights; svd compression",
    ),
    (
        ("distilling language models", "language model compression"),
        "tinybert; distilbert; student model; smaller bert",
    ),
    (
        ("dataset distillation",),
        "condensation; condense; dataset condensation; coreset; distill dataset",
    ),
    (
        ("self distillation",),
        "teacher free; born again; without teacher; no teacher",
    ),
    (
        ("machine unlearning",),
        "remove training data; retrain from scratch; retrain; erasure request; opt out; selective forgetting",
    ),
    (
        ("data attribution",),
        "influence function; tracin; trak; training data influence",
    ),
    (
        ("concept erasure",),
        "erased diffusion; celebrity; artist style; artistic style; copyrighted character; copyrighted style; safe "
        "image generation; porn",
    ),
    (
        ("adversarial training", "adversarial robustness"),
        "trades; autoattack; robust classifier; adversarial examples; fgsm train; adversarial example",
    ),
    (
        ("certified training", "certified robustness"),
        "crown; lipschitz; verification; verified; robustness guarantee; formal guarantee; provably robust; "
        "guaranteed robustness",
    ),
    (
        ("domain adaptation", "synthetic to real"),
        "gta; gta5; cityscapes; synthia; game engine; simulator images; rendered images; sim to real",
    ),
    (
        ("domain generalization",),
        "pacs; domainbed; office home; wilds; camelyon; terra incognita; out domain; new scanner; different "
        "scanner; other hospital",
    ),
    (
        ("test time adaptation",),
        "tent; test time training; adapt online; adapt deployment; corruption; imagenet c; drift production",
    ),
    (
        ("source free adaptation",),
        "without source data; source data gone; source data unavailable",
    ),
    (
        ("deep metric learning", "retrieval"),
        "proxy anchor; proxy nca; contrastive loss; embedding loss; embedding space; recall k; hard negative "
        "mining; multi similarity; person reidentification; re identification; reid; visual search; nearest "
        "neighbour search; image similarity; similarity search",
    ),
    (
        ("face recognition",),
        "adaface; magface; identity verification; lfw; face embedding; face identification; face matching",
    ),
    (
        ("place recognition",),
        "geolocalization; loop closure; slam; where photo taken; relocalization",
    ),
    (
        ("out of distribution detection", "inputs of unknown classes"),
        "novelty detection; open set; unknown inputs; unknown class detection; ood detector",
    ),
    (
        ("anomaly detection", "industrial inspection"),
        "defect; scratches; mvtec; surface defect; visual inspection; quality control",
    ),
    (
        ("object detection",),
        "yolo; bounding box; bounding boxes; detr; detector",
    ),
    (
        ("deepfake detection", "generated image detection", "image forensics"),
        "deepfake; fake image; fake images; ai generated; ai generated images; tampered; photoshopped",
    ),
    (
        ("semi supervised learning", "few labels"),
        "flexmatch; freematch; mixmatch; remixmatch; few labels; handful of labels; annotation budget; few "
        "labelled; few labeled; few annotated; partially labelled; partially labeled",
    ),
    (
        ("self supervised learning", "features without labels"),
        "barlow twins; swav; ijepa; pretrain without labels; pretraining; unlabelled pretraining; representation "
        "learning; learn representations",
    ),
    (
        ("masked image modelling", "masked autoencoder"),
        "masked modeling; mask patches; beit",
    ),
    (
        ("deep clustering", "clusters without labels"),
        "kmeans; k means; group images; unsupervised classification; unsupervised image classification",
    ),
    (
        ("imbalanced", "long tail", "class imbalance"),
        "rare class; minority class; minority; smote; oversampling; focal loss; ldam; skewed class; class weights; "
        "rare categories",
    ),
    (
        ("imbalanced regression", "imbalanced targets"),
        "rare target; skewed target; skewed regression; regression tail",
    ),
    (
        ("aggregate labels", "learning from bags"),
        "label proportions; bag labels; bag level; aggregated labels; only averages; conversion reporting",
    ),
    (
        ("multimodal", "several modalities"),
        "audio video; modalities; sensor fusion; fusion; audiovisual",
    ),
    (
        ("inverse problems", "denoising"),
        "deblur; deblurring; blurry; restoration; restore; low light; old photos",
    ),
    (
        ("super resolution",),
        "upscale; upscaling; upscaler; esrgan",
    ),
    (
        ("text to 3d", "score distillation"),
        "dreamfusion; 3d generation; 3d asset",
    ),
    (
        ("point cloud registration",),
        "icp; register scans; lidar scans; align scans",
    ),
    (
        ("neural operator", "pde"),
        "fno; deeponet; cfd; navier stokes; fluid; surrogate simulation; partial differential equation",
    ),
    (
        ("physics informed", "pinn"),
        "physics loss; collocation points",
    ),
    (
        ("neural ode",),
        "stiff; ode solver; continuous depth",
    ),
    (
        ("equivariance", "symmetry"),
        "equivariant; rotation invariant; invariance",
    ),
    (
        ("graph neural network", "node classification"),
        "gcn; message passing; node classifier; gat",
    ),
    (
        ("attribution", "explanations"),
        "saliency; feature importance; explain predictions; explain prediction; gradcam",
    ),
    (
        ("sparse autoencoder",),
        "mechanistic interpretability; monosemantic; superposition; dead latents; dead neuron",
    ),
    (
        ("shape bias", "texture synthesis"),
        "texture bias; shape or texture",
    ),
    (
        ("scaling laws",),
        "scaling law; chinchilla; compute optimal",
    ),
    (
        ("generalization bounds",),
        "vc dimension; pac bayes; generalization guarantee",
    ),
    (
        ("random features", "kernel"),
        "ntk; neural tangent kernel; kernel regression",
    ),
    (
        ("continual learning",),
        "incremental learning; class incremental; lifelong learning; task sequence; sequence of tasks; streaming "
        "tasks; replay buffer",
    ),
    (
        ("differential privacy", "private data", "synthetic data"),
        "differentially private; private tables; share sensitive data; confidential table; anonymize; anonymise; "
        "anonymous data",
    ),
    (
        ("derivative free", "global optimization"),
        "cma es; nelder mead; simulated annealing; non differentiable; nondifferentiable; without derivatives; "
        "gradients unavailable",
    ),
    (
        ("bandits",),
        "ab testing; thompson; multi armed; beam search antenna; antenna",
    ),
    (
        ("vehicle routing", "combinatorial optimization"),
        "courier; fleet; tour; shortest route",
    ),
    (
        ("gan", "data efficient"),
        "stylegan; gan overfits; discriminator overfits",
    ),
    (
        ("image tokenizer", "vector quantization"),
        "vqgan; visual tokenizer; codebook; tokenizer",
    ),
    (
        ("disentanglement",),
        "beta vae; factors of variation; disentangle; interpretable latents",
    ),
    (
        ("time series", "imputation"),
        "irregular time series; sensor dropout; missing measurements; gaps in sensor data; electronic health records",
    ),
    (
        ("parameter efficient fine tuning",),
        "rank lora; loraplus; lora+; adalora; pissa; ia3; prefix tuning; fine tune llm; few trainable parameters; "
        "instruction tuning; qlora",
    ),
    (
        ("vision language", "few shot"),
        "prompt tuning; coop; clip adapter; fine tune clip; clip fine tuning",
    ),
    (
        ("overfitting",),
        "overfits; overfit training; train test gap; gap between train and test",
    ),
    (
        ("gradient inversion", "privacy audit"),
        "recover images from gradients; leaked gradients; reconstruct data from updates",
    ),
    (
        ("medical segmentation", "medical imaging"),
        "ct scan; ct scans; mri scans; radiology; tumour; tumor; organ; ultrasound",
    ),
    (
        ("universal perturbation",),
        "one perturbation fools; image agnostic",
    ),
    (
        ("transfer attack",),
        "attack llava; attack gemini; attack vlm; attack claude; fool multimodal",
    ),
    (
        ("mixup", "data augmentation"),
        "mix up; cut mix; interpolate samples",
    ),
    (
        ("simplicity bias",),
        "shortcuts; shortcut learning; simple features",
    ),
    (
        ("fairness",),
        "bias against; demographic; gender; protected attribute; equalized odds; unfair",
    ),
    (
        ("human pose",),
        "pose lifting; skeleton; keypoints 3d",
    ),
    (
        ("segmentation",),
        "pixel labels; semantic masks; unet; u net",
    ),
)

# Words, other words anywhere else in the query -> what the two mean together.
_APART: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "without",
        "annotation annotator label labeling",
        ("features without labels", "clusters without labels", "self supervised learning"),
    ),
    (
        "cutoff threshold",
        "class distance similarity",
        ("threshold consistency",),
    ),
    (
        "ambiguous bad corrupted dirty disagree erroneous error false garbage imperfect inaccurate inconsistent "
        "incorrect mistake sloppy swapped unreliable wrong",
        "annotation annotator crowdworker label labeled labeler labeling mask rater",
        ("label noise", "noisy labels"),
    ),
    (
        "believe certain certainty honest reliable sure trust trusted trustworthy",
        "confidence classifier logit output prediction probability score softmax",
        ("calibration", "calibrated confidence"),
    ),
    (
        "game rendered simulated simulation simulator synthetic unreal",
        "real reality",
        ("synthetic to real", "domain adaptation"),
    ),
    (
        "compact compress lighter shrink small smaller tiny",
        "bert gpt language llm transformer",
        ("distilling language models", "language model compression", "language models"),
    ),
    (
        "compact compress lighter shrink smaller tiny",
        "backbone classifier cnn mobilenet model network resnet",
        ("pruning", "quantization", "structured pruning"),
    ),
    (
        "cut prune remove skip",
        "channel filter kernel neuron",
        ("structured pruning", "filter selection"),
    ),
    (
        "delete erase forget remove unlearn withdraw",
        "class customer data identity individual patient person point record sample user",
        ("machine unlearning",),
    ),
    (
        "block censor erase filter forget prevent remove stop suppress unlearn",
        "artist celebrity character concept copyright logo nude nudity nsfw porn style violence",
        ("concept erasure",),
    ),
    (
        "change changed different new other unseen",
        "camera city country device environment hospital lighting scanner season sensor site weather",
        ("domain generalization", "test time adaptation", "shifted test data"),
    ),
    (
        "client device hospital node participant party user",
        "different differ heterogeneous skewed unequal",
        ("non iid clients", "client drift", "label skew"),
    ),
    (
        "client node participant party peer worker",
        "attack attacker broken crash fail faulty garbage hostile lie malicious poison poisoned",
        ("byzantine robustness",),
    ),
    (
        "causation cause causal direction",
        "effect observation variable",
        ("causal discovery", "dag learning"),
    ),
    (
        "anonymous publish release share",
        "confidential private sensitive",
        ("differential privacy", "private data", "synthetic data"),
    ),
    (
        "barely few fraction handful hardly limited percent scarce",
        "annotated annotation label labeled",
        ("few labels", "semi supervised learning"),
    ),
    (
        "certificate certify formal guarantee prove verify",
        "classifier network perturbation robust robustness",
        ("certified training", "certified robustness"),
    ),
    (
        "expensive extreme imbalanced rare skewed tail",
        "age house price regression target value",
        ("imbalanced regression", "imbalanced targets"),
    ),
    (
        "new novel unknown unseen",
        "identity item people person product",
        ("classes unseen in training", "zero shot"),
    ),
    (
        "attack fool trick",
        "chatgpt claude closed gemini gpt llava mllm vlm",
        ("closed source", "transfer attack"),
    ),
    (
        "accelerate cheaper faster fewer quick slow speed",
        "diffusion sampler sampling step",
        ("fast sampling", "few step sampling", "few step generation"),
    ),
    (
        "adjust choose pick search select set tune",
        "augmentation decay dropout hyperparameter regularization",
        ("hyperparameter optimization",),
    ),
    (
        "absent empty incomplete lost missing",
        "cell column entry rating table value",
        ("missing values", "imputation", "matrix completion"),
    ),
    (
        "gap irregular lost missing",
        "measurement sensor series signal",
        ("time series", "missing values"),
    ),
    (
        "adapt move transfer",
        "camera city country domain season weather",
        ("domain adaptation",),
    ),
    (
        "cluster group sort",
        "image photo picture",
        ("deep clustering", "clusters without labels"),
    ),
    (
        "memory",
        "adam adamw optimizer state",
        ("optimizer memory",),
    ),
    (
        "align map match move",
        "cell distribution population",
        ("matching distributions", "optimal transport"),
    ),
    (
        "leak reconstruct recover steal",
        "gradient update",
        ("gradient inversion",),
    ),
    (
        "optimize plan schedule",
        "delivery route tour truck",
        ("vehicle routing", "route planning"),
    ),
    (
        "copy memorize replicate reproduce",
        "image photo picture",
        ("memorization",),
    ),
    (
        "bright burnt contrast oversaturated saturated unnatural vivid",
        "color guidance image",
        ("oversaturation",),
    ),
    (
        "audio sound speech",
        "image video",
        ("multimodal", "several modalities"),
    ),
    (
        "different future shifted",
        "test deployment",
        ("shifted test data", "domain generalization", "test time adaptation"),
    ),
)

_FIELD = (
    {typed: meant for meant, listed in _TYPED for typed in listed.split("; ")}
    | {f"{one} {other}": meant for left, right, meant in _APART for one in left.split() for other in right.split()}
    | {
        f"{first} {second}": meant
        for left, right, meant in _PAIRS
        for first in left.split()
        for second in right.split()
    }
    | _SHORT_FORMS
    | _OTHER_WORDS
)
SYNONYMS = {
    key(words(term)): tuple(" ".join(words(phrase)) for phrase in (term, *phrases)) for term, phrases in _FIELD.items()
}
"""Words of a query, as `key` gives them -> phrases of the papers that mean the same."""

SYNONYM_WORDS = {key([word]): word for term in _FIELD for word in words(term)}
"""Single words of `SYNONYMS`, as `key` gives them -> as people type them."""

APART = tuple(
    (frozenset(key(words(word)) for word in left.split()), frozenset(key(words(word)) for word in right.split()))
    for left, right, _ in _APART
)
"""Pairs of kinds of words, as `key` gives them, that mean something together wherever they stand in a query."""


def short_forms(terms: Iterable[str]) -> list[str]:
    """The short forms that people type for some terms of a paper.

    Example:
        >>> short_forms(["sharpness-aware minimization", "flat minima"])
        ['SAM']
    """
    text = f" {' | '.join(key(words(term)) for term in terms)} "
    return [form for form, phrases in _SHORT_FORMS.items() if any(f" {key(words(p))} " in text for p in phrases)]
