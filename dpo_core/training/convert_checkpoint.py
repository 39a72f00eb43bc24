"""Runs DeepSpeed's checkpoint converter with restricted unpickling."""

import sys
from pathlib import Path

from dpo_core.errors import StageFailed
from dpo_core.training.checkpoints import restricted_unpickling


def main() -> None:
    """Entry point; the options are those of `deepspeed.checkpoint.ds_to_universal`."""
    from deepspeed.checkpoint import ds_to_universal  # noqa: PLC0415 - after set_accelerator

    arguments = ds_to_universal.parse_arguments()
    with restricted_unpickling(Path(arguments.input_folder)):
        ds_to_universal.main(arguments)


if __name__ == "__main__":
    try:
        main()
    except StageFailed as error:
        sys.exit(error.problem)
