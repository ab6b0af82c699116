"""The server and the client of a round, around encoders of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.federated.creamfl.contrast import (
    Representations,
    Weighting,
    client_contrast,
    distillation,
    fuse,
    represent,
    two_modalities,
)
from trimtab.ops.arguments import integer, non_negative, one_of, positive


class _Party:
    """Encoders and what is remembered within a round: dicts of tensors by modality, named in `_remembered`."""

    _remembered: tuple[str, ...] = ()

    def __init__(self, encoders: Mapping[str, nn.Module], allowed: tuple[int, ...]) -> None:
        if len(encoders) not in allowed:
            raise ValueError(f"encoders must be of {' or '.join(map(str, allowed))} modalities, got {sorted(encoders)}")
        self.encoders = dict(encoders)
        for part in self._remembered:
            setattr(self, part, {})

    def parameters(self) -> list[nn.Parameter]:
        """Of all encoders, for an optimizer."""
        return [p for encoder in self.encoders.values() for p in encoder.parameters()]

    def features(self, x: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch dim"]]:
        """Representations of length 1 of a batch, which gradients pass; modalities without an encoder are passed by.

        Raises:
            ValueError: `x` lacks a modality.
        """
        return {name: F.normalize(self.encoders[name](part), dim=1) for name, part in self._of(x).items()}

    def _represent(self, public: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        return {name: represent(self.encoders[name], part, batch_size) for name, part in self._of(public).items()}

    def _of(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.encoders.keys() <= x.keys():
            raise ValueError(f"inputs must have the modalities {sorted(self.encoders)}, got {sorted(x)}")
        return {name: x[name] for name in self.encoders}

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, to go on in the middle of a round; the encoders have state dicts of their own."""
        return {f"{part}.{name}": value for part in self._remembered for name, value in getattr(self, part).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: a name is none that `state_dict` gives.
        """
        found: dict[str, dict[str, Tensor]] = {part: {} for part in self._remembered}
        for key, value in state.items():
            part, _, name = key.partition(".")
            if part not in found:
                raise ValueError(f"state must have names that start with {sorted(found)}, got {key!r}")
            found[part][name] = value
        for part, held in found.items():
            setattr(self, part, held)


class CreamFLServer(_Party):
    """The server: shares representations of the public pairs, and learns from what clients send back.

    Args:
        encoders: modality -> network to representations, of two modalities; trained in place.
        weighting: of clients, "contrast" or "mean" (see `fuse`).
        weight: of the distillation.
        chunk: see `contrastive_weights`.

    Attributes:
        shared: modality -> what was shared last.
        fused: modality -> what the clients said together, until the next `share`.

    Raises:
        ValueError: there are not two modalities, or an argument is out of range.

    Example:
        >>> import torch
        >>> server = CreamFLServer({"image": nn.Linear(6, 4), "text": nn.EmbeddingBag(10, 4)})
        >>> client = CreamFLClient({"text": nn.EmbeddingBag(10, 4)})
        >>> public = {"image": torch.randn(8, 6), "text": torch.randint(10, (8, 5))}
        >>> client.begin(server.share(public), public)
        >>> # ... here the client trains on its own data
        >>> batch, index = {name: x[:3] for name, x in public.items()}, torch.arange(3)
        >>> client.step(batch, index)["total"].backward()
        >>> server.receive([client.upload(public)])
        >>> server.step(batch, index)["total"].backward()
    """

    shared: dict[str, Tensor]
    fused: dict[str, Tensor]
    _remembered = ("shared", "fused")

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        *,
        weighting: Weighting = "contrast",
        weight: float = 0.3,
        chunk: int = 4096,
    ) -> None:
        super().__init__(encoders, (2,))
        self.weighting: Weighting = one_of("weighting", weighting, ("contrast", "mean"))
        self.weight, self.chunk = non_negative("weight", weight), integer("chunk", chunk)

    def share(self, public: Mapping[str, Tensor], batch_size: int = 512) -> dict[str, Float[Tensor, "pairs dim"]]:
        """Representations of all pairs, which clients are sent; what came from them before is forgotten."""
        self.shared, self.fused = self._represent(public, batch_size), {}
        return dict(self.shared)

    def receive(self, uploads: Sequence[Representations]) -> None:
        """Fuse what clients have sent, in the order of clients.

        Raises:
            ValueError: nothing was shared, or see `fuse`.
        """
        if not self.shared:
            raise ValueError("uploads must come after share, which was not called")
        self.fused = fuse(uploads, self.shared, self.weighting, self.chunk)

    def step(self, x: Mapping[str, Tensor], index: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """The loss of a batch of public pairs, the inputs and which pairs they are: "distillation", and "total".

        Raises:
            ValueError: no client has sent anything, or see `distillation`.
        """
        if not self.fused:
            raise ValueError("step must come after receive with the upload of a client, of which there was none")
        loss = distillation(self.features(x), self.fused, index, self.weight)
        return {"distillation": loss, "total": loss}


class CreamFLClient(_Party):
    """A client: is pulled to what the server has shared, and sends back representations of the same pairs.

    Args:
        encoders: modality -> network to representations, of one modality or of both; trained in place.
        temperature: divides inner products.
        weight: of the sum of both contrasts.

    Attributes:
        shared: modality -> what the server has sent.
        old: modality -> representations when the round began.

    Raises:
        ValueError: there are no encoders or more than two, or an argument is out of range.
    """

    shared: dict[str, Tensor]
    old: dict[str, Tensor]
    _remembered = ("shared", "old")

    def __init__(self, encoders: Mapping[str, nn.Module], *, temperature: float = 0.5, weight: float = 0.5) -> None:
        super().__init__(encoders, (1, 2))
        self.temperature, self.weight = positive("temperature", temperature), non_negative("weight", weight)

    def begin(self, shared: Representations, public: Mapping[str, Tensor], batch_size: int = 512) -> None:
        """Start a round, before any training: keep what the server sends, and one's own representations.

        Raises:
            ValueError: `shared` has not two modalities, or lacks one of the client's.
        """
        two_modalities(shared, self.encoders)
        self.shared, self.old = dict(shared), self._represent(public, batch_size)

    def step(self, x: Mapping[str, Tensor], index: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """The losses of a batch of public pairs, the inputs and which pairs they are; see `client_contrast`.

        Raises:
            ValueError: no round has begun, or see `client_contrast`.
        """
        if not self.shared:
            raise ValueError("step must come after begin, which was not called")
        z = self.features(x)
        return client_contrast(z, self.shared, self.old, index, temperature=self.temperature, weight=self.weight)

    def upload(self, public: Mapping[str, Tensor], batch_size: int = 512) -> dict[str, Float[Tensor, "pairs dim"]]:
        """Representations of all pairs, which the server is sent."""
        return self._represent(public, batch_size)
