"""Keys of reference log-probs and of their cache folders.

Key of an entry: the exact ids of prompt and completion, and the mask if not all of them are learnt. Key of a
cache folder: the reference's weight files, the precision, the attention implementation and the definition
version. The recipe is in neither: a changed learning rate recomputes nothing, a changed weight, template or
token recomputes what it affects.
"""

import hashlib
import struct
from typing import TYPE_CHECKING

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.reference.cache import ReferenceFacts

if TYPE_CHECKING:
    from dpo_core.scoring.precision import Precision

# Part of the key of every cache folder: raise it when the values of `compute` may change.
DEFINITION_VERSION = 2


def sequence_key(sequence: TokenSequence) -> bytes:
    """16 bytes that identify a (prompt, completion): its ids, the end of the prompt, and the learnt mask."""
    prompt, completion = sequence.prompt, sequence.completion
    # Takes two thirds of the time of an array of the ids.
    content = struct.pack(f"<{1 + len(prompt) + len(completion)}q", len(prompt), *prompt, *completion)
    if sequence.learnt is not None:
        content += bytes(sequence.learnt)
    return hashlib.sha256(content).digest()[:16]


def reference_facts(
    weights_sha256: str, precision: "Precision", attention: str, model: str = ""
) -> ReferenceFacts:
    """Everything that determines a reference log-prob, except the text; and a description of the model."""
    return ReferenceFacts(
        weights_sha256=weights_sha256,
        precision=precision,
        attention=attention,
        definition_version=DEFINITION_VERSION,
        model=model,
    )


def reference_key(weights_sha256: str, precision: "Precision", attention: str) -> str:
    """The name of a reference's cache folder."""
    return reference_facts(weights_sha256, precision, attention).key
