"""Real data sets behind one loader: `load("fashion_mnist")` returns tensors and what they mean."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.data.adult import TableData as TableData
    from trimtab.data.adult import adult as adult
    from trimtab.data.captured_motions import MotionData as MotionData
    from trimtab.data.captured_motions import captured_motions as captured_motions
    from trimtab.data.catalogue import available as available
    from trimtab.data.catalogue import load as load
    from trimtab.data.catalogue import names as names
    from trimtab.data.cifar import human_labels as human_labels
    from trimtab.data.classification import ClassificationData as ClassificationData
    from trimtab.data.files import DataCorruptError as DataCorruptError
    from trimtab.data.files import DataNotFoundError as DataNotFoundError
    from trimtab.data.japanese_vowels import SeriesData as SeriesData
    from trimtab.data.japanese_vowels import japanese_vowels as japanese_vowels
    from trimtab.data.text import TextData as TextData
    from trimtab.data.text import python_sources as python_sources
    from trimtab.data.usps import usps_unlabelled as usps_unlabelled
else:
    import_lazily(__name__)
