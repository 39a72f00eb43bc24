"""What names a reference log-prob, and the cache that holds it.

Key of an entry: the exact ids of prompt and completion, and the mask where not all of them are learnt. Key of
a cache folder: the reference's weight files, the precision, the attention implementation and the definition
version. The run's configuration is in neither, so a changed learning rate recomputes nothing, and a changed
weight, template or token what it touches.
"""

import hashlib
import struct
from typing import TYPE_CHECKING

from dpo_core.data.tokens.tokenise import Sequence
from dpo_core.reference.cache import ReferenceFacts

if TYPE_CHECKING:
    from dpo_core.scoring.precision import Precision

# Part of every key of a cache: raise it whenever the numbers of `compute` could change.
DEFINITION_VERSION = 2


def sequence_key(sequence: Sequence) -> bytes:
    """16 bytes that name one (prompt, completion) by its ids, where the prompt ends, and what is learnt."""
    prompt, completion = sequence.prompt, sequence.completion
    # Two thirds of the time that an array of the ids would take.
    content = struct.pack(f"<{1 + len(prompt) + len(completion)}q", len(prompt), *prompt, *completion)
    if sequence.learnt is not None:
        content += bytes(sequence.learnt)
    return hashlib.sha256(content).digest()[:16]


def reference_facts(
    weights_sha256: str, precision: "Precision", attention: str, model: str = ""
) -> ReferenceFacts:
    """Everything but the text that decides a reference log-prob, and the model in words."""
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
