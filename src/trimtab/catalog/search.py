"""Search in words: what a practitioner calls a problem, and the papers that are about it.

A query is taken apart into concepts: a word, or words that mean one thing to the field ("SAM", "wrong labels"), each
with the phrases that papers use for it. SQLite's full-text index says which papers have which concept and how much of
it, in their tables or in the first lines of their modules. Papers with parts that can be used come before papers that
are only planned.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from trimtab.catalog.names import owners
from trimtab.catalog.papers import PACKAGE, Paper, read_papers
from trimtab.catalog.spelling import corrected, kin, words
from trimtab.catalog.synonyms import APART, FAINT_WORDS, STOP_WORDS, SYNONYM_WORDS, SYNONYMS, key

# Column -> weight. A paper's claim is left out: it names what the method is compared with.
_WEIGHTS = {"slug": 4, "title": 3, "keywords": 3, "helps": 3, "summary": 1, "names": 1, "area": 1, "authors": 1}
_LONGEST = max(len(term.split()) for term in SYNONYMS)
# The share of a query's information that a paper must have to be found at all.
_COVERED = 0.4
# What a word that nearly every paper could use ("data") counts beside another, and a word that no paper has beside one
# that the field has a name for: "Lion optimizer" is about optimizers.
_FAINT, _FOREIGN = 0.1, 0.3
# How much of a query a word tells that the field has no name for, beside one that it has.
_COMMON = 0.6
# What a phrase counts that only the module of a paper has, beside one that stands in the paper's table: for its score,
# and for how much of the query it has.
_TOLD, _TOLD_OF = 0.5, 0.7
# A usable paper comes first where it has nearly as much of the query as any other and is not far behind in score;
# what is farther behind than the last is not shown.
_AS_WELL, _NEAR, _FAR = 0.8, 0.2, 0.1


@dataclass(frozen=True)
class Hits:
    """What a search found.

    Attributes:
        papers: best first.
        corrections: words of the query that no paper has -> the word that was searched instead.
    """

    papers: tuple[Paper, ...]
    corrections: dict[str, str] = field(default_factory=dict)


def search(query: str, limit: int = 20) -> Hits:
    """The papers that a query in words is about, those with usable parts first; none rather than a poor match.

    Raises:
        ValueError: if the query has no word or the limit is not positive.
    """
    if not words(query):
        raise ValueError(f"query must be at least one word, got {query!r}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    papers, corrections = read_papers(), dict[str, str]()
    shares, scores = _judge(_terms(query, corrections))
    named = _named(query)
    if named is not None:
        shares[named], scores[named] = 1.0, scores.get(named, 0.0)
    best, most = max(scores.values(), default=0.0), max(shares.values(), default=0.0)

    def place(slug: str) -> tuple[bool, bool, float]:
        usable = papers[slug].use and shares[slug] >= _AS_WELL * most and scores[slug] >= _NEAR * best
        return slug != named, not usable, -scores[slug]

    kept = [slug for slug in scores if slug == named or scores[slug] >= _FAR * best]
    return Hits(tuple(papers[slug] for slug in sorted(kept, key=place)[:limit]), corrections)


def _named(query: str) -> str | None:
    """The paper whose slug or public name the whole query is."""
    slug = "_".join(words(query))
    return slug if slug in read_papers() else owners().get(query.strip())


def _terms(query: str, corrections: dict[str, str]) -> list[str]:
    """The words of a query that tell what is sought, as they are spelt; numbers as in "10000 cities" tell nothing."""
    known, typed = _vocabulary(), words(query)
    told = {
        place
        for size in range(2, _LONGEST + 1)
        for start in range(len(typed) - size + 1)
        if key(typed[start : start + size]) in SYNONYMS
        for place in range(start, start + size)
    }
    terms = [
        t for place, t in enumerate(typed) if place in told or not (t in STOP_WORDS or _adverb(t) or t.isdecimal())
    ]
    terms = list(dict.fromkeys(terms or typed))
    for term in terms:
        right = term in known or _matches([term]) or key([term]) in SYNONYM_WORDS or kin(term, known)
        if not right and (other := corrected(term, known | dict.fromkeys(SYNONYM_WORDS.values(), 0))):
            corrections[term] = other
    return [corrections.get(term, term) for term in terms]


def _adverb(term: str) -> bool:
    return term.endswith(("ably", "ally", "dly", "ely", "sly", "tly", "wly")) and key([term]) not in SYNONYMS


def _judge(terms: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Slug -> the share of a query's information that a paper has, and its score, where the share is large enough."""
    total = len(read_papers())
    scores, covered, named = dict[str, float](), dict[str, float](), set[str]()
    whole = foreign = 0.0
    for phrases in _concepts(terms):
        found = _matches(phrases)
        told = {slug: score for slug, score in _told(phrases).items() if slug not in found}
        faint, term = phrases[0] in FAINT_WORDS, _is_a_term(phrases[0])
        emphasis = _FAINT if faint else 1.0
        # What few papers have tells more, and what none has tells that the query is about something else.
        telling = emphasis if term or faint or not (found or told) else _COMMON
        weight = telling * math.log(1 + total / max(1, len(found or told)))
        whole += weight
        foreign += 0.0 if found or told else weight
        for slug, score in (found | told).items():
            scores[slug] = scores.get(slug, 0.0) + emphasis * score * (_TOLD if slug in told else 1)
            covered[slug] = covered.get(slug, 0.0) + weight * (_TOLD_OF if slug in told else 1)
        if term and not faint:
            named.update(found, told)
    wholes = {slug: whole - (1 - _FOREIGN) * foreign * (slug in named) for slug in covered}
    shares = {slug: weight / wholes[slug] for slug, weight in covered.items() if weight >= _COVERED * wholes[slug]}
    return shares, {slug: scores[slug] * share**2 for slug, share in shares.items()}


