"""The small networks that the tasks train."""

from trimtab.nets.classifiers import Classifier, mlp, small_cnn
from trimtab.nets.decoder import Decoder

__all__ = ["Classifier", "Decoder", "mlp", "small_cnn"]
