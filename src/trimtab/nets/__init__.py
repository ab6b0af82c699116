"""The small networks that the tasks train."""

from trimtab.nets.classifiers import Classifier, mlp, small_cnn

__all__ = ["Classifier", "mlp", "small_cnn"]