def _is_a_term(phrase: str) -> bool:
    """Whether the field has a name for it: a keyword of a paper, or words with synonyms."""
    own = key(phrase.split())
    return own in SYNONYMS or own in _filed_under()


def _concepts(terms: list[str]) -> Iterator[list[str]]:
    """The phrases of each concept of a query, what was typed first."""
    single: list[str] = []
    start = 0
    while start < len(terms):
        sizes = range(min(_LONGEST, len(terms) - start), 1, -1)
        size = next((size for size in sizes if _is_a_term(" ".join(terms[start : start + size]))), 1)
        part = terms[start : start + size]
        if size == 1:
            single += part
        else:
            yield [" ".join(part), *SYNONYMS.get(key(part), ())]
        start += size
    for left, right in APART:
        one = next((term for term in single if key([term]) in left), None)
        other = next((term for term in single if key([term]) in right and term != one), None)
        if one is not None and other is not None:
            single = [term for term in single if term not in (one, other)]
            yield [f"{one} {other}", *SYNONYMS[key([one, other])]]
    for term in single:
        near = [] if _matches([term]) or key([term]) in SYNONYMS else kin(term, _vocabulary())
        yield [term, *SYNONYMS.get(key([term]), ()), *near]


def _matches(phrases: list[str]) -> dict[str, float]:
    """Slug -> how much a paper has of the phrase that it has most of.

    The words of the first phrase, which is the one typed, may stand apart from each other, which counts half.
    """
    weights = ", ".join(map(str, _WEIGHTS.values()))
    ranking = f"SELECT slug, -bm25(papers, {weights}) FROM papers WHERE papers MATCH ?"
    found: dict[str, float] = {}
    apart = " AND ".join(f'"{word}"' for word in phrases[0].split())
    for wanted, share in [*((f'"{phrase}"', 1.0) for phrase in dict.fromkeys(phrases)), (apart, 0.5)]:
        for slug, score in _index().execute(ranking, (wanted,)):
            found[slug] = max(share * score, found.get(slug, 0.0))
    return found


def _told(phrases: list[str]) -> dict[str, float]:
    """Slug -> how much the first lines of a paper's module have of the phrase that they have most of."""
    ranking = "SELECT slug, -bm25(modules) FROM modules WHERE modules MATCH ?"
    found: dict[str, float] = {}
    for phrase in dict.fromkeys(phrases):
        for slug, score in _index().execute(ranking, (f'"{phrase}"',)):
            found[slug] = max(score, found.get(slug, 0.0))
    return found


@cache
def _filed_under() -> frozenset[str]:
    """The terms that papers are filed under, as `key` gives them."""
    terms = [words(term) for paper in read_papers().values() for term in (*paper.keywords, *paper.helps)]
    return frozenset(key([word for word in term if word not in STOP_WORDS]) for term in terms)


@cache
def _index() -> sqlite3.Connection:
    index = sqlite3.connect(":memory:", check_same_thread=False)
    index.execute(f"CREATE VIRTUAL TABLE papers USING fts5({', '.join(_WEIGHTS)}, tokenize = 'porter unicode61')")
    index.executemany(f"INSERT INTO papers VALUES ({', '.join('?' * len(_WEIGHTS))})", _documents())
    index.execute("CREATE VIRTUAL TABLE modules USING fts5(slug UNINDEXED, purpose, tokenize = 'porter unicode61')")
    purposes = ((slug, " ".join(words(_purpose(paper)))) for slug, paper in read_papers().items())
    index.executemany("INSERT INTO modules VALUES (?, ?)", purposes)
    return index


def _purpose(paper: Paper) -> str:
    """What the module of a paper says before its first equation: what the method does, and when to use it."""
    place = PACKAGE / paper.area / paper.slug
    path = next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
    _, *text = (path.read_text(encoding="utf-8") if path else "").split('"""', 2)
    return text[0].partition("$$")[0] if text else ""


def _documents() -> Iterator[tuple[str, ...]]:
    for paper in read_papers().values():
        names = " ".join(name.rpartition(".")[2] for name in paper.use)
        lists = (", ".join(paper.keywords), ", ".join(paper.helps))
        texts = (paper.title, *lists, paper.summary, names, paper.area, ", ".join(paper.authors))
        yield paper.slug, *(" ".join(words(text)) for text in texts)


@cache
def _vocabulary() -> dict[str, int]:
    """Word -> in how many papers it occurs; nobody's name, to which no other word is to be corrected."""
    counts: dict[str, int] = {}
    for *document, _authors in _documents():
        for word in set(words(" ".join(document))):
            counts[word] = counts.get(word, 0) + 1
    return counts
