"""What no shape, dtype or range allows is refused by the name of the argument, before anything is computed.

A call joins by one line in CALLS: what is called, the error, and the name that its message begins with. Calls that
change something that is held are those of `test_refusals`; here are the functions, and what is refused of a method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab import compress, domain, federated, finetune, robust, semisup, unlearning
from trimtab.ops.intervals import box_around

NAN, INF = float("nan"), float("inf")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z, Y = drawn(8, 5), torch.arange(8) % 3
IMAGES = drawn(4, 1, 6, 6).sigmoid()
PROBS = drawn(8, 4).softmax(1)
POSES, SEEN = drawn(4, 16, 3), drawn(6, 16, 2, seed=1)
CAMERA = torch.tensor([0.0, 0.0, 2.0, 2.0])
PIXELS, MAP = drawn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
ORDER = torch.arange(4)

with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    HEAD, FLAT, TWO = nn.Linear(5, 3), nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), nn.Linear(2, 3)
    CLUB = semisup.CLUB(5, 3)
    TABLE = semisup.TJEPA(4, [3], dim=8, num_layers=1, num_heads=2, predictor_dim=4)


class Patches(nn.Module):
    """Reconstructs nothing, and ranks all patches alike."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(*mask.shape, 9), torch.zeros(mask.shape)


