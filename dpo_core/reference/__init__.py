"""Reference log-probs, computed once and kept: one entry per (prompt, completion), addressed by content.

`keys` names entries and caches, `shard` is one file of entries, `cache` all of them for one reference; none
of the three needs torch. `compute` fills a cache in one process, `logps` on all ranks of a job.
"""

from dpo_core.reference.cache import ReferenceCache
from dpo_core.reference.keys import reference_facts, reference_key, sequence_key
from dpo_core.reference.shard import LogpShard

__all__ = [
    "LogpShard",
    "ReferenceCache",
    "reference_facts",
    "reference_key",
    "sequence_key",
]
