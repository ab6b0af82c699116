from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.losses import AsymmetricLearning, SharedHeadFusion, asymmetric_coefficients, scale_gradient


def unimodal(size: int = 6, modalities: int = 2, classes: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, modalities, classes, generator=generator, dtype=torch.float64)


def network(dims: tuple[int, ...] = (7, 3), classes: int = 5) -> tuple[nn.ModuleList, SharedHeadFusion, list[Tensor]]:
    """Encoders, fusion, and inputs of the modalities."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoders = nn.ModuleList(nn.Sequential(nn.Linear(4, dim), nn.Tanh()) for dim in dims).double()
        fusion = SharedHeadFusion(nn.Linear(sum(dims), classes), dims).double()
        return encoders, fusion, [torch.randn(6, 4, dtype=torch.float64) for _ in dims]


TARGETS = torch.tensor([0, 4, 2, 1, 3, 3])


class TestScaleGradient:
    def test_forward_is_the_identity_and_backward_the_factor(self) -> None:
        x = torch.randn(3, 4, requires_grad=True)
        for factor in (1.7, torch.tensor(1.7), 0.0):
            (gradient,) = torch.autograd.grad(scale_gradient(x, factor).square().sum(), x)
            torch.testing.assert_close(gradient, factor * 2 * x.detach(), rtol=1e-6, atol=0)
        assert torch.equal(scale_gradient(x, 1.7), x)

    def test_scales_second_derivatives(self) -> None:
        x = torch.tensor(2.0, requires_grad=True)
        (first,) = torch.autograd.grad(scale_gradient(x, 3.0) ** 3, x, create_graph=True)
        torch.testing.assert_close(first, torch.tensor(3.0 * 3 * 4))
        (second,) = torch.autograd.grad(first, x)
        torch.testing.assert_close(second, torch.tensor(3.0 * 3.0 * 6 * 2))  # the inner gradient is scaled once more

    def test_keeps_half_precision(self) -> None:
        x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        scale_gradient(x, torch.tensor(1.5)).sum().backward()
        assert x.grad.tolist() == [1.5, 1.5]

    def test_compiles(self) -> None:
        x = torch.ones(2, requires_grad=True)
        compiled = torch.compile(lambda v, k: scale_gradient(v, k).square().sum(), fullgraph=True, backend="eager")
        (gradient,) = torch.autograd.grad(compiled(x, torch.tensor(1.5)), x)
        assert gradient.tolist() == [3.0, 3.0]

    def test_refuses_a_factor_per_element(self) -> None:
        with pytest.raises(ValueError, match="factor"):
            scale_gradient(torch.ones(2), torch.ones(2))


class TestCoefficients:
    def test_a_worked_example(self) -> None:
        # Uniform predictions, of equal entropy, from logits of norms 8 and 2: d = (.8, .2), w = (.5, .5).
        logits = torch.tensor([[[4.0, 4.0], [1.0, 1.0]]])
        expected = torch.tensor([0.8, 3.2]).softmax(0)
        torch.testing.assert_close(asymmetric_coefficients(logits), expected)
        torch.testing.assert_close(expected, torch.tensor([0.0832, 0.9168]), rtol=0, atol=5e-5)

    def test_two_modalities_as_the_authors_have_it(self) -> None:
        logits = unimodal()
        h = -(logits.softmax(2) * logits.log_softmax(2)).sum(2).mean(0)
        h = (h / h.sum()).clamp(min=0.3)
        w = (1 / h) / (1 / h).sum()
        d = logits.abs().mean(0).sum(1)
        d = d / d.sum()
        expected = torch.stack([d[1] * w[0], d[0] * w[1]]).mul(8).softmax(0)
        torch.testing.assert_close(asymmetric_coefficients(logits), expected)

    def test_an_uncertain_modality_is_favoured_less(self) -> None:
        # Equal norms, so that the entropy alone decides.
        logits = torch.tensor([[[2.0, -2.0], [2.0, 2.0]]])
        sure, unsure = asymmetric_coefficients(logits).tolist()
        # entropies .0901 and .6931: the first share is clamped at .3, the second is .885
        w = torch.tensor([1 / 0.3, 1 / 0.88497])
        torch.testing.assert_close(
            torch.tensor([sure, unsure]), (8 * 0.5 * w / w.sum()).softmax(0), rtol=1e-4, atol=1e-5
        )
        assert sure > unsure

    @pytest.mark.parametrize("modalities", [2, 3, 5])
    def test_alike_modalities_get_equal_shares(self, modalities: int) -> None:
        logits = unimodal(modalities=1).expand(-1, modalities, -1)
        torch.testing.assert_close(
            asymmetric_coefficients(logits), torch.full((modalities,), 1 / modalities, dtype=torch.float64)
        )

    @pytest.mark.parametrize("modalities", [2, 3, 4])
    def test_rests_where_dependence_is_inverse_to_entropy(self, modalities: int) -> None:
        # Constants added to logits move their norm and leave the entropy: make the norms inverse to it.
        logits = unimodal(modalities=modalities) * (1 + 0.2 * torch.arange(modalities))[:, None]
        entropy = torch.special.entr(logits.softmax(2)).sum(2).mean(0)
        shifted = logits - logits.amin(2, keepdim=True)  # non-negative: the norm is the sum
        needed = 1000 / entropy - shifted.sum(2).mean(0)
        rest = shifted + needed[:, None] / logits.shape[2]
        k = asymmetric_coefficients(rest, clamp=0.0)
        torch.testing.assert_close(k, torch.full_like(k, 1 / modalities))
        more = rest.clone()
        more[:, 0] += 50  # the first is relied on too much
        assert asymmetric_coefficients(more, clamp=0.0)[0] < 1 / modalities

    def test_the_clamp_lets_equal_shares_through(self) -> None:
        # A fixed bound of 0.3 would level all four; the bound here is 0.15.
        logits = torch.tensor([[3.0, 3.0], [5.5, 0.5], [4.0, 2.0], [3.5, 2.5]])[None]  # equal norms
        k = asymmetric_coefficients(logits)
        assert k[1] > k[2] > k[3] > k[0]

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 8), st.integers(2, 5), st.floats(-6, 6))
    def test_is_a_distribution_without_gradient(self, seed: int, size: int, modalities: int, log_scale: float) -> None:
        logits = (10**log_scale * unimodal(size, modalities, seed=seed)).requires_grad_()
        k = asymmetric_coefficients(logits)
        assert not k.requires_grad
        assert (k >= 0).all()
        torch.testing.assert_close(k.sum(), torch.ones((), dtype=torch.float64))
        order = torch.randperm(modalities, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(asymmetric_coefficients(logits[:, order]), k[order])

    def test_zero_and_extreme_logits_give_no_nan(self) -> None:
        for logits in (
            torch.zeros(3, 2, 4),
            1e4 * unimodal().float(),
            torch.zeros(3, 2, 4).index_fill(1, TARGETS[:1], 1e4),
        ):
            assert asymmetric_coefficients(logits).isfinite().all()

    @pytest.mark.parametrize("shape", [(3, 4), (3, 1, 4), (0, 2, 4)])
    def test_bad_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="unimodal_logits"):
            asymmetric_coefficients(torch.zeros(shape))


class TestSharedHeadFusion:
    def test_parts_add_up(self) -> None:
        encoders, fusion, views = network((7, 3, 2))
        logits, alone = fusion([encoder(view) for encoder, view in zip(encoders, views, strict=True)])
        torch.testing.assert_close(alone.sum(1) - 2 * fusion.head.bias, logits)

    def test_each_part_sees_its_own_modality(self) -> None:
        _, fusion, _ = network()
        a, b = torch.randn(6, 7).double(), torch.randn(6, 3).double()
        logits, alone = fusion([a, b])
        torch.testing.assert_close(logits, fusion.head(torch.cat([a, b], 1)))
        torch.testing.assert_close(alone[:, 0], fusion.head(torch.cat([a, torch.zeros_like(b)], 1)))
        torch.testing.assert_close(alone[:, 1], fusion.head(torch.cat([torch.zeros_like(a), b], 1)))

    def test_adds_no_parameters_and_no_state(self) -> None:
        head = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))
        fusion = SharedHeadFusion(head, [7, 3])
        assert [*fusion.state_dict()] == [f"head.{name}" for name in head.state_dict()]
        assert fusion([torch.zeros(6, 7), torch.zeros(6, 3)])[1].shape == (6, 2, 5)

    def test_bad_arguments_are_refused(self) -> None:
        for dims in ([10], [10, 0], [5, 4]):
            with pytest.raises(ValueError, match="dims"):
                SharedHeadFusion(nn.Linear(10, 5), dims)
        _, fusion, _ = network()
        for shapes in (((6, 3), (6, 7)), ((6, 7), (5, 3)), ((6, 7),), ((7,), (3,))):
            with pytest.raises(ValueError, match="features"):
                fusion([torch.zeros(shape).double() for shape in shapes])


class TestAsymmetricLearning:
    @pytest.mark.parametrize(("epoch", "gamma"), [(0, 1.0), (4, 1.0), (5, 3.0), (50, 3.0)])
    def test_loss_is_the_weighted_sum(self, epoch: int, gamma: float) -> None:
        alone = unimodal()
        logits = alone.sum(1)
        criterion = AsymmetricLearning(gamma=3.0)
        criterion.set_epoch(epoch)
        expected = F.cross_entropy(logits, TARGETS) + gamma * sum(
            F.cross_entropy(part, TARGETS) for part in alone.unbind(1)
        )
        torch.testing.assert_close(criterion(logits, alone, TARGETS), expected)
        torch.testing.assert_close(criterion.loss(logits, alone, TARGETS), expected)

    def test_reductions_agree(self) -> None:
        alone = unimodal()
        each, mean, total = (
            AsymmetricLearning(warmup_epochs=0, reduction=r)(alone.sum(1), alone, TARGETS)  # type: ignore[arg-type]
            for r in ("none", "mean", "sum")
        )
        assert each.shape == (6,)
        torch.testing.assert_close(each.mean(), mean)
        torch.testing.assert_close(each.sum(), total)

    @pytest.mark.parametrize("dims", [(7, 3), (4, 4, 4)])
    def test_encoder_gradients_are_scaled_in_the_same_step_and_the_heads_are_not(self, dims: tuple[int, ...]) -> None:
        encoders, fusion, views = network(dims)
        criterion = AsymmetricLearning(warmup_epochs=0)
        with torch.no_grad():
            fusion.head.weight[:, : dims[0]] *= 4  # so that the network leans on the first

        def step(modulated: bool) -> tuple[Tensor, Tensor, list[list[Tensor]], list[Tensor]]:
            features = [encoder(view) for encoder, view in zip(encoders, views, strict=True)]
            if modulated:
                features = criterion.modulate(features, fusion)
            logits, alone = fusion(features)
            value = criterion(logits, alone, TARGETS)
            for module in (encoders, fusion):
                module.zero_grad()
            value.backward()
            own = [[p.grad.clone() for p in encoder.parameters()] for encoder in encoders]
            return value.detach(), alone.detach(), own, [p.grad.clone() for p in fusion.parameters()]

        plain, scaled = step(False), step(True)
        assert torch.equal(scaled[0], plain[0])
        k = asymmetric_coefficients(plain[1])
        assert k[0] < k[1] - 0.1
        for factor, before, after in zip(1 + k, plain[2], scaled[2], strict=True):
            torch.testing.assert_close(after, [factor * gradient for gradient in before])
        torch.testing.assert_close(scaled[3], plain[3])

    def test_the_modulation_can_be_switched_off(self) -> None:
        # At temperature 0 all modalities are scaled alike.
        _, fusion, _ = network()
        assert AsymmetricLearning(temperature=0.0).coefficients(unimodal()).tolist() == [0.5, 0.5]
        criterion = AsymmetricLearning(warmup_epochs=2)
        criterion.set_epoch(1)
        features = [torch.randn(6, 7).double(), torch.randn(6, 3).double()]
        kept = criterion.modulate(features, fusion)
        assert all(one is other for one, other in zip(kept, features, strict=True))

    def test_maps_before_pooling_may_be_modulated(self) -> None:
        _, fusion, _ = network()
        maps = [torch.randn(6, dim, 2, 2).double().requires_grad_() for dim in fusion.dims]

        def pooled(features: list[Tensor]) -> tuple[Tensor, Tensor]:
            return fusion([part.mean((2, 3)) for part in features])

        criterion = AsymmetricLearning(warmup_epochs=0)
        _, alone = pooled(criterion.modulate(maps, pooled))
        alone.sum().backward()
        k = criterion.coefficients(alone)
        _, untouched = pooled([part.detach().requires_grad_() for part in maps])
        torch.testing.assert_close(alone, untouched)
        expected = (1 + k[0]) * fusion.head.weight[:, :7].sum(0) / 4
        torch.testing.assert_close(maps[0].grad[0, :, 0, 0], expected)

    def test_an_unknown_epoch_is_refused(self) -> None:
        criterion = AsymmetricLearning()
        with pytest.raises(RuntimeError, match="set_epoch"):
            criterion(unimodal().sum(1), unimodal(), TARGETS)
        with pytest.raises(ValueError, match="epoch"):
            criterion.set_epoch(-1)

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"temperature": -1.0}, "temperature"),
            ({"gamma": -1.0}, "gamma"),
            ({"clamp": 0.5}, "clamp"),
            ({"warmup_epochs": -1}, "warmup_epochs"),
            ({"reduction": "max"}, "reduction"),
        ],
    )
    def test_bad_options_are_refused_by_name(self, options: dict[str, object], name: str) -> None:
        with pytest.raises(ValueError, match=name):
            AsymmetricLearning(**options)  # type: ignore[arg-type]

    def test_unimodal_logits_of_other_classes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="unimodal_logits"):
            AsymmetricLearning(warmup_epochs=0)(unimodal().sum(1)[:, :4], unimodal(), TARGETS.clamp(max=3))
