"""What a study is: entrants on shared tasks, experiments of its own, one headline and further claims.

A `Task` is work that several papers meet on; an `Entrant` is what a contestant brings to it; an `Experiment` is what
only one paper needs. A `Study` is a paper's evidence:

    study = Study(
        paper="elr",
        entrants={"ELR": Training(loss=lambda plan: losses.ELR(len(plan), plan.num_classes))},
        on=[symmetric, pair_flip],
        headline=Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05, at=symmetric),
    )
"""

from trimtab.studies.engine.study.claim import Claim
from trimtab.studies.engine.study.evidence import Study
from trimtab.studies.engine.study.experiment import Arm, Experiment, Venue
from trimtab.studies.engine.study.task import Entrant, Metric, Task, at_edge, settings_of
from trimtab.studies.engine.study.trial import BUDGETS, SEARCH_SEED, Budget, Curve, Result, Setting, Trial

__all__ = [
    "BUDGETS",
    "SEARCH_SEED",
    "Arm",
    "Budget",
    "Claim",
    "Curve",
    "Entrant",
    "Experiment",
    "Metric",
    "Result",
    "Setting",
    "Study",
    "Task",
    "Trial",
    "Venue",
    "at_edge",
    "settings_of",
]
