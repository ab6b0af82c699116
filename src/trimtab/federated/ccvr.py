r"""CCVR: after federated training, refit the classifier alone on features drawn from the merged class Gaussians.

Where clients hold different classes, the last layer suffers most. Once training is done each client sends the mean and
the scatter of its features, class by class; the server merges them exactly, draws virtual features and trains the head
on them, all classes alike. One exchange more, on top of any algorithm; the rest of the network does not change.

$$
z = f(x), \qquad \mu_c = \frac{1}{N_c} \sum_k N_{c,k}\,\mu_{c,k}, \qquad
\Sigma_c = \frac{1}{N_c - 1} \sum_k \Big[ (N_{c,k} - 1)\,\Sigma_{c,k} + N_{c,k}\,(\mu_{c,k} - \mu_c)(\mu_{c,k} -
\mu_c)^\top \Big]
$$

$$
\min_{W, b}\; \sum_c \sum_{m=1}^{M} -\log \operatorname{softmax}_c (W \tilde z_{c,m} + b), \qquad
\tilde z_{c,m} \sim \mathcal N(\mu_c, \Sigma_c)
$$

Reference:
    Mi Luo, Fei Chen, Dapeng Hu, Yifan Zhang, Jian Liang, Jiashi Feng: No Fear of Heterogeneity: Classifier Calibration
    for Federated Learning with Non-IID Data. NeurIPS 2021, arXiv 2106.05001. Built from its abstract and the formulas
    of a public port, which trains the head at rate 1e-3 on 2000 draws a class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.federated.heads import features_of, head_of
from trimtab.federated.local_training import LocalSGD, loss_gradient
from trimtab.federated.moments import ClassMoments, sample_virtual
from trimtab.federated.protocol import Algorithm, Broadcast, ClientState, ServerState, Update
from trimtab.ops.arguments import integer, real_problem


class CCVR(Algorithm):
    """Any federated algorithm, with the classifier calibrated at the end (`finish` runs the exchange).

    Args:
        base: trains the model; it must not have a final exchange of its own.
        per_class: virtual features of each class (M).
        epochs: passes over the virtual features; 0 leaves the head as it is.
        lr: learning rate of the head.
        batch_size: virtual features in a step.
        momentum, weight_decay: of the head's SGD.
        clamp: raise negative entries of virtual features to 0, as those of a network with a rectifier before its head
            are.
        head: name of the model's last layer, a linear one.

    Raises:
        ValueError: an argument is out of range, or `base` has a final exchange.

    Example:
        >>> from trimtab.federated import CCVR, FedAvg, finish, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> algorithm = CCVR(FedAvg(lr=0.1), per_class=100, head="2")
        >>> history = simulate(algorithm, model, clients, rounds=2)
        >>> state = finish(algorithm, model, clients, history.state)
    """

    has_final_exchange: ClassVar[bool] = True

    def __init__(
        self,
        base: Algorithm,
        *,
        per_class: int = 500,
        epochs: int = 10,
        lr: float = 0.01,
        batch_size: int = 50,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clamp: bool = False,
        head: str = "head",
    ) -> None:
        if base.has_final_exchange:
            raise ValueError(f"base must have no final exchange of its own, got {type(base).__name__}")
        self.base = base
        self.per_class = integer("per_class", per_class)
        self.epochs = integer("epochs", epochs, 0)
        self.fit = LocalSGD(
            lr=lr, epochs=max(1, epochs), batch_size=batch_size, momentum=momentum, weight_decay=weight_decay
        )
        self.clamp = clamp
        self.head = head

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        head_of(model, self.head)
        return self.base.init_server(model, num_clients)

    def init_client(self, model: nn.Module, data: Any) -> ClientState:
        return self.base.init_client(model, data)

    def configure(self, server: ServerState) -> Broadcast:
        return self.base.configure(server)

    def client_update(
        self, model: nn.Module, broadcast: Broadcast, client: ClientState, data: Any, *, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        return self.base.client_update(model, broadcast, client, data, generator=generator)

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        return self.base.aggregate(server, updates)

    def client_report(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> Update:
        """The moments of the client's features; classes that it lacks are told by counts of 0."""
        model.load_state_dict(broadcast.params)
        x, y = data
        features = features_of(model, x, self.head)
        moments = ClassMoments.from_features(features, y, head_of(model, self.head).out_features)
        return Update({}, len(y), moments.tensors())

    def finalize(
        self, model: nn.Module, server: ServerState, reports: Sequence[Update], *, generator: torch.Generator
    ) -> ServerState:
        """The server with the calibrated head."""
        model.load_state_dict(server.params)
        moments = ClassMoments.merge([ClassMoments.from_tensors(report.extras) for report in reports])
        features, targets = sample_virtual(moments, self.per_class, generator=generator)
        if self.clamp:
            features = features.clamp_min(0)
        head = head_of(model, self.head)
        calibrated = self.calibrate(head, features, targets, present=moments.counts > 0, generator=generator)
        own = {f"{self.head}.{name}": value for name, value in calibrated.items()}
        return replace(server, params={**server.params, **own})

    def calibrate(
        self,
        head: nn.Linear,
        features: Float[Tensor, "drawn dim"],
        targets: Int[Tensor, " drawn"],
        *,
        present: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """A head trained on from where it is; rows of classes that nobody has stay as they are.

        Args:
            head: left as it was.
            features, targets: virtual, or real for a comparison.
            present: which classes have samples.
            generator: decides the order.
        """
        if problem := real_problem(features=features, targets=targets, present=present):
            raise TypeError(problem)
        before = {name: value.detach().clone() for name, value in head.state_dict().items()}
        fitted = copy.deepcopy(head).requires_grad_()  # a new layer would draw from torch's global generator
        rows = {name: present.view(-1, *[1] * (value.ndim - 1)) for name, value in before.items()}

        def of_present(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
            return [slope * mask for slope, mask in zip(loss_gradient(loss, params), rows.values(), strict=True)]

        if self.epochs:
            self.fit.train(fitted, (features, targets), generator=generator, gradient=of_present)
        after = fitted.state_dict()
        return {name: torch.where(mask, after[name], before[name]) for name, mask in rows.items()}
