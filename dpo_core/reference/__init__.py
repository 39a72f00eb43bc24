"""The cache of reference log-probs: one entry per (prompt, completion), addressed by its content.

`keys` names entries and caches, `shard` stores some entries, `cache` has all shards of one reference; none of
the three needs torch. `compute` fills a cache in one process, `logps` on all ranks of a job.
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
