"""Real data sets behind one loader: `load("fashion_mnist")` returns tensors and what they mean."""

from trimtab.data.adult import TableData, adult
from trimtab.data.catalogue import available, load, names
from trimtab.data.cifar import human_labels
from trimtab.data.classification import ClassificationData
from trimtab.data.files import DataCorruptError, DataNotFoundError
from trimtab.data.text import TextData, python_sources

__all__ = [
    "ClassificationData",
    "DataCorruptError",
    "DataNotFoundError",
    "TableData",
    "TextData",
    "adult",
    "available",
    "human_labels",
    "load",
    "names",
    "python_sources",
]
