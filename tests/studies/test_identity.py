"""An arm's identity changes when, and only when, its numbers could."""

import functools
import textwrap

import pytest
import torch

from trimtab import fingerprint, losses
from trimtab.studies import library
from trimtab.studies.identity import describe, identity, modules, sources, sources_hash
from trimtab.studies.study import Arm, Result, Trial
from trimtab.studies.tasks.label_noise import LabelNoise

NOISE = LabelNoise()
RATE = 0.5


def names(arm):
    return [fingerprint.name_of(path) for path in sources(arm)]


def test_equal_contestants_have_one_identity():
    assert identity(NOISE.train()) == identity(LabelNoise(rate=0.4).train())
    assert identity(NOISE.train()) != identity(LabelNoise(rate=0.2).train())
    assert identity(NOISE.train(loss=None)) == identity(NOISE.train())


def test_lambdas_are_known_by_their_text_and_what_they_capture():
    first = [NOISE.train(loss=lambda plan, s=s: torch.nn.CrossEntropyLoss(label_smoothing=s)) for s in (0.1, 0.2)]
    assert identity(first[0]) != identity(first[1])

    def made(smoothing):
        return NOISE.train(loss=lambda plan: torch.nn.CrossEntropyLoss(label_smoothing=smoothing))

    assert identity(made(0.1)) == identity(made(0.1))
    assert identity(made(0.1)) != identity(made(0.2))
    assert "RATE" in describe(lambda plan: RATE)
    assert "0.5" in describe(lambda plan: RATE)


def test_layout_does_not_matter():
    one = lambda plan: torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    other = lambda plan: torch.nn.CrossEntropyLoss(
        label_smoothing=0.1
    )  # fmt: skip
    assert describe(one) == describe(other)


def test_partials_functions_and_values():
    part = functools.partial(torch.optim.SGD, lr=0.1)
    assert describe(part) == describe(functools.partial(torch.optim.SGD, lr=0.1))
    assert describe(part) != describe(functools.partial(torch.optim.SGD, lr=0.2))
    assert describe({1, 2, 3}) == describe({3, 2, 1})
    assert describe([1]) != describe((1,))


def test_functions_of_a_study_are_known_by_their_text(monkeypatch):
    def helper(plan):
        return torch.nn.CrossEntropyLoss(label_smoothing=RATE)

    def outer(plan):
        return helper(plan)

    for function in (helper, outer):
        function.__module__ = "trimtab.studies.losses.elr"
        function.__qualname__ = function.__name__
    assert "label_smoothing=RATE" in describe(helper)
    assert "trimtab.studies.losses.elr" not in modules(helper)
    named = library.find_study("saf").arms["SAM"]
    assert "trimtab/studies/optim/saf.py" not in names(named)
    assert "trimtab/optim/two_pass.py" in names(named)
    assert "rho=0.05" in identity(named)
    assert "lr=0.05" in identity(named), "the functions it calls are part of it"


def test_an_object_has_no_stable_text():
    with pytest.raises(TypeError, match="factory"):
        describe(torch.nn.Linear(1, 1))


def test_sources_hold_what_is_used_and_not_its_neighbours():
    assert "trimtab/losses/elr.py" not in names(NOISE.train())
    found = names(NOISE.train(loss=lambda plan: losses.ELR(len(plan), plan.num_classes)))
    assert {"trimtab/losses/elr.py", "trimtab/ops/sample_memory.py", "trimtab/studies/tasks/label_noise.py"} <= set(
        found
    )
    assert "trimtab/losses/ldr.py" not in found
    assert "trimtab/studies/store.py" not in found


def local_arm(trial: Trial) -> Result:
    return Result({})


def test_code_outside_the_package_has_no_sources():
    assert sources(Arm(local_arm)) == []
    assert modules(Arm(local_arm)) >= {__name__}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of trimtab."""
    root = tmp_path / "trimtab"
    files = {
        "losses/__init__.py": "if TYPE_CHECKING:\n    from trimtab.losses.elr import ELR\n    from .ldr import LDR\n",
        "losses/elr.py": "from trimtab.losses.memory import Memory\nfrom trimtab.ops import pairwise\nELR = 1  # 1\n",
        "losses/memory.py": "Memory = 1\n",
        "losses/ldr.py": "LDR = 1\n",
        "ops/pairwise.py": "pairwise = 1\n",
        "use.py": "from trimtab import losses\n\nx = losses.ELR\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(fingerprint, "PACKAGE", root)
    yield root
    for cached in (fingerprint.code_hash, fingerprint.exports, fingerprint._direct_imports):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def no_cache():
    for cached in (fingerprint.code_hash, fingerprint.exports, fingerprint._direct_imports):
        cached.cache_clear()


def test_import_closure(package):
    found = [path.relative_to(package).as_posix() for path in fingerprint.import_closure(["trimtab.use"])]
    assert found == ["losses/elr.py", "losses/memory.py", "ops/pairwise.py", "use.py"]


def test_comments_and_docstrings_do_not_make_a_result_stale(package):
    file = package / "losses/elr.py"
    held = fingerprint.describe_sources([file])
    assert fingerprint.is_fresh(held)
    file.write_text(
        '"""Words."""\n\nfrom trimtab.losses.memory import Memory\nfrom trimtab.ops import pairwise\nELR = 1\n'
    )
    fingerprint.code_hash.cache_clear()
    assert fingerprint.is_fresh(held)
    file.write_text(file.read_text().replace("ELR = 1", "ELR = 2"))
    fingerprint.code_hash.cache_clear()
    assert not fingerprint.is_fresh(held)
    file.unlink()
    assert not fingerprint.is_fresh(held)


@pytest.mark.parametrize("change", ["x = 'a # b'", "x = 'a # c'", "def f():\n    return 1", "def f():\n    return 2"])
def test_code_counts(package, change):
    file = package / "losses/ldr.py"
    before = fingerprint.code_hash(file)
    file.write_text(textwrap.dedent(change) + "\n")
    fingerprint.code_hash.cache_clear()
    assert fingerprint.code_hash(file) != before


def test_hash_of_an_arm_follows_its_sources():
    plain = NOISE.train()
    assert sources_hash(plain) == sources_hash(LabelNoise(rate=0.2).train())
    assert sources_hash(plain) != sources_hash(NOISE.train(loss=lambda plan: losses.ELR(len(plan), 10)))
