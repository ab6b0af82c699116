"""Words of a text, and the known word that a misspelt one stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WORD = re.compile(r"[a-z0-9]+")
_BRITISH = re.compile(r"(?<=[a-z]{3})(?<!no)(?<!w)(?<!c)is(?=(e|ed|es|er|ers|ing|ation|ations)\b)")
_DOUBLED = re.compile(r"(label|model|channel|travel|cancel|signal)l(?=(ed|ing|er|ers)\b)")
_COLOUR = re.compile(r"\b(col|neighb|behavi|fav)our")
_ENDING = re.compile(r"(?<=[a-z]{3})(e|ed|es|s|y|ing|ion|ions|er|ers)$")


def words(text: str) -> list[str]:
    """The words of a text in lower case and American spelling, so that either spelling finds the other.

    Example:
        >>> words("Early-Learning Regularisation, unlabelled colours")
        ['early', 'learning', 'regularization', 'unlabeled', 'colors']
    """
    american = _COLOUR.sub(r"\1or", _DOUBLED.sub(r"\1", _BRITISH.sub("iz", text.lower())))
    return _WORD.findall(american)


def stem(word: str) -> str:
    """A word without its ending, as short words keep it; for comparing words, not for reading.

    Example:
        >>> [stem(word) for word in ("samples", "sampling", "sampler", "ode")]
        ['sampl', 'sampl', 'sampl', 'ode']
    """
    return _ENDING.sub("", word)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where none is near.

    Example:
        >>> nearest("adabelif", ["adamp", "adabelief", "saf"])
        'adabelief'
        >>> nearest("transformer", ["adamp", "saf"]) is None
        True
    """
    from rapidfuzz import process
    from rapidfuzz.distance import OSA

    found = process.extractOne(
        name, list(known), scorer=OSA.normalized_similarity, processor=str.lower, score_cutoff=0.7
    )
    return found[0] if found else None


def kin(word: str, known: Iterable[str]) -> list[str]:
    """The known words that a word is a part of, or shares its stem with.

    Example:
        >>> kin("saturated", ["oversaturation", "started"])
        ['oversaturation']
    """
    root = stem(word)
    return [other for other in known if (len(word) > 3 and other.startswith(word)) or (len(root) > 4 and root in other)]


def corrected(word: str, known: Mapping[str, int]) -> str | None:
    """The known word with the fewest slips of the finger to `word`, or None where none is near.

    Args:
        word: in lower case.
        known: word -> how often it occurs; of words equally near the more common one is taken.

    Example:
        >>> corrected("lables", {"labels": 3, "tables": 1})
        'labels'
        >>> corrected("saturated", {"started": 2}) is None
        True
    """
    from rapidfuzz.distance import OSA, JaroWinkler

    limit = 0 if len(word) < 4 or not word.isalpha() else 1 if len(word) < 8 else 2

    def slips(other: str) -> int:
        # The first letter is seldom the wrong one. A short word with one letter for another is mostly another word.
        if other[0] != word[0] or (len(word) == len(other) < 8 and sorted(word) != sorted(other)):
            return limit + 1
        return OSA.distance(word, other, score_cutoff=limit)

    near = [(slips(other), -JaroWinkler.similarity(word, other), -count, other) for other, count in known.items()]
    best = min(near, default=(limit + 1, 0.0, 0, ""))
    return best[3] if best[0] <= limit else None
