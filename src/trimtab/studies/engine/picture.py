"""A picture of what a run made: a grid of samples, or how thickly points lie in the plane."""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 128 * 128
"""Pixels a picture may have, so that a paper's results stay small."""
SHOWN = (8, 4)
"""Of how many contestants pictures are kept and drawn: at first, and further on."""


@dataclass(frozen=True)
class Picture:
    """A grey image, small enough to stand in a file of results.

    Attributes:
        height: in pixels.
        width: in pixels.
        data: the pixels row by row, a byte each, deflated, in base64.
    """

    height: int
    width: int
    data: str

    @classmethod
    def of(cls, image: Float[Tensor, "height width"]) -> Picture:
        """A picture of an image with values in [0, 1], 1 is white; values beyond are cut off, NaN is black.

        Raises:
            ValueError: it is not one grey image of at most 16,384 pixels.

        Example:
            >>> Picture.of(torch.tensor([[0.0, 0.5, 2.0]])).pixels().tolist()
            [[0, 128, 255]]
        """
        if image.ndim != 2 or not 0 < image.numel() <= LARGEST:
            got = tuple(image.shape)
            raise ValueError(f"image must have shape (height, width), at most {LARGEST} pixels, got {got}")
        grey = (image.detach().cpu().double().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
        packed = zlib.compress(grey.numpy().tobytes(), 9)
        return cls(len(grey), grey.shape[1], base64.b64encode(packed).decode("ascii"))

    @classmethod
    def grid(cls, images: Float[Tensor, "count height width"], columns: int = 10) -> Picture:
        """A picture of images of one size, values in [0, 1], row by row with a line of grey between them.

        Example:
            >>> picture = Picture.grid(torch.zeros(20, 8, 8))
            >>> picture.height, picture.width
            (17, 89)
        """
        count, height, width = images.shape
        rows = math.ceil(count / columns)
        sheet = torch.full((rows * (height + 1), columns * (width + 1)), 0.5)
        for place, image in enumerate(images):
            top, left = place // columns * (height + 1), place % columns * (width + 1)
            sheet[top : top + height, left : left + width] = image
        return cls.of(sheet[:-1, :-1])

    @classmethod
    def density(cls, points: Float[Tensor, "count 2"], low: float, high: float, side: int = 64) -> Picture:
        """How thickly points lie in the square from `low` to `high`: black where most do; the second axis points up.

        Example:
            >>> Picture.density(torch.tensor([[0.9, 0.9]]), -1.0, 1.0, side=2).pixels().tolist()
            [[255, 0], [255, 255]]
        """
        edges = torch.linspace(low, high, side + 1, dtype=torch.float64)
        counts = torch.histogramdd(points.detach().cpu().double(), [edges, edges]).hist
        return cls.of(1 - (counts / counts.max().clamp_min(1)).sqrt().T.flip(0))

    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The image, of shape (height, width), 255 is white."""
        flat = np.frombuffer(zlib.decompress(base64.b64decode(self.data), bufsize=LARGEST), dtype=np.uint8)
        return flat.reshape(self.height, self.width)
