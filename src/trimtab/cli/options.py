"""The options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


Budgets = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="smoke|laptop|paper",
        help="Seconds, to see that it runs; minutes on two cores; or the authors' scale.",
    ),
]


Seeds = Annotated[int | None, typer.Option("--seeds", help="Number of seeds; by default what each task asks for.")]


Jobs = Annotated[int | None, typer.Option("--jobs", help="Parallel runs; by default one for each core.")]


Backends = Annotated[
    str, typer.Option("--backend", metavar="loky|dask|ray", help="Processes of this machine, or a cluster.")
]


Address = Annotated[str | None, typer.Option("--address", help="Scheduler of a running Dask or Ray cluster.")]


Device = Annotated[str, typer.Option("--device", help="A torch device, such as cuda.")]


StorePath = Annotated[
    Path | None, typer.Option("--store", help="File that keeps finished runs; by default one for this user.")
]


Rerun = Annotated[bool, typer.Option("--rerun", help="Run again what is stored.")]


ResultsFolder = Annotated[
    Path | None,
    typer.Option(
        "--results",
        help="Folder to write the outcome into, as JSON. What is in it, of the code as it stands, is not run again.",
    ),
]
