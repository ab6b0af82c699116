"""Finding studies, tasks and contestants by name, and a user's own data and mixtures among them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trimtab import sources
from trimtab.catalog import Catalog, UnknownNameError
from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.outcome import contestants
from trimtab.studies.engine.study import Budget, Entrant, Study, Task

_TASKS_PACKAGE = "trimtab.studies.tasks."
_TASKS = Path(__file__).parents[1] / "tasks"


class UnknownTaskError(UnknownNameError):
    """There is no task of that name; the message suggests the nearest."""


class NoStudyError(LookupError):
    """The paper is known but its study does not exist yet."""


@cache
def _catalog() -> Catalog:
    return Catalog()


def slugs() -> list[str]:
    """The papers that have a study, in the catalogue's order."""
    return [paper.slug for paper in _catalog() if sources.module_file(_module(paper.area, paper.slug))]


def _module(area: str, slug: str) -> str:
    return f"trimtab.studies.{area}.{slug}"


@cache
def find_study(slug: str) -> Study:
    """The study of a paper; its notes are those in its module's docstring.

    Raises:
        UnknownPaperError: no paper has this slug.
        NoStudyError: the paper has no study yet.
    """
    paper = _catalog()[slug]
    name = _module(paper.area, paper.slug)
    if sources.module_file(name) is None:
        raise NoStudyError(f"{slug} is planned: it has no study yet (`trimtab list` shows what has)")
    module = importlib.import_module(name)
    study: Study = module.study
    return replace(study, notes=study.notes or notes_of(module))


def notes_of(module: ModuleType) -> str:
    """What a module's docstring says below its first paragraph, on one line."""
    _, _, notes = (inspect.getdoc(module) or "").partition("\n\n")
    return " ".join(notes.split())


def task_names() -> list[str]:
    """The names of all tasks."""
    return sorted(path.stem.replace("_", "-") for path in _TASKS.glob("[a-z]*.py"))