def looks(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.flatten(1), x.flatten(2).mT


def tells(x: Tensor) -> tuple[Tensor, Tensor]:
    said = NET(x)
    return said[:, 0], said.argmax(1) != 0


def pose_rule() -> domain.PoseDA:
    lifter = nn.Sequential(nn.Flatten(), nn.Linear(32, 48), nn.Unflatten(1, (16, 3)))
    return domain.PoseDA(lifter, domain.PoseAugmenter(hidden=4), domain.PartDiscriminator(hidden=4))


def paste() -> domain.HardClassPaste:
    return domain.HardClassPaste(PIXELS, MAP, torch.rand(3), 1)


def table_loss(context: Tensor, targets: Tensor) -> Any:
    return TABLE.loss(Z[:, :4], Y[:, None], masks=semisup.ColumnMasks(context, targets))


GRADIENT = torch.tensor([1.0, 2.0], requires_grad=True)
UNEVEN = torch.tensor([[True, True, True, False], [True, False, False, False]])
EDGES = torch.tensor([[[0, 1], [1, 2]]])
COSTS = drawn(1, 3, 3), drawn(1, 2, 2)
TOO_FAR = Y + 9

CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # --- federated, compress, finetune, unlearning
    (lambda: federated.sureness(Z.to(torch.complex64)), TypeError, "logits"),
    (lambda: federated.flag_subspace(Z, tol=NAN), ValueError, "tol"),
    (lambda: federated.flag_aggregate(Z, tol=NAN), ValueError, "tol"),
    (lambda: federated.accuracy_frontier(np.full((2, 1, 2), 0.25), 0.1, 0.1, tol=INF), ValueError, "tol"),
    (lambda: federated.total_variation(IMAGES.numpy()), TypeError, "images"),
    (lambda: compress.lsq_quantize(Z, torch.tensor(1.0), 4, scale=NAN), ValueError, "scale"),
    (lambda: compress.fake_quantize(Z.numpy(), torch.tensor(1.0), torch.tensor(0.0), 4), TypeError, "x"),
    (lambda: compress.magnitude_mask(Z, 0.5, NAN), ValueError, "most"),
    (lambda: compress.boundary_loss(PROBS.numpy(), 4), TypeError, "entropy"),
    (lambda: compress.difference_entropy(Z, Z.numpy()), TypeError, "other"),
    (lambda: compress.gradient_disorder(Z.numpy()), TypeError, "gradients"),
    (lambda: compress.weight_distribution_loss([Z], kurtosis=NAN), ValueError, "kurtosis"),
    (lambda: compress.train_expert(HEAD, Z, Y, 1, momentum=NAN), ValueError, "momentum"),
    (lambda: compress.prepare_elastic(NET, IMAGES, ends=NAN), TypeError, "ends"),
    (lambda: finetune.annealed_weight_decay(INF, 0.05, 10), ValueError, "step"),
    (lambda: finetune.LoRAWeight(HEAD.weight, 1, A=np.ones((1, 5))), TypeError, "A"),
    (lambda: finetune.LoRAWeight(HEAD.weight, -1), ValueError, "r"),
    (lambda: finetune.SORSAWeight(HEAD.weight, 4), ValueError, "r"),
    (lambda: finetune.SoMAWeight(HEAD.weight, 1, alpha=NAN), ValueError, "alpha"),
    (lambda: finetune.nuclear_norm(Z.numpy()), TypeError, "matrix"),
    (lambda: finetune.keep_probability(Z, Z.numpy()), TypeError, "b"),
    (lambda: unlearning.LinearDatamodel(alpha=NAN), ValueError, "alpha"),
    (lambda: unlearning.LinearDatamodel(alpha=INF), ValueError, "alpha"),
    (lambda: unlearning.gradient_penalty(HEAD, Z[:0]), ValueError, "x"),
    (lambda: unlearning.ElasticPenalty(HEAD, np.ones(18)), TypeError, "importance"),
    (lambda: unlearning.bernoulli_kl(Z.numpy(), Z), TypeError, "logit_p"),
    (lambda: unlearning.membership_auc(Z[:, 0].numpy(), Z[:, 1]), TypeError, "members"),
    (lambda: unlearning.repulsion(Z[0].numpy()), TypeError, "v"),
    (lambda: unlearning.draw_tokens(PROBS.numpy()), TypeError, "probabilities"),
    (lambda: unlearning.preserve_gradient(Z.to(torch.complex64), Z), TypeError, "g_unlearn"),
    # --- domain
    (lambda: domain.neighbour_vote(Z[:, :3], Y[:, None].expand(8, 3), 3, NAN), ValueError, "temperature"),
    (lambda: domain.neighbour_vote(Z[:, :3], Y[:, None].expand(8, 3), 3, 0.0), ValueError, "temperature"),
    (lambda: domain.neighbour_vote(Z[:, :3], Y[:, None].expand(8, 3), 3, 0.1, -1.0), ValueError, "floor"),
    (lambda: domain.neighbour_vote(Z[:, :3], TOO_FAR[:, None].expand(8, 3), 3, 0.1), ValueError, "labels"),
    (
        lambda: domain.implicit_feature_augmentation(Z[:, :3], drawn(3, 2), torch.eye(2).expand(3, 2, 2), NAN),
        ValueError,
        "strength",
    ),
    (lambda: domain.ClassCovariance(3, 5)(Z, TOO_FAR), ValueError, "labels"),
    (lambda: domain.instance_statistics(IMAGES, eps=-1.0), ValueError, "eps"),
    (lambda: domain.standardize(IMAGES, eps=NAN), ValueError, "eps"),
    (lambda: domain.restyle(IMAGES, torch.zeros(1, 1, 1, 1), torch.ones(4, 1, 1, 1)), ValueError, "content"),
    (lambda: domain.style_spread(torch.rand(3, 2, 1, 1), eps=NAN), ValueError, "eps"),
    (lambda: domain.style_spread(np.ones((3, 2, 1, 1))), TypeError, "statistic"),
    (lambda: domain.fourier_augment(IMAGES, index=np.arange(4)), TypeError, "index"),
    (lambda: domain.fourier_augment(IMAGES, index=ORDER[:3]), ValueError, "index"),
    (lambda: domain.fourier_augment(IMAGES, index=ORDER + 1), ValueError, "index"),
    (lambda: domain.batch_color_jitter(IMAGES, factors=(1.0, NAN, 1.0)), ValueError, "factors"),
    (lambda: domain.BatchStyleViews()(IMAGES, index=[0, 1]), TypeError, "index"),
    (lambda: domain.BatchStyleViews()(IMAGES, index=torch.tensor([0, 4])), ValueError, "index"),
    (lambda: domain.adaptive_thresholds(torch.rand(2, 3, 4)), ValueError, "values"),
    (lambda: domain.adaptive_thresholds(np.ones((2, 3))), TypeError, "values"),
    (lambda: domain.EnhancedCanny(hysteresis=(1.5, 0.5)), ValueError, "hysteresis"),
    (lambda: domain.EdgePairLoss(FLAT)(IMAGES, Y[:4], edges=torch.zeros(4, 1, 6, 5)), ValueError, "edges"),
    (lambda: domain.ShiftValidator({"same": [lambda x, generator: x]}, seed=NAN), TypeError, "seed"),
    (lambda: domain.mean_by_condition(Z[:, 0], TOO_FAR, 3), ValueError, "conditions"),
    (lambda: domain.mean_by_condition(Z[:, 0], Y[:3], 3), ValueError, "values"),
    (lambda: domain.conditional_energy_distance(Z, Z, Y, TOO_FAR, 3), ValueError, "conditions"),
    (lambda: domain.conditional_energy_distance(Z, Z[:, :3], Y, Y, 3), ValueError, "a and b"),
    (lambda: domain.conditional_energy_distance(Z, Z, Y, Y.float(), 3), TypeError, "conditions"),
    (lambda: domain.translation_error(nn.Identity(), nn.Identity(), Z, Z[0]), ValueError, "x and y"),
    (lambda: domain.head_weights(np.ones(3)), TypeError, "gaps"),
    (lambda: domain.prototype_gap(Z, Z[:2], p=NAN), ValueError, "p must"),
    (lambda: domain.prototype_gap(Z.long(), Z[:2]), TypeError, "z and prototypes"),
    (lambda: domain.head_gradients(Z, Z[:, :3], TOO_FAR), ValueError, "targets"),
    (lambda: domain.hessian_gradient_product(GRADIENT.square().sum(), GRADIENT), TypeError, "params"),
    (lambda: domain.hessian_gradient_product(GRADIENT.square().sum(), iter([GRADIENT])), TypeError, "params"),
    (lambda: domain.hessian_gradient_product(GRADIENT.square().sum(), [GRADIENT, Z]), ValueError, "params"),
    (lambda: domain.HGPPenalty()([GRADIENT.square().sum()], GRADIENT), TypeError, "head"),
    (lambda: domain.hutchinson_diagonal(GRADIENT.sum(), [GRADIENT], signs=np.ones((1, 2))), TypeError, "signs"),
    (lambda: domain.region_regularization(PIXELS, MAP, ignore_index=NAN), TypeError, "ignore_index"),
    (lambda: paste()(PIXELS, MAP + 9), ValueError, "labels"),
    (lambda: paste()(PIXELS, MAP, donors=torch.tensor([[0], [7]])), ValueError, "donors"),
    (lambda: paste()(PIXELS, MAP, donors=torch.zeros(2, 1)), TypeError, "donors"),
    (lambda: domain.MaskedImageConsistency(FLAT, patch=2, fill=NAN), ValueError, "fill"),
    (
        lambda: domain.robust_surrogate(nn.CrossEntropyLoss(reduction="none"), HEAD, Z, Y, 1.0, start=Z[:2]),
        ValueError,
        "start",
    ),
    (lambda: domain.RSSLoss()(HEAD, Z, Y.float(), Z), TypeError, "targets"),
    (lambda: domain.excess_bound(5, 5, 5, alpha=0, mean_norm=1, sigma=1, delta="x"), TypeError, "delta"),
    (lambda: domain.project(POSES, CAMERA[:3]), ValueError, "x and camera"),
    (lambda: domain.project(torch.zeros(2, 3, 3), CAMERA), ValueError, "x must"),
    (lambda: domain.global_position_alignment(POSES, SEEN, CAMERA[:3]), ValueError, "camera"),
    (lambda: domain.global_position_alignment(POSES, SEEN, CAMERA.numpy()), TypeError, "camera"),
    (lambda: domain.global_position_alignment(POSES, SEEN, CAMERA, pairing=ORDER + 9), ValueError, "pairing"),
    (lambda: domain.global_position_alignment(POSES, SEEN, CAMERA, pairing=ORDER[:1]), ValueError, "pairing"),
    (lambda: domain.global_position_alignment(0 * POSES, SEEN, CAMERA), ValueError, "source"),
    (lambda: domain.mpjpe(POSES, POSES[:1]), ValueError, "found and truth"),
    (lambda: domain.PoseAugmenter(hidden=4)(POSES, noise=torch.zeros(1, 3, 48)), ValueError, "noise"),
    (lambda: domain.PartDiscriminator(hidden=0), ValueError, "hidden"),
    (lambda: domain.PartDiscriminator(hidden=4)(POSES[:, :, :2]), ValueError, "pose"),
    (lambda: pose_rule().generator_loss(POSES, SEEN, CAMERA, pairing=ORDER[:1]), ValueError, "pairing"),
    (lambda: domain.Skeleton(parents=(-1, 0, 1), mirrored=((1,),)), ValueError, "mirrored"),  # type: ignore[arg-type]
    (lambda: domain.Skeleton(parents=(-1, 0, 1), groups=((7,),)), ValueError, "groups"),
    # --- semisup
    (lambda: semisup.align_distribution(PROBS, torch.tensor([1.0, 0.0, 0.0, 0.0])), ValueError, "marginal"),
    (lambda: semisup.layerwise_reconstruction_loss([Z], [Z[:1]]), ValueError, "reconstructions"),
    (lambda: semisup.layerwise_reconstruction_loss([Z], [Z], NAN), ValueError, "weight"),
    (lambda: semisup.mlp_autoencoder(5, 0), ValueError, "in_dim"),
    (lambda: semisup.conv_autoencoder((1, 8, 8), -1), ValueError, "in_shape"),
    (lambda: semisup.match_graphs(*COSTS, EDGES + 9, EDGES), ValueError, "edges_s and edges_t"),
    (lambda: semisup.match_graphs(*COSTS, EDGES.float(), EDGES), TypeError, "edges_s and edges_t"),
    (lambda: semisup.HPM(Patches(), 3, 5).loss(IMAGES[:2], mask=UNEVEN), ValueError, "mask"),
    (lambda: semisup.HPM(Patches(), 3, 5).loss(IMAGES[:2], mask=UNEVEN.long()), TypeError, "mask"),
    (lambda: semisup.patchify(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), 2), TypeError, "x must"),
    (lambda: semisup.neighbor_graph(torch.rand(2, 1), torch.tensor([[1], [9]])), ValueError, "which"),
    (lambda: semisup.neighbor_graph(torch.rand(2, 2), torch.tensor([[1], [0]])), ValueError, "values"),
    (lambda: semisup.draw_positives(Y, torch.tensor([9])), ValueError, "index"),
    (lambda: semisup.draw_negatives(Z, Z > 9, 2, 9), ValueError, "pool"),
    (lambda: semisup.draw_negatives(Z, (Z > 9)[:1], 2, 3), ValueError, "cosines"),
    (lambda: semisup.draw_negatives(Z, Z, 2, 3), TypeError, "same"),
    (lambda: semisup.edge_edge_loss(Z, Z, filled=torch.ones(5)), ValueError, "filled"),
    (
        lambda: semisup.SSSLoss()(PIXELS, MAP + 9, PIXELS, (PIXELS,)),
        ValueError,
        "masks",
    ),
    (lambda: semisup.SSSLoss()(PIXELS, MAP.numpy(), PIXELS, (PIXELS,)), TypeError, "masks"),
    (lambda: semisup.PCSWPromptGenerator()(MAP - 1), ValueError, "masks"),
    (lambda: semisup.CoarseMaskHead(4, 1), ValueError, "num_classes"),
    (lambda: semisup.center_normalize(Z, Z[:1]), ValueError, "x and mean"),
    (lambda: semisup.shift_queries(Z[:0], Z), ValueError, "support"),
    (lambda: semisup.rectify_prototypes(Z[:3], torch.arange(3), Z.double(), 3), TypeError, "query"),
    (lambda: semisup.laplacian_bound_update(Z, np.eye(8), 0.5), TypeError, "graph"),
    (lambda: semisup.sp2ot(Z, None, 0.5, gamma="x"), ValueError, "gamma"),
    (lambda: semisup.sp2ot(Z, None, 0.5, epsilon=INF), ValueError, "epsilon"),
    (lambda: semisup.partial_cross_entropy(Z, np.ones((8, 5))), TypeError, "targets"),
    (lambda: semisup.gaussian_kl(Z, Z[:1]), ValueError, "mean and log_var"),
    (lambda: CLUB.learning_loss(Z, Z[:1, :3]), ValueError, "x and y"),
    (lambda: CLUB.upper_bound(Z, Z[:, :1]), ValueError, "y must"),
    (lambda: CLUB.upper_bound(Z, Z[:, :3], torch.arange(3)), ValueError, "permutation"),
    (lambda: semisup.distort_masks(MAP.numpy(), semisup.draw_weak(PIXELS)), TypeError, "masks"),
    (lambda: table_loss(torch.tensor([[0, 1]] * 8), torch.tensor([[[1]]] * 8)), ValueError, "masks"),
    (lambda: table_loss(torch.tensor([[0, 9]] * 8), torch.tensor([[[1]]] * 8)), ValueError, "masks"),
    (lambda: table_loss(torch.tensor([[0.0]] * 8), torch.tensor([[[1]]] * 8)), TypeError, "masks"),
    # --- robust
    (lambda: robust.boundary_attack(NET, IMAGES, Y[:4], Y[:4].float(), 0.1), TypeError, "y and target"),
    (lambda: robust.boundary_attack(NET, IMAGES, Y[:4], Y[:3], 0.1), ValueError, "x, y and target"),
    (lambda: robust.auto_pgd(tells, IMAGES, 0.1, start=IMAGES[:1]), ValueError, "start"),
    (lambda: robust.square_attack(NET, IMAGES, Y[:4], 0.1, share=NAN), ValueError, "share"),
    (lambda: robust.square_attack(NET, IMAGES, Y[:3], 0.1), ValueError, "y must"),
    (lambda: robust.crop_resized(IMAGES, torch.rand(3, 4)), ValueError, "x and boxes"),
    (lambda: robust.random_boxes(-1), ValueError, "batch"),
    (lambda: robust.random_boxes(2, scale=(0.5,)), ValueError, "scale"),  # type: ignore[arg-type]
    (lambda: robust.ensemble_weights(np.ones(3), None), TypeError, "scores"),
    (lambda: robust.feature_log_norm_loss(NET, IMAGES, eps=NAN), ValueError, "eps"),
    (lambda: robust.feature_log_norm_loss(NET, IMAGES, "conv"), TypeError, "layers"),
    (lambda: robust.GDUAP(NET, 0.1, prior="range", std=NAN), ValueError, "background"),
    (lambda: robust.is_propagation_invariant([Z], tol=NAN), ValueError, "tol"),
    (lambda: robust.worst_case_logits(NET, box_around(IMAGES, 0.1), Y[:4], 1), ValueError, "num_classes"),
    (lambda: robust.worst_case_logits(NET, box_around(IMAGES, 0.1), TOO_FAR[:4], 3), ValueError, "targets"),
    (lambda: robust.IBPLoss(0.1)(NET, IMAGES, TOO_FAR[:4]), ValueError, "targets"),
    (lambda: robust.zo_surrogate(Z, np.ones((8, 5))), TypeError, "z and gradient"),
    (lambda: robust.Certificate(Y, Z[:, 0]).accuracy(Y[:, None]), ValueError, "targets"),
    (lambda: robust.Certificate(Y, Z[:, 0]).accuracy(Y, NAN), ValueError, "radius"),
]

