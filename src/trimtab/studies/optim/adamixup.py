"""Does a learned mixing policy keep mixtures off the data, and classify better than MixUp?"""

from __future__ import annotations

from trimtab import optim
from trimtab.studies.mixing import MixUpRule, Parts, WholeInterval
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.manifold_intrusion import ManifoldIntrusion
from trimtab.studies.tasks.mixup_images import MixupImages

images = MixupImages()
line = ManifoldIntrusion()


def mixup_uniform(parts: Parts) -> MixUpRule:
    """MixUp with uniform weights."""
    return MixUpRule(parts, alpha=1.0)


def mixup_near(parts: Parts) -> MixUpRule:
    """MixUp whose mixtures mostly lie near a sample."""
    return MixUpRule(parts, alpha=0.2)


def adamixup(parts: Parts) -> optim.AdaMixUp:
    """AdaMixUp as released: the policy sees an average of the pair under random gates."""
    policy = optim.MixPolicy(parts.trunk(1), parts.feature_dim)
    return optim.AdaMixUp(parts.trunk(1), parts.feature_dim, parts.num_classes, policy)


def adamixup_pairs(parts: Parts) -> optim.AdaMixUp:
    """AdaMixUp whose policy sees the pair itself."""
    policy = optim.MixPolicy(parts.trunk(2), parts.feature_dim, gated=False)
    return optim.AdaMixUp(parts.trunk(1), parts.feature_dim, parts.num_classes, policy)


def no_policy(parts: Parts) -> optim.AdaMixUp:
    """AdaMixUp with all but its policy: uniform weights, real samples in the batch, and the discriminator."""
    return optim.AdaMixUp(parts.trunk(1), parts.feature_dim, parts.num_classes, WholeInterval())


study = Study(
    paper="adamixup",
    arms={
        "no mixing": images.train(),
        "MixUp 0.2": images.train(rule=mixup_near),
        "MixUp 1": images.train(rule=mixup_uniform),
        "AdaMixUp, no policy": images.train(rule=no_policy),
        "AdaMixUp": images.train(rule=adamixup),
        "no mixing, line": line.train(),
        "MixUp 0.2, line": line.train(rule=mixup_near),
        "MixUp 1, line": line.train(rule=mixup_uniform),
        "AdaMixUp, no policy, line": line.train(rule=no_policy),
        "AdaMixUp, gated, line": line.train(rule=adamixup),
        "AdaMixUp, line": line.train(rule=adamixup_pairs),
    },
    claims=[
        Claim("AdaMixUp, line", beats="MixUp 1, line", on="test_accuracy", by=0.05),
        Claim("AdaMixUp, line", beats="AdaMixUp, no policy, line", on="test_accuracy"),
        Claim("AdaMixUp, line", below="AdaMixUp, no policy, line", on="intruding"),
        Claim("AdaMixUp", beats="MixUp 1", on="test_accuracy"),
        Claim("AdaMixUp", beats="MixUp 0.2", on="test_accuracy"),
        Claim("AdaMixUp", beats="no mixing", on="test_accuracy"),
        Claim(
            "AdaMixUp",
            below="no mixing",
            on="seconds_per_step",
            times=1 / 3,
            text="AdaMixUp: a step takes no more than 3 times the baseline's",
        ),
    ],
    plot=["test_accuracy"],
    notes=(
        "A small CNN on five thousand images for 20 epochs, and an MLP on three clusters in a line with labels 0, 1, "
        "0, of which the middle one has a tenth of the samples. Adam at 0.001, the authors' choice for their CNN, and "
        "equal steps for every arm. On the line the policy sees the pair itself; under the release's random gates (the "
        "arm 'gated') it can hardly tell which clusters it is given. 'No policy' is AdaMixUp with uniform weights. "
        "Step times are processor time on one thread."
    ),
)
