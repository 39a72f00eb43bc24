"""Loads a mixture: several data sets in one table, each sampled to its weight and named in `source`."""

from dataclasses import replace

import pandas as pd

from dpo_core.data.config import DataConfig, SourceConfig
from dpo_core.data.records import Loaded, load_source, subsample
from dpo_core.errors import DataError


def load_mixture(config: DataConfig) -> Loaded:
    """The sets of `config.mixture` one after another, with continuous row numbers. With weights, the largest
    table in which the sets have their shares and no row repeats.

    Raises:
        DataError: a set cannot be read, the sets differ in kind, or a share is less than one row.
    """
    sources = config.mixture or []
    names = _names(sources)
    parts, first = [], 0
    remarks: list[str] = []
    for source, name in zip(sources, names, strict=True):
        part = load_source(source, config)
        read = part.notes["rows_read"]
        frame = part.frame.assign(row=part.frame["row"] + first)
        frame["source"] = pd.array([name] * len(frame), dtype=part.frame["source"].dtype)
        remarks.append(f"rows {first + 1} to {first + read} are those of {name} ({part.format})")
        remarks += [f"{name}: {sentence}" for sentence in part.remarks]
        parts.append(subsample(replace(part, frame=frame), source.limit, config.seed))
        first += read
    kinds = {name: part.kind for name, part in zip(names, parts, strict=True)}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} has {kind}" for name, kind in kinds.items())
        raise DataError(f"the sets of data.mixture differ in kind: {listed}", "Mix sets of the same kind")
    parts = _weighted(parts, sources, names, config.seed)
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    notes = {key: sum(part.notes.get(key, 0) for part in parts) for part in parts for key in part.notes}
    counts = ", ".join(f"{name} {len(part.frame)}" for name, part in zip(names, parts, strict=True))
    formats = dict.fromkeys(part.format for part in parts)
    return Loaded(
        frame,
        parts[0].kind,
        parts[0].format,
        f"a mixture of {len(parts)} sets ({', '.join(formats)}; rows taken: {counts})",
        notes,
        remarks,
    )


def _names(sources: list[SourceConfig]) -> list[str]:
    """The name of each set: its path, with its split or position if several sets have the same path."""
    paths = [source.path for source in sources]
    names = [
        f"{source.path} ({source.split})" if paths.count(source.path) > 1 and source.split else source.path
        for source in sources
    ]
    return [f"{name} #{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _weighted(parts: list[Loaded], sources: list[SourceConfig], names: list[str], seed: int) -> list[Loaded]:
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return parts
    scale = min(len(part.frame) / weight for part, weight in zip(parts, weights, strict=True))
    # The set that decides the scale keeps all its rows, whatever the rounding.
    counts = [int(weight * scale + 1e-9) for weight in weights]
    if 0 in counts:
        name = names[counts.index(0)]
        raise DataError(
            f"data.mixture: with these weights no row of {name} would be used",
            "Raise its weight, or add rows to the other sets",
        )
    return [subsample(part, count, seed) for part, count in zip(parts, counts, strict=True)]
