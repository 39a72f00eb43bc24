"""The body of `dpo launch --render`: prints what would be submitted for each job of a run."""

from pathlib import Path

import typer

from deploy.launchers import Cluster, Launcher, LocalLauncher
from dpo_core.errors import RecipeError
from flows.commands.plan import plan_recipe
from tasks.recipe.read import load_recipe


def rendered(recipe: str, overrides: list[str], cluster: Cluster | None) -> str:
    """The command or manifest of every job in order; cached jobs are only listed.

    The last folder of a job is named ID, because its name depends on data that do not exist yet.
    """
    plan = plan_recipe(load_recipe(recipe, overrides))
    jobs = [row for row in plan.stages if row.job != "none"]
    cached = [f"# {row.name}: cached, nothing to submit\n" for row in jobs if row.state == "cached"]
    texts = []
    # Trainings have an estimate of memory, except one without demonstrations, which only copies the base.
    for row in (row for row in jobs if row.state == "runs" and not (row.trains and row.memory_bytes is None)):
        work = Path(plan.workspace) / "work" / row.name.partition(" ")[0] / "ID"
        place = cluster.for_one_rank() if cluster and row.job == "one rank" else cluster
        processes = row.processes or max(1, place.settings.gpus if place else 1)
        text = _launcher(place, row.name, work).render(work / "job.json", processes)
        texts.append(f"# {row.name}\n{text.rstrip()}\n")
    # Separates YAML documents.
    between = "---\n" if cluster and cluster.on in {"kubernetes", "skypilot"} else "\n"
    return "".join(cached) + between.join(texts)


def _launcher(cluster: Cluster | None, stage: str, work: Path) -> Launcher:
    """The launcher of a job. Warns if its nodes cannot see the work folder."""
    if cluster is None:
        return LocalLauncher()
    launcher = cluster.launcher(f"{stage} {work}")
    try:
        launcher.require_seen(work)
    except RecipeError as error:  # rendering does not need the folder
        typer.echo(f"warning: {error}", err=True)
    return launcher
