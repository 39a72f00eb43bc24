"""`dpo plan`: what a run would do, told without starting anything."""

from typing import Any

import typer

from flows.cli.options import JsonOption, RecipeArgument, SetOption


def plan(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Tell what `dpo run` would do: stages, cache, tokens, operations, memory and time. Starts nothing."""
    from tasks.recipe.read import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    _try_reward(resolved)
    told = plan_recipe(resolved)
    if as_json:
        typer.echo(told.model_dump_json(indent=1))
    else:
        show(told)


def _try_reward(recipe: Any) -> None:
    """Refuse a reward function that a run would refuse at its start; a server's is not asked."""
    from dpo_core.rewards.functions import check_reward

    source = recipe.reward.source
    if source is not None and not source.startswith(("http://", "https://")):
        check_reward(source)


def plan_recipe(recipe: Any) -> Any:
    """The plan of a recipe; the flow's own composition asks the store, stage by stage."""
    from flows.alignment import compose
    from tasks.planning.plan import make_plan
    from tasks.signals import Stop
    from tasks.stages.base import Context, StageResult
    from tasks.store.store import Store
    from tasks.tracking.tracker import Tracker

    store = Store(recipe.workspace)
    context = Context("plan", store, Tracker(recipe.tracking, store.workspace), Stop(), plan=True)
    stages: dict[str, StageResult] = {}
    compose(context, recipe, stages)
    return make_plan(recipe, str(store.workspace), stages)


def show(told: Any) -> None:
    """The plan as a table."""
    from rich.table import Table
    from rich.text import Text

    from flows.cli.terminal import terminal
    from tasks.reports.format import duration, scaled

    def amount(value: float, unit: str, base: int = 1000) -> str:
        return scaled(value, unit, base) if value else ""

    console = terminal()
    table = Table(title=Text(f"Plan of {told.recipe}"), title_justify="left")
    for name in ("Stage", "State", "Tokens", "Operations", "Peak memory", "Time"):
        table.add_column(name, justify="left" if name in {"Stage", "State"} else "right")
    for row in told.stages:
        state = f"runs: {row.why}" if row.why else row.state
        memory = amount(row.memory_bytes or 0, "B", 1024)
        ranks = f"{row.processes} x " if memory and (row.processes or 1) > 1 else ""
        took = f"~{duration(row.seconds)}" if row.state == "runs" else ""
        cells = amount(row.tokens, ""), amount(row.flops, "FLOP"), ranks + memory, took
        table.add_row(Text(row.name), state, *cells, style="dim" if row.state == "cached" else "")
    table.add_section()
    peak = max((row.memory_bytes or 0 for row in told.stages), default=0)
    totals = amount(told.tokens, ""), amount(told.flops, "FLOP"), amount(peak, "B", 1024)
    runs = sum(row.state == "runs" for row in told.stages)
    table.add_row("total", f"{runs} of {len(told.stages)}", *totals, f"~{duration(told.seconds)}")
    console.print(table)
    for note in dict.fromkeys(row.note for row in told.stages if row.note):
        console.print(Text(f"estimate: {note}"))
    console.print(Text(f"times from {told.speed}"))
    memory = amount(told.memory_bytes, "B", 1024)
    console.print(Text(f"{amount(told.parameters, '')} parameters on {told.device}, {memory} of memory"))
    console.print(Text(f"model {told.layout}"))
    for warning in told.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
