"""A run's identity changes when its numbers could, and not when words, neighbours, claims or loaders do."""

import importlib
import itertools
import sys
import textwrap

import pytest

from trimtab.catalog import Catalog
from trimtab.studies.engine import definitions, identity, library
from trimtab.studies.engine.outcome import contestants

_COUNT = itertools.count()

FORMULA = '''
"""A method."""
from __future__ import annotations
import torch

SCALE = 2.0
UNUSED = 3.0


def helper(x: float) -> float:
    """Doubles."""
    if x < 0:
        raise ValueError(f"x must be positive, got {x}")
    return x * SCALE


def neighbour(x):
    return x - 1


class Method:
    """A method."""

    rate: float = 0.1

    def __call__(self, x: float) -> float:
        return helper(x) + self.rate
'''

STUDY = '''
"""A study."""
from METHODS import Method
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study


def arm(trial):
    return Result({"value": Method()(1.0)})


metrics = {"value": Metric("value (s)")}
claim = Claim("a", at_least=1.0, on="value")
study = Study(paper="elr", headline=claim, experiments=[Experiment("toy", {"a": arm}, metrics)], notes="None.")
'''


@pytest.fixture
def code_of(tmp_path, monkeypatch):
    """The hash of the arm's code in a study written to a folder, with some texts replaced."""
    monkeypatch.syspath_prepend(tmp_path)

    def hashed(*changes: tuple[str, str], parts: str = "") -> str:
        number = next(_COUNT)
        package = tmp_path / f"package{number}"
        package.mkdir()
        files = {"__init__": "", "methods": FORMULA, "toy": STUDY}
        for old, new in changes:
            assert any(old in text for text in files.values()), old
            files = {file: text.replace(old, new) for file, text in files.items()}
        for file, text in {**files, "parts": parts}.items():
            text = text.replace("METHODS", f"package{number}.methods").replace("PARTS", f"package{number}.parts")
            (package / f"{file}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        module = importlib.import_module(f"package{number}.toy")
        code = identity.code_hash(module.arm)
        for part in ("toy", "methods", "parts", ""):
            sys.modules.pop(f"package{number}.{part}".rstrip("."), None)
        return code

    return hashed


@pytest.mark.parametrize(
    "change",
    [
        ('"""Doubles."""', '"""Says something else."""'),
        ("return x * SCALE", "return x * SCALE  # a remark"),
        ('raise ValueError(f"x must be positive, got {x}")', 'raise TypeError("no")'),
        ("if x < 0:", "if x <= 0:"),  # what is refused gives no number
        ("def helper(x: float) -> float:", "def helper(x):"),
        ("rate: float = 0.1", "rate: int = 0.1"),
        ("return x - 1", "return x - 2"),  # a neighbour
        ("UNUSED = 3.0", "UNUSED = 4.0"),
        # which saved states are refused
        ("class Method:", "from trimtab.ops.whole_state import WholeState\n\n\nclass Method(WholeState):"),
        ('Metric("value (s)")', 'Metric("time (s)", best="min")'),
        ("at_least=1.0", "at_most=5.0"),
        ('notes="None."', 'notes="Some."'),
        ("SCALE = 2.0\nUNUSED = 3.0", "UNUSED = 3.0\n\n\nSCALE = 2.0"),
    ],
)
def test_what_changes_no_number_changes_no_identity(code_of, change):
    assert code_of(change) == code_of()


@pytest.mark.parametrize(
    "change",
    [
        ("return x * SCALE", "return x + SCALE"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("+ self.rate", "- self.rate"),
        ("rate: float = 0.1", "rate: float = 0.2"),
        ("Method()(1.0)", "Method()(2.0)"),
        ("return x * SCALE", "if x > 1:\n        return 1.0\n    return x * SCALE"),
    ],
)
def test_what_changes_a_number_changes_the_identity(code_of, change):
    assert code_of(change) != code_of()


def test_code_that_moves_to_another_module_is_the_same_code(code_of):
    _, _, rest = FORMULA.partition("SCALE = 2.0")
    moved, _, _ = rest.partition("def neighbour")
    assert code_of((f"SCALE = 2.0{moved}", "from PARTS import helper\n\n\n"), parts=f"SCALE = 2.0{moved}") == code_of()


def test_what_the_package_hands_out_is_part_of_the_code():
    assert definitions.resolve("trimtab", "losses") == ("trimtab.losses", "*")
    assert definitions.resolve("trimtab.losses", "ELR") == ("trimtab.losses.elr", "ELR")


@pytest.mark.parametrize("slug", library.slugs())
def test_a_papers_runs_rest_on_its_module(slug):
    study, area = library.find_study(slug), Catalog()[slug].area
    bodies = [who.body for who in contestants(study)]
    reached = {module for module, _ in definitions.closure(frozenset(identity.roots(bodies)))}
    home = f"trimtab.{area}.{slug}"
    assert any(module == home or module.startswith(f"{home}.") for module in reached)


def test_a_loader_of_data_is_no_part_of_the_code():
    import trimtab.studies.tasks.label_noise as task

    held = {module for module, _ in definitions.closure(frozenset(identity.roots(task.symmetric)))}
    assert "trimtab.losses.label_noise" in held
    assert not [name for name in held if name.startswith(("trimtab.data", "trimtab.studies.engine", "torch"))]


def test_a_tasks_labels_and_references_are_no_part_of_the_code():
    import trimtab.studies.tasks.label_noise as task

    held = definitions.closure(frozenset(identity.roots(task.symmetric)))
    text = held["trimtab.studies.tasks.label_noise", "LabelNoise"]
    assert "def run" in text
    assert not any(word in text for word in ("def references", "def variants", "final test accuracy", "cost"))


def test_installed_packages_are_no_part_of_the_code():
    import functools

    import torch

    held = definitions.closure(frozenset(identity.roots(functools.partial(torch.optim.SGD, lr=0.1))))
    assert not [module for module, _ in held if not module.startswith("trimtab")]
