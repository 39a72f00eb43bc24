"""The body of `dpo validate`: checks a data set at the data gate without a run."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.split import by_source, split_table
from dpo_core.data.tokens.chat_template import check_template
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import RecipeError
from dpo_core.models.config import ModelConfig
from dpo_core.models.folder import is_denoiser
from dpo_core.models.load import load_tokenizer, templates_of
from dpo_core.models.source import locate, read_template
from dpo_core.system import digest_text
from expectations.config import GateConfig
from expectations.drift import load_baseline
from expectations.features import Tokenisation
from expectations.gate import judge
from expectations.report import GateReport
from flows.commands.row_preview import as_data, as_text, shown
from tasks.recipe.policies import is_external
from tasks.recipe.read import load_recipe, with_overrides


class _Settings(Config):
    """The recipe sections that the gate reads."""

    data: DataConfig
    gate: GateConfig
    tokens: TokenConfig
    """How rows become tokens; read only with a model."""
    model: ModelConfig
    """The model whose tokenizer and chat template are used."""


class PreviewedRows(NamedTuple):
    """The first rows as a model will see them."""

    texts: list[str]
    """For people."""
    data: dict[str, Any]
    """For scripts: `rows`, and `row_count` for the report's number of rows; empty if no rows are shown."""


def judge_file(
    data: str,
    overrides: Sequence[str],
    model: str | None = None,
    recipe: str | None = None,
    show: int = 0,
) -> tuple[GateReport, str, PreviewedRows]:
    """The gate's report on a data set, the remarks on how it was read, and its first rows.

    Args:
        overrides: `data.x=value` and `gate.x.y=value`, as in a recipe, and with a model `tokens.x=value` and
            `model.x=value`.
        model: as `model.name` in a recipe; without model and recipe, rules that need tokens are skipped.
        recipe: a recipe whose model and settings are used.
        show: number of rows to show as the model will see them.

    Raises:
        DataError: the data cannot be read.
        ModelError: the tokenizer or the chat template cannot be used.
        RecipeError: the recipe or an override is not valid.
    """
    settings, has_model = _settings(data, overrides, model, recipe, show), bool(model or recipe)
    config, gate = settings.data, settings.gate
    loaded = load(config)
    frame = split_table(loaded, config)
    tokenise = None
    if has_model and not _is_denoiser(settings.model):
        tokenise = tokenise_of(settings.model, settings.tokens)
    baseline = load_baseline(gate.baseline) if gate.baseline else None
    # One folder per data set, so that the next check of it replaces this one's Data Docs.
    name = digest_text(os.path.abspath(data))[:12]
    docs = _own_folder(Path(tempfile.gettempdir()) / f"dpo-gate-{os.getuid()}") / name
    shutil.rmtree(docs, ignore_errors=True)
    report, _ = judge(
        frame,
        subject=loaded.kind,
        config=gate,
        docs_dir=docs,
        baseline=baseline,
        tokenisation=Tokenisation.of(tokenise) if tokenise else None,
    )
    remarks = [f"{loaded.format} ({loaded.recognised_by}); {_counted(loaded.notes)}", *loaded.remarks]
    if config.eval_path is not None:
        remarks.append(f"held out: {int((frame['split'] == 'eval').sum())} rows of {config.eval_path}")
    for name, count in by_source(frame).items():
        remarks.append(f"{name}: {count['train']} rows to train on, {count['eval']} held out")
    rows = PreviewedRows([], {})
    if tokenise is not None:
        remarks += [note] if (note := tokenise.note_on(frame["chat"].tolist())) else []
        sides = list(shown(frame, loaded.kind, tokenise, show))
        listed = [as_data(side, tokenise) for side in sides]
        data_of_rows = {"rows": listed, "row_count": report.rows} if show else {}
        rows = PreviewedRows([as_text(side, tokenise) for side in sides], data_of_rows)
    return report.model_copy(update={"remarks": remarks}), "\n  ".join(remarks), rows


def _settings(
    data: str, overrides: Sequence[str], model: str | None, recipe: str | None, show: int
) -> _Settings:
    """The recipe's sections, or the defaults, for this data set and model; see `judge_file`."""
    unread = [override for override in overrides if override.startswith(("tokens.", "model."))]
    if not (model or recipe) and (unread or show):
        raise RecipeError(
            f"{f'--set {unread[0]}' if unread else '--show'} needs a model's tokenizer",
            "Set --model or --recipe",
        )
    sections: dict[str, Any] = {"data": {}, "gate": {}, "tokens": {}, "model": {}}
    if recipe:
        sections = load_recipe(recipe).model_dump(mode="json", include=set(sections))
    sections["data"] |= {"path": data, "openings": None, "mixture": None, "scenes": None}
    sections["data"] |= {"solid_scenes": False, "held_out_content": False}
    sections["model"] |= {"name": model} if model else {}
    return with_overrides(_Settings, sections, overrides, f"{data} cannot be checked", "Correct the override")


def _is_denoiser(config: ModelConfig) -> bool:
    """Whether a model is a diffusion model, of which no rule needs tokens."""
    return config.denoiser is not None or is_denoiser(Path(config.name).expanduser())


def tokenise_of(config: ModelConfig, tokens: TokenConfig) -> Tokenise:
    """The tokenizer that the stage `import-model` would use, with its template."""
    if is_external(config.name):
        from tasks.promotion.model_source import as_folder  # noqa: PLC0415 - imports MLflow, which takes seconds

        config, _ = as_folder(config, Path("runs"))
    folder = Path(config.name).expanduser()
    # Weights are not needed, so a folder with only a tokenizer suffices.
    source = folder if (folder / "tokenizer_config.json").is_file() else locate(config)
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    if config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    for template in templates_of(tokenizer):
        check_template(template)
    return Tokenise(tokenizer, tokens)


def _own_folder(folder: Path) -> Path:
    """Create the folder for this user alone; it is in the temporary folder, where all users can write.

    Raises:
        RecipeError: another user has put a link or a folder there.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise RecipeError(f"{folder} belongs to another user or is a link", "Set TMPDIR to your own folder")
    folder.chmod(0o700)
    return folder


def _counted(notes: dict[str, int]) -> str:
    """`24 rows read, 1 ties dropped`: the counts that are not zero."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in notes.items() if count)