BOUNDED: dict[str, Callable[[Any], Any]] = {
    "single_step_adversary": lambda bounds: robust.single_step_adversary(NET, IMAGES, Y[:4], 0.1, bounds=bounds),
    "auto_attack": lambda bounds: robust.auto_attack(NET, IMAGES, Y[:4], 0.1, steps=1, bounds=bounds),
    "auto_pgd": lambda bounds: robust.auto_pgd(tells, IMAGES, 0.1, bounds=bounds),
    "boundary_attack": lambda bounds: robust.boundary_attack(NET, IMAGES, Y[:4], Y[:4], 0.1, bounds=bounds),
    "square_attack": lambda bounds: robust.square_attack(NET, IMAGES, Y[:4], 0.1, bounds=bounds),
    "fooling_rate": lambda bounds: robust.fooling_rate(NET, IMAGES[:1], IMAGES, bounds=bounds),
    "GDUAP": lambda bounds: robust.GDUAP(NET, 0.1, bounds=bounds),
    "FOAAttack": lambda bounds: robust.FOAAttack([looks], bounds=bounds),
    "propagation_tightness": lambda bounds: robust.propagation_tightness(NET, IMAGES, 0.1, bounds=bounds),
    "IBPLoss": lambda bounds: robust.IBPLoss(0.1, bounds=bounds),
}


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda number: f"{number} {CALLS[number][2]}")
def test_it_is_refused_by_name(number: int) -> None:
    call, error, name = CALLS[number]
    with pytest.raises(error, match=f"^{name}"):
        call()


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, NAN), (0.0,), ("a", "b")])
def test_bounds_out_of_order_are_refused_by_name(name: str, bounds: Any) -> None:
    with pytest.raises(ValueError, match="^bounds must be two finite numbers in order"):
        BOUNDED[name](bounds)


