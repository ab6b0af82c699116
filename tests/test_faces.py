"""The faces of the packages: what they name is there, is imported on first use, and costs no more than it must."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import textwrap
import types

import pytest

import trimtab
from trimtab import faces, sources

PACKAGES = ["trimtab", *(f"trimtab.{area}" for area in trimtab.__all__ if area != "ops")]
NAMED = [package for package in PACKAGES if sources.exports(package)]
# Where a slug and a function share a name.
SHARED = [
    (package, name, source)
    for package in NAMED
    for name, source in sources.exports(package).items()
    if source != package and sources.module_file(f"{package}.{name}")
]


def ask(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_area_and_no_pytorch() -> None:
    code = """
        import sys, trimtab
        dir(trimtab)
        print(sorted(name for name in sys.modules if name.startswith(("trimtab.", "torch", "numpy"))))
    """
    assert ask(code) == "['trimtab.faces']"


def test_a_name_loads_no_heavy_neighbour() -> None:
    code = """
        import sys, trimtab
        trimtab.optim.AdaBelief, trimtab.losses.ELR
        heavy = {"sklearn", "scipy.stats", "matplotlib", "transformers", "diffusers", "pandas", "joblib"}
        print(sorted(heavy & set(sys.modules)), "trimtab.losses.adele" in sys.modules)
    """
    assert ask(code) == "[] False"


@pytest.mark.parametrize("package", NAMED)
def test_every_name_of_a_table_is_what_its_module_defines(package: str) -> None:
    face = importlib.import_module(package)
    table = sources.exports(package)
    assert face.__all__ == list(table)
    assert set(face.__all__) <= set(dir(face))
    for name, source in table.items():
        value = getattr(face, name)
        if source == package:
            assert value is importlib.import_module(f"{package}.{name}")
        else:
            assert value is getattr(importlib.import_module(source), name)
            assert not isinstance(value, types.ModuleType)


@pytest.mark.parametrize("package", NAMED)
def test_a_table_is_in_order_and_names_nothing_twice(package: str) -> None:
    text = (pkgutil.get_data(package, "__init__.py") or b"").decode()
    names = [line.split()[-1] for line in text.splitlines() if line.startswith("    from ")]
    assert names == list(sources.exports(package))
    assert len(set(names)) == len(names)


def test_there_are_slugs_that_share_a_name_with_a_function() -> None:
    assert ("trimtab.diffusion", "deis", "trimtab.diffusion.deis") in SHARED


@pytest.mark.parametrize("first", ["import {p}.{n}", "from {s} import {n}", "from {p} import {n}", "import {p}"])
def test_a_name_shared_with_a_submodule_is_the_function_whatever_came_first(first: str) -> None:
    code = f"""
        import importlib, sys, types
        for p, n, s in {SHARED}:
            exec({first!r}.format(p=p, n=n, s=s))
            face, submodule = importlib.import_module(p), importlib.import_module(f"{{p}}.{{n}}")
            exec(f"from {{p}} import {{n}} as imported")
            assert getattr(face, n) is getattr(importlib.import_module(s), n) is imported, (p, n)
            assert isinstance(submodule, types.ModuleType)
            assert not isinstance(imported, types.ModuleType)
    """
    ask(code)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'trimtab.losses' has no attribute 'Nothing'"):
        _ = trimtab.losses.Nothing
    with pytest.raises(ImportError, match="cannot import name 'Nothing' from 'trimtab.losses'"):
        exec("from trimtab.losses import Nothing")


def test_a_name_can_be_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trimtab.losses.ELR
    with monkeypatch.context() as patch:
        patch.setattr(trimtab.losses, "ELR", int)
        assert trimtab.losses.ELR is int
    assert trimtab.losses.ELR is real


def test_a_star_imports_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from trimtab.nets import *", space)
    assert set(trimtab.nets.__all__) == set(space) - {"__builtins__"}


def test_only_the_imports_for_type_checkers_are_the_table() -> None:
    text = """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from trimtab.losses import noise as noise
            from .elr import ELR as ELR
            from . import label as label
        else:
            from trimtab.faces import import_lazily
    """
    expected = {"noise": "trimtab.losses", "ELR": "trimtab.losses.elr", "label": "trimtab.losses"}
    assert faces.read_table(textwrap.dedent(text), "trimtab.losses") == expected
