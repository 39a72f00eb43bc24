"""`dpo launch`: a run whose jobs go to a cluster."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import RecipeArgument, SetOption

OnOption = Annotated[str, typer.Option("--on", metavar="WHERE", help="local, kubernetes, slurm or skypilot.")]
SettingsOption = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="FILE",
        help="YAML file of the cluster's settings; dpo config cluster WHERE prints one.",
    ),
]
WithOption = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="A=VALUE", help="Override one setting of the cluster; may be repeated."),
]


def launch(
    recipe: RecipeArgument,
    on: OnOption,
    settings: SettingsOption = None,
    over_settings: WithOption = None,
    overrides: SetOption = None,
    render: Annotated[bool, typer.Option("--render", help="Print what would be submitted, and end.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Go on with a run; without a name, the newest unfinished one."),
    ] = None,
) -> None:
    """Run a recipe; everything that computes with a model runs on a cluster, the flow here.

    The workspace lies on storage that this machine and the cluster's see at the same path.
    """
    cluster = read_cluster(on, settings, over_settings or [])
    if render:
        typer.echo(rendered(recipe, overrides or [], cluster), nl=False)
        return
    from flows.cli.run import run_recipe

    run_recipe(recipe, overrides or [], resume, cluster)


def read_cluster(on: str, path: str | None, overrides: list[str]) -> Any:
    """The cluster with its settings; None for this machine.

    Raises:
        RecipeError: there is no such target, or its settings cannot be used.
    """
    import yaml

    from deploy.launchers.registry import TARGETS, Cluster
    from dpo_core.errors import RecipeError
    from dpo_core.system import read_small
    from dpo_core.yaml import read_yaml
    from tasks.recipe.read import with_overrides

    if on == "local":
        if path or overrides:
            raise RecipeError("local takes no settings of a cluster", "Leave out --settings and --with")
        return None
    if on not in TARGETS:
        raise RecipeError(f"there is no launcher '{on}'", f"Choose one of: {', '.join(['local', *TARGETS])}")
    try:
        raw = read_yaml(read_small(Path(path))) if path else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read ({error})", "Name a YAML file of settings") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a mapping of settings", "Write lines such as: nodes: 2")
    kind, _ = TARGETS[on]
    raw = {name: value for name, value in raw.items() if value is not None}  # a form's field left empty
    remedy = f"Set it in the --settings file or by --with NAME=VALUE; what there is: dpo config cluster {on}"
    config = with_overrides(kind, raw, overrides, f"the settings for {on} cannot be used", remedy)
    return Cluster(on=on, settings=config)


def rendered(recipe: str, overrides: list[str], cluster: Any) -> str:
    """What would be submitted for every job of the run, in order; of cached ones only that they are.

    The last folder of a job is known only once its data are made, and reads ID here.
    """
    from flows.cli.plan import plan_recipe
    from tasks.recipe.read import load_recipe

    resolved = load_recipe(recipe, overrides)
    plan = plan_recipe(resolved)
    jobs = [row for row in plan.stages if row.job != "none"]
    cached = [f"# {row.name}: cached, nothing to submit\n" for row in jobs if row.state == "cached"]
    texts = []
    # A training has a peak of memory; one without demonstrations only copies the base.
    for row in (row for row in jobs if row.state == "runs" and not (row.trains and row.memory_bytes is None)):
        work = Path(plan.workspace) / "work" / row.name.partition(" ")[0] / "ID"
        place = cluster.for_one_rank() if cluster and row.job == "one rank" else cluster
        processes = row.processes or max(1, place.settings.gpus if place else 1)
        text = _place(place, row.name, work).render(work / "job.json", processes)
        texts.append(f"# {row.name}\n{text.rstrip()}\n")
    # Several documents of one file, where they are YAML.
    between = "---\n" if cluster and cluster.on in {"kubernetes", "skypilot"} else "\n"
    return "".join(cached) + between.join(texts)


def _place(cluster: Any, stage: str, work: Path) -> Any:
    """The launcher of a job; a warning where its nodes would not see the work folder."""
    from deploy.launchers import LocalLauncher
    from dpo_core.errors import RecipeError

    if cluster is None:
        return LocalLauncher()
    place = cluster.launcher(f"{stage} {work}")
    try:
        place.require_seen(work)
    except RecipeError as error:  # what is only looked at need not be there
        typer.echo(f"warning: {error}", err=True)
    return place