def find_task(name: str) -> type[Task[Any]] | Task[Any]:
    """The task of that name, or the one that `module:name` stands for: a subclass of `Task`, or a variant of one.

    Raises:
        UnknownTaskError: there is none.
        ValueError: the module cannot be imported, or holds no such task.
    """
    if ":" in name:
        return _own_task(name)
    if name not in task_names():
        raise UnknownTaskError("task", name, task_names(), f"; there are {', '.join(task_names())}")
    module = importlib.import_module(f"trimtab.studies.tasks.{name.replace('-', '_')}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"task {name} must be the one Task in its module, got {len(found)}")
    return found[0]


def _own_task(text: str) -> type[Task[Any]] | Task[Any]:
    module, _, name = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"task must be a task's name or module:name, got {text!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"task must name something in {module}, got {name!r}") from None
    if isinstance(found, Task) or (inspect.isclass(found) and issubclass(found, Task)):
        return found
    raise ValueError(f"task must be a Task or a subclass of it, got {type(found).__name__} {text!r}")


def studies_on(task: type[Task[Any]]) -> list[Study]:
    """The studies that enter a task, of this package or a user's own subclass of one."""
    return _entering(task)[0]


def _entering(task: type[Task[Any]]) -> tuple[list[Study], dict[str, str]]:
    """The studies that enter a task, and those that cannot be read: slug -> why."""
    # A study names its task's module in an import, so that the others need not be imported to find out.
    bases = [base for base in task.__mro__ if issubclass(base, Task) and base.__module__.startswith(_TASKS_PACKAGE)]
    stems = {base.__module__.rpartition(".")[2] for base in bases}
    found, broken = [], {}
    for slug in slugs():
        file = sources.module_file(_module(_catalog()[slug].area, slug))
        texts = [] if file is None else [file] if file.name != "__init__.py" else sorted(file.parent.glob("*.py"))
        if not bases or any(stem in text.read_text(encoding="utf-8") for text in texts for stem in stems):
            try:
                study = find_study(slug)
                own_kind = not bases and any(isinstance(entrant, task.accepts) for entrant in _plain(study))
            except Exception as error:  # one that is broken keeps no other from entering
                broken[slug] = f"its study cannot be imported ({type(error).__name__}: {error})"
                continue
            if own_kind or any(issubclass(task, type(variant)) for variant in study.on):
                found.append(study)
    return found, broken


def _entrants(study: Study, task: Task[Any], *, of_any_task: bool) -> dict[str, Entrant]:
    """A study's entrants on a variant, with no more settings to choose from than the task allows anyone.

    Args:
        study: the study.
        task: the variant.
        of_any_task: those too that the study has for other tasks, if they are of the kind that this one takes.
    """
    found = study.entrants_at(task)
    for name, entrant in study.entrants.items():
        given = [entrant] if isinstance(entrant, Entrant) else list(entrant.values())
        fitting = [e for e in given if isinstance(e, task.accepts)]
        if of_any_task and fitting:
            found.setdefault(name, fitting[0])
    return {name: replace(e, search=_within(e.search, task.tries)) if e.search else e for name, e in found.items()}


def _within(grid: Mapping[str, Sequence[Any]], tries: int) -> Mapping[str, Sequence[Any]]:
    """A grid with as many settings at most; the last names keep only their first value, or as many as there is room.

    Example:
        >>> _within({"lr": (0.1, 0.2, 0.3), "weight_decay": (0.0, 0.1)}, 4)
        {'lr': (0.1, 0.2, 0.3), 'weight_decay': (0.0,)}
    """
    held = {}
    for name, values in grid.items():
        held[name] = tuple(values)[: max(1, tries)]
        tries //= len(held[name])
    return held


@dataclass(frozen=True)
class Field:
    """Who can enter a variant of a task.

    Attributes:
        contestants: the references first, then the papers' entrants.
        skipped: name -> why it cannot enter here.
    """

    contestants: tuple[Contestant, ...]
    skipped: Mapping[str, str]


def field_of(task: Task[Any], budget: Budget, methods: Iterable[str] | None = None) -> Field:
    """Everybody who can enter a variant of a task.

    Args:
        task: the variant.
        budget: at which they are to run.
        methods: only the entrants of these papers; the references stay.

    Raises:
        UnknownPaperError: a method is no paper.
        ValueError: a method has a study and no entrant of the task's kind.
    """
    studies, skipped = _entering(type(task))
    if methods is not None:
        wanted = [find_study(slug) for slug in dict.fromkeys(methods)]
        for study in wanted:
            if study.paper not in {other.paper for other in studies}:
                raise ValueError(_refusal(study, task))
        studies, skipped = wanted, {}
    everybody = [Contestant(name, "", task, entrant) for name, entrant in task.references().items()]
    for study in studies:
        held = _entrants(study, task, of_any_task=not type(task).__module__.startswith(_TASKS_PACKAGE))
        everybody += [Contestant(name, study.paper, task, entrant) for name, entrant in held.items()]
    taken: dict[str, Contestant] = {}
    for who in everybody:
        name = who.name if who.name not in taken else f"{who.name} ({who.paper})"
        if obstacle := who.obstacle(budget):
            skipped[name] = obstacle
        else:
            taken[name] = replace(who, name=name)
    return Field(tuple(taken.values()), skipped)


def _refusal(study: Study, task: Task[Any]) -> str:
    kinds = sorted({type(entrant).__name__ for entrant in _plain(study)}) or ["only experiments of its own"]
    takes = task.accepts.__name__
    if takes in kinds:
        where = ", ".join(sorted({other.name for other in study.on}))
        return f"{study.paper} cannot enter {task.name}: its study enters {where}"
    return f"{study.paper} cannot enter {task.name}, which takes {takes}: its study has {', '.join(kinds)}"


def _plain(study: Study) -> list[Entrant]:
    return [
        part
        for entrant in study.entrants.values()
        for part in ([entrant] if isinstance(entrant, Entrant) else entrant.values())
    ]


def mixture(task: Task[Any], budget: Budget, slugs: Sequence[str]) -> Field:
    """The references, the parts that several papers bring, and their combination."""
    field = field_of(task, budget, ())
    return replace(field, contestants=(*field.contestants, *combine(task, slugs)))


def combine(task: Task[Any], slugs: Sequence[str]) -> list[Contestant]:
    """A mixture of the parts that several papers bring, as one contestant, and each part alone.

    The parts must take different places (a loss, a penalty, an optimizer …). The mixture chooses among the settings
    that they bring, the optimizer's first, as far as the task's number of tries goes.

    Raises:
        ValueError: two papers bring the same part, or one brings none to this task.
    """
    parts: dict[str, Contestant] = {}
    for slug in slugs:
        study = find_study(slug)
        entrants = _entrants(study, task, of_any_task=True)
        if not entrants:
            raise ValueError(_refusal(study, task))
        name = next(iter(entrants))
        parts[slug] = Contestant(name, slug, task, entrants[name])
    mixed: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for slug, who in parts.items():
        for part in fields(who.body):  # type: ignore[arg-type]
            value = getattr(who.body, part.name)
            if value is None or part.name in ("requires", "search"):
                continue
            if part.name in owner:
                raise ValueError(f"{owner[part.name]} and {slug} both bring {part.name}: they cannot be combined")
            mixed[part.name] = value
            owner[part.name] = slug
    bodies: list[Any] = sorted((who.body for who in parts.values()), key=lambda e: not getattr(e, "optimizer", None))
    grids = [body.search for body in bodies if body.search is not None]
    if grids:
        merged = {name: values for grid in reversed(grids) for name, values in grid.items()}
        first = {name: merged[name] for grid in grids for name in grid}
        mixed["search"] = _within(first, task.tries)
    mixed["requires"] = tuple({need for body in bodies for need in body.requires})
    name = " + ".join(who.name for who in parts.values())
    return [*parts.values(), Contestant(name, "+".join(parts), task, task.accepts(**mixed))]


def variants_of(task: type[Task[Any]] | Task[Any]) -> dict[str, Task[Any]]:
    """Label -> the variants of a task that have a leaderboard; of a single variant, itself."""
    if isinstance(task, Task):
        return {task.label: task}
    own = {label: found for label, found in task.variants().items() if isinstance(found, task)}
    if own:
        return own
    alone = task()
    return {alone.label: alone}


def find_variant(task: type[Task[Any]] | Task[Any], label: str) -> Task[Any]:
    """The variant of that name; case and dashes do not matter.

    Raises:
        UnknownNameError: there is none.
    """
    known = variants_of(task)
    plain = {name.lower().replace("-", " "): found for name, found in known.items()}
    if (wanted := label.lower().replace("-", " ")) in plain:
        return plain[wanted]
    raise UnknownNameError("variant", label, known, f"; there are {', '.join(known)}")


def about(task: type[Task[Any]] | Task[Any]) -> dict[str, Any]:
    """What a task is, as plain data; `minutes` are those of one core for its first variant at the laptop budget."""
    variants = variants_of(task)
    first = next(iter(variants.values()))
    field = field_of(first, "laptop")
    return {
        "name": first.name,
        "about": (inspect.getdoc(type(first)) or "").partition("\n")[0],
        "variants": list(variants),
        "settings": {held.name: getattr(first, held.name) for held in fields(first)},
        "metrics": {name: metric.label for name, metric in first.metrics.items()},
        "references": list(first.references()),
        "papers": list(dict.fromkeys(who.paper for who in field.contestants if who.paper)),
        "minutes": sum(who.cost("laptop") for who in field.contestants) / 60,
    }


def everybody(studies: Iterable[Study]) -> list[Contestant]:
    """All contestants of some studies, and the whole field of every variant that they enter."""
    found: list[Contestant] = []
    for study in studies:
        found += contestants(study)
        for task in study.on:
            found += [who for who in field_of(task, "smoke").contestants if not who.paper]
    return found


def variant(task: type[Task[Any]] | Task[Any], settings: Mapping[str, str]) -> Task[Any]:
    """A task, or a variant of one, with some fields set from text, as the command line has them.

    Raises:
        ValueError: there is no such field, or the text is not a value of its type.
    """
    known = {field.name: field for field in fields(task)}
    values: dict[str, object] = {}
    for name, text in settings.items():
        if name not in known:
            raise ValueError(f"task {task.name} has no setting {name!r}; it has {', '.join(known) or 'none'}")
        kind = get_type_hints(task if isinstance(task, type) else type(task))[name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and text not in map(str, choices):
            raise ValueError(
                f"setting {name} of task {task.name} must be one of {', '.join(map(str, choices))}, got {text!r}"
            )
        try:
            values[name] = next(c for c in choices if str(c) == text) if choices else _BASIC[kind](text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"setting {name} of task {task.name} must be a {kind.__name__}, got {text!r}") from error
    return task(**values) if isinstance(task, type) else replace(task, **values)


_BASIC: Mapping[object, Callable[[str], object]] = {
    str: str,
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}
