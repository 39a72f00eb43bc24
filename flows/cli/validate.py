"""`dpo validate`: the data gate alone, on a file, without a run."""

import contextlib
import hashlib
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
from dpo_core.data.tokens.tokenise import TokenConfig, Tokenise
from dpo_core.errors import RecipeError
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import load_tokenizer, templates_of
from dpo_core.models.source import locate, read_template
from expectations.config import GateConfig
from expectations.drift import load_baseline
from expectations.gate import judge
from expectations.report import GateReport
from expectations.token_rules import Tokenisation
from flows.cli.shown_rows import as_data, as_text, shown
from tasks.promotion.model_source import as_folder
from tasks.recipe.read import with_overrides


class _Asked(Config):
    """The slices of a recipe that the gate reads."""

    data: DataConfig
    """The data."""
    gate: GateConfig
    """The gate."""
    tokens: TokenConfig
    """How rows become tokens; read where there is a model."""
    model: ModelConfig
    """Whose tokenizer and chat template; read where there is a model."""


class Rows(NamedTuple):
    """The first rows as a model will see them."""

    texts: list[str]
    """For people."""
    data: dict[str, Any]
    """For scripts: `rows` in place of their number, which is then `row_count`; empty if none is shown."""


def judge_file(
    data: str, overrides: Sequence[str], model: str | None = None, show: int = 0
) -> tuple[GateReport, str, Rows]:
    """The gate's report on a data set, the lines that say how it was read, and its first rows.

    Args:
        overrides: `data.x=value` and `gate.x.y=value`, as in a recipe, and with a model `tokens.x=value` and
            `model.x=value`.
        model: as `model.name` in a recipe; without one, rules that need tokens are skipped.
        show: so many rows are shown as the model will see them.

    Raises:
        DataError: the data cannot be read.
        ModelError: the tokenizer or the chat template cannot be used.
        RecipeError: an override cannot be used.
    """
    if model is None:
        _require_model(overrides, show)
    named = {"name": model} if model else {}
    given: dict[str, Any] = {"data": {"path": data}, "gate": {}, "tokens": {}, "model": named}
    asked = with_overrides(_Asked, given, overrides, f"{data} cannot be judged", "Mend the override")
    config, gate = asked.data, asked.gate
    loaded = load(config)
    frame = split_table(loaded, config)
    tokenise = _tokenise(asked) if model else None
    baseline = load_baseline(gate.baseline) if gate.baseline else None
    # One folder a data set, so that asking again replaces the last answer.
    name = hashlib.sha256(os.path.abspath(data).encode()).hexdigest()[:12]
    docs = _own_folder(Path(tempfile.gettempdir()) / f"dpo-gate-{os.getuid()}") / name
    shutil.rmtree(docs, ignore_errors=True)
    report, _ = judge(
        frame,
        subject=loaded.kind,
        config=gate,
        docs_dir=docs,
        baseline=baseline,
        tokenisation=Tokenisation(**tokenise.gate_settings()) if tokenise else None,
    )
    said = [f"{loaded.format} ({loaded.recognised_by}); {_counted(loaded.notes)}", *loaded.remarks]
    if config.eval_path is not None:
        said.append(f"held out: {int((frame['split'] == 'eval').sum())} rows of {config.eval_path}")
    for name, count in by_source(frame).items():
        said.append(f"{name}: {count['train']} rows to train on, {count['eval']} held out")
    rows = Rows([], {})
    if tokenise is not None:
        said += [note] if (note := tokenise.note_on(frame["chat"].tolist())) else []
        sides = list(shown(frame, loaded.kind, tokenise, show))
        listed = [as_data(one, tokenise) for one in sides]
        # The report's own `rows` is a number.
        counted = {"rows": listed, "row_count": report.rows} if show else {}
        rows = Rows([as_text(one, tokenise) for one in sides], counted)
    return report.model_copy(update={"remarks": said}), "\n  ".join(said), rows


def _require_model(overrides: Sequence[str], show: int) -> None:
    unread = [one for one in overrides if one.startswith(("tokens.", "model."))]
    if unread or show:
        raise RecipeError(
            f"{f'--set {unread[0]}' if unread else '--show'} needs a model's tokenizer", "Name it by --model"
        )


def _tokenise(asked: _Asked) -> Tokenise:
    """The tokenizer that `import-model` would keep, with its template."""
    from dpo_core.data.tokens.chat_template import check_template

    config, _ = as_folder(asked.model, Path("runs"))
    folder = Path(config.name).expanduser()
    # Weights are not needed: a folder with a tokenizer alone will do.
    source = folder if (folder / "tokenizer_config.json").is_file() else locate(config)
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    if config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    for template in templates_of(tokenizer):
        check_template(template)
    return Tokenise(tokenizer, asked.tokens)


def _own_folder(folder: Path) -> Path:
    """The folder, made for this user alone: everybody may write beside it, and knows its name.

    Raises:
        RecipeError: somebody else has put a link or a folder there.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise RecipeError(f"{folder} is not this user's own folder", "Set TMPDIR to a folder of yours")
    folder.chmod(0o700)
    return folder


def _counted(notes: dict[str, int]) -> str:
    """`24 rows read, 1 ties dropped`: the counts that are not zero."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in notes.items() if count)
