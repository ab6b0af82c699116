from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.federated import Broadcast, FedAvg, FedLabel, pseudo_label_loss, select_pseudo_labels, simulate, sureness
from trimtab.federated.state_dicts import model_state

CRITERIA = ("variance", "entropy", "max_prob")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class TestSelection:
    def test_by_hand(self) -> None:
        far, near = torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([[1.0, 0.0, -1.0]])
        found = select_pseudo_labels(near, far, threshold=0.8)
        assert (found.labels.item(), found.from_local.item(), found.agree.item()) == (0, False, True)
        assert found.ratio.item() == pytest.approx(0.25)
        assert found.mask.item()
        assert torch.equal(found.other, near)
        assert not select_pseudo_labels(near, far, threshold=0.95).mask.item()
        turned = select_pseudo_labels(far, near, threshold=0.8)
        assert turned.from_local.item()
        assert torch.equal(turned.other, near)

    def test_the_threshold_is_on_the_chosen_one(self) -> None:
        # The local one is surer by its variance, and the received one by its largest probability.
        local = torch.tensor([[6.0, 6.0, -6.0]])
        received = torch.tensor([[5.0, 0.0, 0.0]])
        assert received.softmax(1).amax() > 0.95
        assert select_pseudo_labels(local, received, 0.9).from_local.item()
        assert not select_pseudo_labels(local, received, 0.9).mask.item()
        assert select_pseudo_labels(local, received, 0.9, teacher="global").mask.item()

    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_equal_teachers(self, criterion: str) -> None:
        logits = drawn(20, 4)
        found = select_pseudo_labels(logits, logits, 0.5, criterion)
        assert found.from_local.all()
        assert found.agree.all()
        torch.testing.assert_close(found.ratio, torch.ones(20, dtype=torch.float64))

    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_a_teacher_that_knows_nothing_is_not_chosen(self, criterion: str) -> None:
        nothing, logits = torch.zeros(20, 4, dtype=torch.float64), drawn(20, 4)
        assert not select_pseudo_labels(nothing, logits, 0.5, criterion).from_local.any()
        both = select_pseudo_labels(nothing, nothing, 0.5, criterion)
        assert both.from_local.all()
        assert both.ratio.isfinite().all()

    def test_of_two_classes_all_criteria_choose_alike(self) -> None:
        local, received = drawn(50, 2), drawn(50, 2, seed=1)
        chosen = [select_pseudo_labels(local, received, 0.6, c).from_local for c in CRITERIA]
        assert torch.equal(chosen[0], chosen[1])
        assert torch.equal(chosen[0], chosen[2])
        assert 0 < chosen[0].sum() < 50

    def test_ratios_are_shares(self) -> None:
        for criterion in CRITERIA:
            ratio = select_pseudo_labels(drawn(50, 5), drawn(50, 5, seed=1), 0.5, criterion).ratio
            assert 0 <= ratio.min() < ratio.max() <= 1

    def test_sureness(self) -> None:
        logits = drawn(6, 5)
        p = logits.softmax(1)
        torch.testing.assert_close(sureness(logits), logits.var(1))
        entropy = torch.distributions.Categorical(p).entropy()
        torch.testing.assert_close(sureness(logits, "entropy"), math.log(5) - entropy)
        torch.testing.assert_close(sureness(logits, "max_prob"), p.amax(1))

    def test_bad_arguments_are_named(self) -> None:
        logits = drawn(3, 4)
        for call, named in (
            (lambda: select_pseudo_labels(logits, logits[:2]), "logits_global"),
            (lambda: select_pseudo_labels(logits[:, :1], logits[:, :1]), "logits_local"),
            (lambda: select_pseudo_labels(logits, logits, -0.1), "threshold"),
            (lambda: select_pseudo_labels(logits, logits, 0.5, "margin"), "criterion"),
            (lambda: select_pseudo_labels(logits, logits, 0.5, teacher="both"), "teacher"),
        ):
            with pytest.raises(ValueError, match=named):
                call()


