"""Loads the recipe's data and its evaluation set into canonical tables: files, a mixture, or openings."""

from dpo_core.data.config import DataConfig, SourceConfig
from dpo_core.data.demo.reviews import review_openings
from dpo_core.data.layouts.fields import PromptFields
from dpo_core.data.mixture import load_mixture
from dpo_core.data.records import Loaded, load_source, subsample, to_frame


def load(config: DataConfig) -> Loaded:
    """The canonical table of `config.path`, `config.mixture`, or `config.openings` generated prompts.

    Raises:
        DataError: the source cannot be read, or its format is not recognised.
    """
    if config.mixture is not None:
        return subsample(load_mixture(config), config.limit, config.seed)
    if config.path is None:
        texts = review_openings(config.openings or 0, config.seed)
        frame = to_frame([PromptFields(text, False) for text in texts], "prompts")
        return Loaded(frame, "prompts", "prompts", "self-made review openings", {"rows_read": len(texts)})
    source = SourceConfig(path=config.path, format=config.format, split=config.split, columns=config.columns)
    return subsample(load_source(source, config), config.limit, config.seed)


def load_eval(config: DataConfig) -> Loaded | None:
    """The table of `config.eval_path`, without the limit for training data; None without a path."""
    if config.eval_path is None:
        return None
    source = SourceConfig(
        path=config.eval_path, format=config.format, split=config.eval_split, columns=config.columns
    )
    return load_source(source, config, evaluation=True)
