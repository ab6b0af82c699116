"""The small networks that the tasks train."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.nets.classifiers import Classifier as Classifier
    from trimtab.nets.classifiers import mlp as mlp
    from trimtab.nets.classifiers import small_cnn as small_cnn
    from trimtab.nets.decoder import Decoder as Decoder
    from trimtab.nets.denoising_mlp import DenoisingMLP as DenoisingMLP
    from trimtab.nets.gan import ImageDiscriminator as ImageDiscriminator
    from trimtab.nets.gan import ImageGenerator as ImageGenerator
    from trimtab.nets.plain_cnn import plain_cnn as plain_cnn
    from trimtab.nets.sequences import MADE as MADE
    from trimtab.nets.sequences import MaskedMLP as MaskedMLP
    from trimtab.nets.sequences import SequenceScore as SequenceScore
    from trimtab.nets.series import SeriesNet as SeriesNet
else:
    import_lazily(__name__)
