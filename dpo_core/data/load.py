"""Loads the recipe's data and its evaluation set into canonical tables: files, a mixture, or openings."""

from collections.abc import Sequence

from dpo_core.data.config import DataConfig, SourceConfig
from dpo_core.data.demo.reviews import review_openings
from dpo_core.data.layouts.fields import PromptFields
from dpo_core.data.mixture import load_mixture
from dpo_core.data.records import Loaded, load_source, subsample, to_frame
from dpo_core.images.prompts import ALL, HELD_OUT, PROMPT_FILES, records
from dpo_core.images.records import Record, read_record
from dpo_core.images.solid import prompts
from dpo_core.system import digest_text


def load(config: DataConfig) -> Loaded:
    """The canonical table of `config.path`, `config.mixture`, or `config.openings` generated prompts.

    Raises:
        DataError: the source cannot be read, or its format is not recognised.
    """
    if config.mixture is not None:
        return subsample(load_mixture(config), config.limit, config.seed)
    if config.scenes is not None:
        return _prompts_of(own_records(config), "self-made prompts of scenes")
    if config.solid_scenes:
        return _prompts_of(prompts(held_out=False), "prompts of solid scenes")
    if config.path is None:
        texts = review_openings(config.openings or 0, config.seed)
        frame = to_frame([PromptFields(text, False) for text in texts], "prompts")
        return Loaded(frame, "prompts", "prompts", "self-made review openings", {"rows_read": len(texts)})
    source = SourceConfig(path=config.path, format=config.format, split=config.split, columns=config.columns)
    return subsample(load_source(source, config), config.limit, config.seed)


def _prompts_of(asked: Sequence[Record], remark: str) -> Loaded:
    fields = [PromptFields(record.prompt, False, metadata=record.to_json()) for record in asked]
    return Loaded(to_frame(fields, "prompts"), "prompts", "prompts", remark, {"rows_read": len(fields)})


def own_records(config: DataConfig) -> list[Record]:
    """The generated records, without those that the suite `scenes` asks for."""
    asked = {read_record(line).prompt for line in PROMPT_FILES["comp"].read_text().splitlines()}
    content = HELD_OUT if config.held_out_content else ALL
    drawn = records("comp", (config.scenes or 0) + len(asked), config.seed, content)
    tags: dict[str, list[Record]] = {}
    for record in drawn:
        if record.prompt not in asked:
            tags.setdefault(record.tag, []).append(record)
    return [record for made in tags.values() for record in made[: config.scenes]]


def load_eval(config: DataConfig) -> Loaded | None:
    """The table of `config.eval_path`, without the limit for training data, or the held-out prompts of solid
    scenes; None without either."""
    if config.solid_scenes:
        # Mixed, so that the first ones, which a run shows, are of every category.
        mixed = sorted(prompts(held_out=True), key=lambda record: digest_text(record.prompt))
        return _prompts_of(mixed, "prompts of solid scenes")
    if config.eval_path is None:
        return None
    source = SourceConfig(
        path=config.eval_path, format=config.format, split=config.eval_split, columns=config.columns
    )
    return load_source(source, config, evaluation=True)
