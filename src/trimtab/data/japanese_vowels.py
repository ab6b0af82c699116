"""Japanese Vowels: nine speakers saying two vowels, as series of twelve coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.data.files import DataCorruptError, content, require

_FILES = {
    "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
_HINT = "the set in the format of the UEA archive, as the repository of sktime has it, sktime/datasets/data"


@dataclass(frozen=True)
class SeriesData:
    """Labelled series of several features and different lengths, with their own train and test part.

    Attributes:
        x_train, x_test: float32, NaN past the end of a series.
        y_train, y_test: int64 class labels in [0, num_classes).
        num_classes: number of classes.
        source: where the data came from, for the record.
    """

    x_train: Float[Tensor, "train steps features"]
    y_train: Int[Tensor, " train"]
    x_test: Float[Tensor, "test steps features"]
    y_test: Int[Tensor, " test"]
    num_classes: int
    source: str = ""


@cache
def japanese_vowels() -> SeriesData:
    """Japanese Vowels: 270 and 370 utterances by nine men, 7 to 29 steps of 12 linear-prediction coefficients each.

    Mineichi Kudo, Jun Toyama and Masaru Shimbo, "Japanese Vowels", UCI Machine Learning Repository, 1999. The class is
    the speaker.

    Raises:
        DataNotFoundError: a file is missing; says which file goes where.
        DataCorruptError: a file is truncated or altered.
    """
    paths = [require("japanese_vowels", file, sha, hint=_HINT) for file, sha in _FILES.items()]
    parts = [_read(path) for path in paths]
    steps = max(len(series) for part, _ in parts for series in part)
    (x_train, y_train), (x_test, y_test) = ((_padded(part, steps), torch.tensor(labels)) for part, labels in parts)
    return SeriesData(x_train, y_train, x_test, y_test, int(y_train.max()) + 1, source=str(paths[0].parent))


def _read(path: Path) -> tuple[list[Tensor], list[int]]:
    """Series (steps, features) and their labels: a line each, features between colons, the label, from 1, last."""
    lines = content(path).decode().splitlines()
    try:
        *features, labels = zip(*(line.split(":") for line in lines[lines.index("@data") + 1 :]), strict=True)
        series = [
            torch.tensor([[float(value) for value in feature.split(",")] for feature in one]).T
            for one in zip(*features, strict=True)
        ]
        return series, [int(label) - 1 for label in labels]
    except ValueError as error:
        raise DataCorruptError(f"{path} is not in the format of the UEA archive: {error}") from error


def _padded(series: list[Tensor], steps: int) -> Tensor:
    held = torch.full((len(series), steps, series[0].shape[1]), torch.nan)
    for place, one in enumerate(series):
        held[place, : len(one)] = one
    return held
