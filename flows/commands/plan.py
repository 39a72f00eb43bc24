"""The body of `dpo plan`: makes the plan of a recipe and prints it as a table."""

from rich.table import Table
from rich.text import Text

from dpo_core.rewards import functions
from dpo_core.rewards.ensemble import parts
from dpo_core.rewards.http import is_url
from dpo_core.statistics.format import duration, scaled
from flows.alignment import prepare_train_evaluate
from flows.commands.terminal import terminal
from tasks.planning.plan import Plan, StagePlan, make_plan
from tasks.recipe.recipe import Recipe
from tasks.signals import Stop
from tasks.stages.base import Context, StageResult, Why
from tasks.store.store import Store
from tasks.tracking.tracker import Tracker

_WHY: dict[Why, str] = {
    "new": "never ran here",
    "changed": "settings or code changed",
    "data": "its inputs change",
    "damaged": "damaged artifact",
}
_SHOWN = 2
"""Changed settings in the row of a stage; all are listed below the table."""


def _why(row: StagePlan, changes: list[str]) -> str:
    """Why a stage runs; of a training whose own settings changed, which."""
    assert row.why is not None
    own = [change.partition(": ")[0] for change in changes if change.startswith(f"{row.section}.")]
    if row.why != "changed" or not own:
        return "new policy" if f"{row.section}: new" in changes else _WHY[row.why]
    return f"{', '.join(own[:_SHOWN])}{' …' if len(own) > _SHOWN else ''} changed"


def check_reward(recipe: Recipe) -> None:
    """Refuse a reward function that a run would refuse at its start; a reward server is not called.

    Raises:
        RecipeError: the function cannot be used.
    """
    for part in parts(recipe.reward.source or ""):
        if part.source and not is_url(part.source):
            functions.check_reward(part.source, images=True)


def plan_recipe(recipe: Recipe) -> Plan:
    """The plan of a recipe: the flow composes its stages, which only look up their results in the store."""
    store = Store(recipe.workspace)
    context = Context("plan", store, Tracker(recipe.tracking, store.workspace), Stop(), plan=True)
    stages: dict[str, StageResult] = {}
    prepare_train_evaluate(context, recipe, stages)
    return make_plan(recipe, str(store.workspace), stages)


def show(plan: Plan) -> None:
    """Print the plan as a table."""

    def amount(value: float, unit: str, base: int = 1000) -> str:
        return scaled(value, unit, base) if value else ""

    console = terminal()
    table = Table(title=Text(f"Plan of {plan.recipe}"), title_justify="left")
    for name in ("Stage", "State", "Tokens", "Operations", "Peak memory", "Time"):
        table.add_column(name, justify="left" if name in {"Stage", "State"} else "right")
    for row in plan.stages:
        state = f"runs: {_why(row, plan.changes)}" if row.why else row.state
        memory = amount(row.memory_bytes or 0, "B", 1024)
        ranks = f"{row.processes} x " if memory and (row.processes or 1) > 1 else ""
        took = f"~{duration(row.seconds)}" if row.state == "runs" else ""
        cells = amount(row.tokens, ""), amount(row.flops, "FLOP"), ranks + memory, took
        table.add_row(Text(row.name), state, *cells, style="dim" if row.state == "cached" else "")
    table.add_section()
    peak = max((row.memory_bytes or 0 for row in plan.stages), default=0)
    totals = amount(plan.tokens, ""), amount(plan.flops, "FLOP"), amount(peak, "B", 1024)
    runs = sum(row.state == "runs" for row in plan.stages)
    table.add_row("total", f"{runs} of {len(plan.stages)}", *totals, f"~{duration(plan.seconds)}")
    console.print(table)
    if plan.compared_with:
        changes = "; ".join(plan.changes) or "no setting differs"
        console.print(Text(f"compared with {plan.compared_with}: {changes}"))
    for note in dict.fromkeys(row.note for row in plan.stages if row.note):
        console.print(Text(f"estimate: {note}"))
    console.print(Text(f"times from {plan.speed}"))
    memory = amount(plan.memory_bytes, "B", 1024)
    size = f"{amount(plan.parameters, '')} parameters on " if plan.parameters else ""
    console.print(Text(f"{size}{plan.device}, {memory} of memory"))
    console.print(Text(f"model {plan.layout}"))
    for warning in plan.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
