"""Imbalanced classification of real text that every machine has: the standard library's modules, by topic."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from trimtab.data import DataNotFoundError
from trimtab.studies.engine.study import Result, Setting, Trial
from trimtab.studies.solvers.supervised_dictionary.few_features import Build, Contest, Part, compete, thin_out

# The chapters "Internet Data Handling" and "Internet Protocols and Support" of the library's reference.
INTERNET = frozenset(
    (
        "base64",
        "email",
        "ftplib",
        "http",
        "imaplib",
        "ipaddress",
        "json",
        "mailbox",
        "mimetypes",
        "poplib",
        "quopri",
        "smtplib",
        "socketserver",
        "urllib",
        "uuid",
        "webbrowser",
        "wsgiref",
        "xmlrpc",
    )
)
# Not the library proper: its tests, what is installed beside it, programs of its own, and tables of data.
LEFT_OUT = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "turtledemo",
        "tkinter",
        "lib2to3",
        "distutils",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "__pycache__",
    )
)
LINES = 50  # of a document
SHORTEST = 500  # characters of a document


@cache
def modules() -> tuple[tuple[bool, tuple[str, ...]], ...]:
    """Of each module of the standard library, whether it is about the internet, and its pieces of `LINES` lines.

    Raises:
        DataNotFoundError: there are too few of either kind, as in a Python without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT and not name.startswith("config-")]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    found = []
    for file in sorted(files):
        parts = file.relative_to(root).with_suffix("").parts
        lines = file.read_text(encoding="utf-8", errors="ignore").lower().splitlines()
        pieces = ("\n".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES))
        if kept := tuple(piece for piece in pieces if len(piece) >= SHORTEST):
            found.append((parts[0] in INTERNET, kept))
    about = sum(internet for internet, _ in found)
    if min(about, len(found) - about) < 20:
        raise DataNotFoundError(f"documents: {root} holds the sources of {len(found)} modules, {about} on the internet")
    return tuple(found)


@dataclass(frozen=True)
class Documents:
    """Find the pieces of the standard library that are about the internet, one in eleven, by `rank` features.

    A document is fifty lines of a module, a bag of words weighted by tf-idf. A seed is a split of the modules into
    parts for training, validation and test, so that no module is in two.

    Attributes:
        rank: number of features.
        words: most words in the vocabulary, those most frequent in the training part.
    """

    rank: int = 5
    words: int = 800

    def run(self, trial: Trial, build: Build, grid: Sequence[Setting]) -> Result:
        """One contestant."""
        return compete(trial, self.contest(trial), build, grid)

    def contest(self, trial: Trial) -> Contest:
        """The data of a trial."""
        generator = trial.generator()
        kinds: list[list[tuple[bool, tuple[str, ...]]]] = [[], [], []]
        for topic in (False, True):
            found = [module for module in modules() if module[0] == topic]
            order = torch.randperm(len(found), generator=generator).tolist()
            ends = (0, len(found) // 2, len(found) * 3 // 4, len(found))
            for part, (begin, end) in zip(kinds, pairwise(ends), strict=True):
                part.extend(found[i] for i in order[begin:end])
        most = trial.pick(smoke=200, laptop=2500, paper=1_000_000)
        texts, labels = [], []
        for part in kinds:
            pieces = [(piece, int(internet)) for internet, group in part for piece in group]
            rows = torch.randperm(len(pieces), generator=generator)[:most].tolist()
            texts.append([pieces[i][0] for i in rows])
            labels.append(np.array([pieces[i][1] for i in rows], dtype=np.int64))
        counter = TfidfVectorizer(
            token_pattern="[a-z]{3,}",
            max_features=trial.pick(smoke=100, laptop=self.words, paper=5 * self.words),
            sublinear_tf=True,
        ).fit(texts[0])
        parts = [
            thin_out(Part(counter.transform(text).toarray(), label, np.empty((len(text), 0))), generator)
            for text, label in zip(texts, labels, strict=True)
        ]
        train, valid, test = parts
        return Contest(train, valid, test, self.rank, trial.seed, trial.budget == "smoke")
