"""`dpo validate`: check a data set at the data gate."""

import json
from typing import Annotated

import typer

from dpo_core.errors import GateRefused
from flows.cli.options import JsonOption, SetOption


def validate(
    data: Annotated[str, typer.Argument(help="A data file, a folder, or a hub name.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Use the tokenizer and chat template of this model (model.name)."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Use the model and the settings of this recipe."),
    ] = None,
    show: Annotated[
        int, typer.Option(metavar="N", min=0, help="Print the first rows as the model will see them.")
    ] = 0,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recognise the format of a data set and check it at the data gate; trains nothing."""
    from flows.commands.validate import judge_file

    report, recognised, rows = judge_file(data, overrides or [], model, recipe, show)
    if as_json:
        typer.echo(json.dumps(report.model_dump(mode="json") | rows.data, indent=1, ensure_ascii=False))
    else:
        typer.echo(f"{data}: {recognised}")
        for finding in report.findings:
            if not finding.passed:
                typer.echo(f"{finding.severity:8} {finding.rule}: {finding.message}")
        skipped = [finding for finding in report.findings if finding.skipped]
        for message in dict.fromkeys(finding.message for finding in skipped):
            rules = ", ".join(finding.rule for finding in skipped if finding.message == message)
            remedy = "" if model or recipe or "tokenizer" not in message else " (set --model or --recipe)"
            typer.echo(f"{'skipped':8} {rules}: {message}{remedy}")
        typer.echo(f"{report.rows} rows, {report.dropped} dropped; Data Docs: {report.docs_index}")
        for text in rows.texts:
            typer.echo(f"\n{text}")
    if report.refused and not as_json:
        failed = [f.rule for f in report.findings if f.severity == "critical" and not f.passed]
        raise GateRefused(
            f"the data gate refuses {data}, see above: {', '.join(failed)}", "Correct the rows named there"
        )
    report.raise_if_refused()