LABELLED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "ShrinkMatch": (
        lambda: semisup.ShrinkMatch(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)), nn.Linear(36, 3)),
        lambda rule: rule.loss(IMAGES, TOO_FAR[:4], IMAGES, IMAGES),
    ),
    "SimMatchV2": (
        lambda: semisup.SimMatchV2(
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)), nn.Linear(36, 3), Y, top_n=2, queue_size=8, dim=3
        ),
        lambda rule: rule.loss(IMAGES, TOO_FAR[:4], ORDER, IMAGES, IMAGES),
    ),
    "LegoGCD": (
        lambda: semisup.LegoGCD(
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)), 36, num_known=2, num_classes=3, hidden=8, projection=4
        ),
        lambda rule: rule.loss(IMAGES, IMAGES, TOO_FAR[:4], torch.ones(4, dtype=torch.bool)),
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_out_of_range_moves_neither_statistics_nor_memories(name: str) -> None:
    make, call = LABELLED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = make()
    before = {key: value.clone() for key, value in rule.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match="^targets must be in"):
        call(rule)
    after = rule.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_udim_refuses_a_label_out_of_range_and_moves_nothing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        head = nn.Linear(32, 3)
    rule = domain.UDIM(features, head, torch.optim.SGD([*features.parameters(), *head.parameters()], lr=0.1), 5)
    before = {key: value.clone() for key, value in features.state_dict().items()}
    with pytest.raises(ValueError, match="^targets must be in"):
        rule.step(IMAGES, TOO_FAR[:4])
    assert all(torch.equal(features.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("after", "error"),
    [({"0": 4, "1": 0}, ValueError), ({"0": 4, "1": 2.5}, TypeError), ({"1": 4, "1.0": 4}, ValueError)],
)
def test_a_refused_insertion_leaves_the_network_as_it_was(after: dict[str, Any], error: type[Exception]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU()))
    named = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match="^after must"):
        domain.insert_advstyle(model, after)
    assert [name for name, _ in model.named_modules()] == named
