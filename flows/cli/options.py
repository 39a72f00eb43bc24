"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe (dpo config list) or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one field; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
WorkspaceOption = Annotated[str, typer.Option(help="Workspace folder.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would change; change nothing.")]
ResumeOption = Annotated[
    str | None,
    typer.Option(metavar="[RUN]", help="Resume a run; without a name, the newest unfinished one."),
]

OnOption = Annotated[str, typer.Option("--on", metavar="WHERE", help="local, kubernetes, slurm or skypilot.")]
SettingsOption = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="FILE",
        help="YAML file with the cluster's settings; dpo config cluster WHERE prints a template.",
    ),
]
WithOption = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="A=VALUE", help="Override one setting of the cluster; may be repeated."),
]

WORKSPACE = "./runs"
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file", help="The deployment file; by default deploy/prefect.yaml here, or the package's own."
    ),
]