class TestLoss:
    local, received = 3 * drawn(8, 4), 3 * drawn(8, 4, seed=1)

    def test_by_the_formula(self) -> None:
        found, student = select_pseudo_labels(self.local, self.received, 0.5), drawn(3, 4, seed=2)
        index, log_p, total = torch.tensor([1, 4, 6]), student.log_softmax(1), 0.0
        for row, i in enumerate(index.tolist()):
            sure = self.local[i] if found.from_local[i] else self.received[i]
            other = self.received[i] if found.from_local[i] else self.local[i]
            total -= log_p[row, sure.argmax()]
            if other.argmax() == sure.argmax():
                q = other.softmax(0)
                total += 0.7 * other.var() / sure.var() * (q * (q.log() - log_p[row])).sum()
        torch.testing.assert_close(pseudo_label_loss(student, found, index, 0.7), total / 3)

    def test_only_agreement_pulls(self) -> None:
        found = select_pseudo_labels(self.local, self.received, 0.5)
        everyone, student = torch.arange(8), drawn(8, 4, seed=2)
        assert 0 < found.agree.sum() < 8
        plain = F.cross_entropy(student, found.labels, reduction="none")
        for i in everyone:
            one = pseudo_label_loss(student[i : i + 1], found, everyone[i : i + 1])
            assert (one > plain[i] + 1e-9) == found.agree[i]
        torch.testing.assert_close(pseudo_label_loss(student, found, everyone, 0.0), plain.mean())

    def test_a_student_like_the_other_teacher_is_not_pulled(self) -> None:
        found = select_pseudo_labels(self.local, self.local, 0.5)
        everyone = torch.arange(8)
        pulled = pseudo_label_loss(self.local, found, everyone)
        torch.testing.assert_close(pulled, pseudo_label_loss(self.local, found, everyone, 0.0))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def client(labeled: int = 10, unlabeled: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(labeled + unlabeled, 4, generator=seeded(seed))
    y = x[:, :3].argmax(1)
    y[labeled:] = -1
    return x, y


def update(algorithm: FedAvg, data: tuple[torch.Tensor, torch.Tensor]):
    model = network()
    return algorithm.client_update(model, Broadcast(model_state(model)), {}, data, generator=seeded())[0]


class TestClient:
    def test_moves_are_added_and_samples_counted(self) -> None:
        x, y = client()
        model, start = network(), model_state(network())
        found = update(FedLabel(0.5, 4, threshold=0.5, batch_size=50, consistency=0.7), (x, y))
        labels_alone = update(FedAvg(0.5, 4, batch_size=50), (x[:10], y[:10]))
        teacher, student = copy.deepcopy(model), copy.deepcopy(model)
        teacher.load_state_dict(labels_alone.params)
        with torch.no_grad():
            chosen = select_pseudo_labels(teacher(x[10:]), model(x[10:]), 0.5)
        kept = chosen.mask.nonzero().flatten()
        assert 2 <= len(kept) < 30
        pseudo_label_loss(student(x[10:][kept]), chosen, kept, 0.7).backward()
        for name, p in student.named_parameters():
            moved = labels_alone.params[name] - 0.5 * p.grad
            torch.testing.assert_close(found.params[name], moved)
            assert not torch.equal(start[name], moved)
        assert found.num_examples == 10 + len(kept)
        assert found.metrics == {
            "gradients": 5.0,
            "kept": len(kept) / 30,
            "from_local": pytest.approx(chosen.from_local[kept].float().mean().item()),
        }

    @pytest.mark.parametrize("options", [{"threshold": 1.0}, {"unlabeled_epochs": 0}])
    def test_switched_off_it_is_fedavg_on_the_labels(self, options: dict[str, float]) -> None:
        x, y = client()
        off, base = update(FedLabel(0.1, 2, **options), (x, y)), update(FedAvg(0.1, 2, 20), (x[:10], y[:10]))
        assert off.num_examples == base.num_examples == 10
        assert all(torch.equal(off.params[name], base.params[name]) for name in base.params)

    def test_with_all_labels_it_is_fedavg(self) -> None:
        data = [client(12, 0, seed) for seed in range(3)]
        ends = [
            simulate(a, network(), data, rounds=2, generator=seeded()).state.server.params
            for a in (FedLabel(0.1, 2), FedAvg(0.1, 2, 20))
        ]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    def test_rate_decay_and_weight_decay_hold_for_both_models(self) -> None:
        """At a rate near zero and a decay of weights that makes up for it, every step scales the weights by 0.9."""
        data, model = client(), network()
        start = model_state(model)
        options = {"threshold": 0.34, "batch_size": 50, "consistency": 0.0}
        shrinking = FedLabel(1e-7, 3, weight_decay=1e6, unlabeled_epochs=2, **options)
        for name, value in update(shrinking, data).params.items():
            torch.testing.assert_close(value, (0.9**3 + 0.9**2 - 1) * start[name], rtol=1e-4, atol=1e-6)
        still = FedLabel(0.5, 3, lr_decay=1e-9, unlabeled_epochs=2, **options)
        later = Broadcast(start, round=1)
        found = still.client_update(network(), later, {}, data, generator=seeded())[0]
        for name, value in found.params.items():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6)

    def test_the_strong_view_is_the_students_alone(self) -> None:
        seen = []

        def strong(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            seen.append(len(x))
            return torch.zeros_like(x)

        data = client()
        plain = update(FedLabel(0.5, 4, threshold=0.5, batch_size=50), data)
        blind = update(FedLabel(0.5, 4, threshold=0.5, batch_size=50, strong=strong), data)
        assert blind.metrics == plain.metrics
        assert seen == [plain.num_examples - 10]
        assert not torch.equal(blind.params["0.weight"], plain.params["0.weight"])

    def test_normalisation_keeps_a_variance(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        x, y = client()
        data = [(0.01 * x, y), (0.01 * x, y)]
        algorithm = FedLabel(0.1, 20, threshold=0.34, unlabeled_epochs=20)
        params = simulate(algorithm, model, data, rounds=2, generator=seeded()).state.server.params
        assert (params["0.running_var"] > 0).all()

    def test_a_client_needs_a_label(self) -> None:
        x, y = client()
        with pytest.raises(ValueError, match="labelled sample"):
            update(FedLabel(0.1), (x, torch.full_like(y, -1)))
        with pytest.raises(ValueError, match="data must hold as many"):
            update(FedLabel(0.1), (x, y[:3]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"consistency": -1.0}, "consistency"),
        ({"criterion": "margin"}, "criterion"),
        ({"teacher": "both"}, "teacher"),
        ({"unlabeled_epochs": -1}, "unlabeled_epochs"),
        ({"lr": -0.1}, "lr"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FedLabel(**{"lr": 0.1, **options})


@pytest.mark.parametrize(
    ("given", "criterion", "named"),
    [
        (torch.zeros(2, 3), "varaince", "criterion"),
        (torch.zeros(2, 1), "variance", "logits"),
        (torch.zeros(3), "variance", "logits"),
        (torch.zeros(2, 3, dtype=torch.long), "max_prob", "logits"),
    ],
)
def test_what_has_no_sureness_is_named(given: torch.Tensor, criterion: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must"):
        sureness(given, criterion)  # type: ignore[arg-type]


class Turning(nn.Module):
    """Its complex buffer turns in training, by as much as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.register_buffer("phase", torch.ones(1, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.phase += 1j * len(x)
        return self.out(x)


def test_complex_statistics_are_the_mean_of_students_and_local_teachers() -> None:
    y = torch.tensor([0, 1, -1, -1, -1])
    algorithm = FedLabel(lr=0.0, local_epochs=1, threshold=1e-3)
    model, draws = Turning(), torch.Generator().manual_seed(0)
    sent = algorithm.configure(algorithm.init_server(model, 1))
    update, _ = algorithm.client_update(model, sent, {}, (torch.randn(5, 4), y), generator=draws)
    assert update.params["phase"].item() == 1 + 2.5j  # 2 labelled samples, 3 without
