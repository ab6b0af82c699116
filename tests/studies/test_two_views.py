"""The control of ARL's study is ARL without its asymmetry."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.losses import AsymmetricLearning
from trimtab.studies.engine.study import Trial
from trimtab.studies.losses.arl import copies
from trimtab.studies.losses.arl.two_views import TwoViewNet, one_view, scaled_unimodal_losses


def gradients(make, progress: float) -> list[Tensor]:
    torch.manual_seed(0)
    model = TwoViewNet([6, 4], num_classes=3, width=5).double()
    views, y = [torch.randn(8, 6).double(), torch.randn(8, 4).double()], torch.arange(8) % 3
    make(model)(views, y, progress)
    return [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]


def arl_without_asymmetry(model: TwoViewNet):
    criterion = AsymmetricLearning(temperature=0.0, gamma=4.0)

    def objective(views, y, progress):
        criterion.set_epoch(int(100 * progress))
        logits, alone = model.fusion(criterion.modulate(model.features(views), model.fusion))
        criterion(logits, alone, y).backward()

    return objective


def control(model: TwoViewNet):
    return scaled_unimodal_losses(model, torch.optim.SGD(model.parameters(), lr=1.0), 4.0, torch.Generator())


def test_even_factors_are_arl_at_temperature_zero():
    for progress in (0.0, 0.5):
        for a, b in zip(gradients(control, progress), gradients(arl_without_asymmetry, progress), strict=True):
            torch.testing.assert_close(a, b)


def test_one_view_leaves_the_other_encoder_alone():
    def make(model: TwoViewNet):
        return one_view(model, torch.optim.SGD(model.parameters(), lr=1.0), 0.0, torch.Generator())

    torch.manual_seed(0)
    names = [name for name, _ in TwoViewNet([6, 4], num_classes=3, width=5).named_parameters()]
    for name, gradient in zip(names, gradients(make, 0.5), strict=True):
        assert bool(gradient.any()) == (not name.startswith("encoders.1"))


def test_one_view_is_judged_by_itself():
    found = copies.arms["clearer view alone"](Trial()).metrics
    assert found["accuracy"] == found["clear_accuracy"]
