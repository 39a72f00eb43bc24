"""The registry of methods can be read without importing torch."""

import subprocess
import sys

LISTED = """
import sys
from dpo_core.methods.registry import methods

assert {"dpo", "kto", "sft", "reward"} < methods().keys()
print(*sorted({"torch", "transformers", "deepspeed", "safetensors", "numpy"} & sys.modules.keys()))
"""


def test_settings_import_no_torch_and_no_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", LISTED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
