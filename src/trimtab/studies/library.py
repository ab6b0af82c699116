"""Finding studies and tasks by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from trimtab import fingerprint
from trimtab.catalog import Catalog, UnknownNameError
from trimtab.studies.identity import identity, modules
from trimtab.studies.study import Arm, Study, Task


class UnknownTaskError(UnknownNameError):
    """There is no task of that name; the message suggests the nearest."""


class NoStudyError(LookupError):
    """The paper is known but its study does not exist yet."""


def slugs() -> list[str]:
    """The papers that have a study, in the catalogue's order."""
    return [paper.slug for paper in Catalog() if fingerprint.module_file(_module(paper.area, paper.slug))]


def _module(area: str, slug: str) -> str:
    return f"trimtab.studies.{area}.{slug}"


def find_study(slug: str) -> Study:
    """The study of a paper.

    Raises:
        UnknownPaperError: no paper has this slug.
        NoStudyError: the paper has no study yet.
    """
    paper = Catalog()[slug]
    module = _module(paper.area, paper.slug)
    if fingerprint.module_file(module) is None:
        raise NoStudyError(f"{slug} is planned: it has no study yet (`trimtab list --state works` shows what has)")
    study: Study = importlib.import_module(module).study
    return study


def task_names() -> list[str]:
    """The names of all tasks."""
    folder = Path(__file__).parent / "tasks"
    return sorted(path.stem.replace("_", "-") for path in folder.glob("[a-z]*.py"))


def find_task(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        UnknownTaskError: there is none.
    """
    if name not in task_names():
        raise UnknownTaskError("task", name, task_names())
    module = importlib.import_module(f"trimtab.studies.tasks.{name.replace('-', '_')}")
    (task,) = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    return task


def variant(task: type[Task], settings: Mapping[str, str]) -> Task:
    """A task with some fields set from text, as the command line has them.

    Raises:
        ValueError: there is no such field, or the text is not a value of its type.
    """
    known = {field.name: field for field in fields(task)}
    values: dict[str, object] = {}
    for name, text in settings.items():
        if name not in known:
            raise ValueError(f"task {task.name} has no setting {name!r}; it has {', '.join(known) or 'none'}")
        kind = get_type_hints(task)[name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and text not in map(str, choices):
            raise ValueError(
                f"setting {name} of task {task.name} must be one of {', '.join(map(str, choices))}, got {text!r}"
            )
        try:
            values[name] = next(c for c in choices if str(c) == text) if choices else _BASIC[kind](text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"setting {name} of task {task.name}: {text!r} is not a value of its type") from error
    return task(**values)


def _paper(arm: Arm) -> str:
    """The paper whose module the arm uses; nothing for a baseline."""
    catalog = Catalog()
    used = (module.split(".") for module in sorted(modules(arm)))
    return next((p[2] for p in used if len(p) == 3 and p[2] in catalog.papers and catalog[p[2]].area == p[1]), "")


_BASIC: Mapping[object, Callable[[str], object]] = {
    str: str,
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}


def contestants(task: Task, methods: Iterable[str] | None = None) -> dict[str, tuple[str, Arm]]:
    """Everybody who can run on a task: arm name -> (paper, arm), the baselines, which use no paper, first.

    Args:
        task: the variant to run on; arms that were made for another variant are moved to it.
        methods: only the arms of these papers, and the baselines among them; None takes all.
    """
    module = type(task).__module__
    found: dict[str, tuple[str, Arm]] = {}
    seen: set[str] = set()
    for slug in methods or slugs():
        area = Catalog()[slug].area
        file = fingerprint.module_file(_module(area, slug))
        if file is None:
            find_study(slug)  # says why not
        if methods is None and module.rpartition(".")[2] not in (file.read_text() if file else ""):
            continue  # the study never names the task: no need to import it
        study = find_study(slug)
        for name in study.leaderboard or study.arms:
            arm = study.arms[name]
            if not isinstance(arm.task, type(task)):
                continue
            arm = arm.on(task)
            who = identity(arm)
            if who not in seen:
                seen.add(who)
                found[name if name not in found else f"{name} ({slug})"] = (_paper(arm), arm)
    return dict(sorted(found.items(), key=lambda item: item[1][0] != ""))
