"""Adapters for prompts of images: GenEval's records and T2I-CompBench's lists."""

from dpo_core.data.layouts.adapter import Adapter
from dpo_core.data.layouts.fields import Fault, PromptFields, Row, compact, text
from dpo_core.errors import DataError
from dpo_core.images.records import read_record


def geneval(row: Row) -> PromptFields:
    """A prompt with what its image must show (GenEval's `evaluation_metadata.jsonl`), kept as metadata."""
    prompt = text(row, "prompt")
    try:
        record = compact({name: row[name] for name in row if row[name] is not None})
        read_record(record)
    except DataError as error:
        raise Fault(error.problem) from error
    except (TypeError, ValueError) as error:  # bytes, NaN
        raise Fault(f"the row is not a record as JSON ({error})") from error
    return PromptFields(prompt, False, metadata=record)


def compbench(row: Row) -> PromptFields:
    """A line of a text file; the file's name tells the category, as in T2I-CompBench's `color_train.txt`."""
    stem = text(row, "file").removeprefix("compbench_").partition(".")[0]
    category = stem.removesuffix("_train").removesuffix("_val")
    return PromptFields(text(row, "line"), False, metadata=compact({"category": category}))


FORMATS = {
    "geneval": Adapter(
        "a prompt with the objects that its image must show (GenEval)",
        geneval,
        ("tag", "include", "prompt"),
        kind="prompts",
    ),
    "compbench": Adapter(
        "lines of a text file, a prompt of an image each (T2I-CompBench)",
        compbench,
        ("line", "file"),
        kind="prompts",
    ),
}
