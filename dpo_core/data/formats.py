"""The registry of data formats, and the recognition of the format of rows."""

import difflib
import json
import shlex
from collections.abc import Sequence

from dpo_core.data import layouts
from dpo_core.data.layouts.adapter import Adapter
from dpo_core.data.layouts.fields import Fault, Row, type_of
from dpo_core.errors import DataError
from dpo_core.system import import_modules

SAMPLE_ROWS = 100
ADAPTERS: dict[str, Adapter] = {
    name: adapter
    for module in import_modules(layouts)
    for name, adapter in getattr(module, "FORMATS", {}).items()
}
"""All formats by name, from the `FORMATS` of the modules in `layouts`."""


def recognise(rows: Sequence[Row]) -> tuple[str, str]:
    """The only format that at least half of the first rows fit, and a sentence with the reason.

    Raises:
        DataError: no format fits, or several do.
    """
    sample = rows[:SAMPLE_ROWS]
    fitting = {
        name: count
        for name, adapter in ADAPTERS.items()
        if 2 * (count := sum(map(adapter.recognises, sample))) >= len(sample) > 0
    }
    if len(fitting) == 1:
        ((name, count),) = fitting.items()
        return name, f"{count} of the first {len(sample)} rows are {name}: {ADAPTERS[name].looks}"
    fields: dict[str, set[str]] = {}
    for row in sample:
        for key, value in row.items():
            fields.setdefault(str(key), set()).add("missing" if value is None else type_of(value))
    listed = ", ".join(f"{key} ({' or '.join(sorted(types))})" for key, types in fields.items())
    if fitting:
        candidates = "; ".join(f"{name}: {ADAPTERS[name].looks}" for name in fitting)
        raise DataError(
            f"the rows fit several formats ({candidates}); the fields are {listed}",
            f"Set data.format to one of: {', '.join(fitting)}",
        )
    nearest = _nearest(sample, list(fields))
    has_prompt = any(isinstance(row.get(name), str | list) for row in sample for name in ("prompt", "text"))
    raise DataError(
        f"the rows fit no known format{nearest[1]}; the fields are {listed}",
        "Rename the fields, map them with data.columns, or set data.format to one of "
        + ", ".join(sorted(ADAPTERS))
        + ("; data.format=prompts reads only the prompts" if has_prompt else "")
        + f"\n\n{_columns_of_pairs([name for name, types in fields.items() if 'string' in types])}",
    )


def _columns_of_pairs(fields: Sequence[str]) -> str:
    """How to say in a recipe, and as an option, which columns are prompt, chosen and rejected.

    Args:
        fields: columns of texts, whose order is the best guess.
    """
    shown = (name for name in [*fields, "…", "…", "…"])
    columns = json.dumps(dict(zip(("prompt", "chosen", "rejected"), shown, strict=False)), ensure_ascii=False)
    option = shlex.quote(f"data.columns={columns}")
    return (
        f"For pairs, say which column holds what, in a recipe:\n\ndata:\n  columns: {columns}\n\n"
        f"or as an option:\n\n--set {option}"
    )


def _nearest(sample: Sequence[Row], fields: list[str]) -> tuple[str | None, str]:
    """The format that has most of the fields, and the reason why the rows do not fit it."""
    best: str | None = None
    share, absent = 0.0, [""]
    for name, adapter in ADAPTERS.items():
        missing = [column for column in adapter.columns if column not in fields]
        present = 1 - len(missing) / len(adapter.columns) if adapter.columns else 0.0
        if present > share:
            best, share, absent = name, present, missing
    if best is None or share < 0.6:
        return None, ""
    why = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing" if absent else ""
    for column in absent:
        near = difflib.get_close_matches(column, fields, n=1, cutoff=0.75)
        why += f" (similar: {near[0]})" if near else ""
    if not absent:
        why = next(
            filter(None, (_fault(ADAPTERS[best], row) for row in sample)), "their fields have other types"
        )
    return best, f" (they look like {best}, but {why})"


def _fault(adapter: Adapter, row: Row) -> str:
    try:
        adapter.convert(row)
    except Fault as fault:
        return str(fault)
    except Exception as error:
        return f"a row cannot be read ({type(error).__name__})"
    return ""
