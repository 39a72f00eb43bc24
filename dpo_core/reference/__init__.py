"""The cache of reference log-probs: one entry per (prompt, completion), addressed by its content.

`keys` names entries and caches, `shard` stores some entries, `cache` has all shards of one reference; none of
the three needs torch. `compute` fills a cache in one process, `logps` on all ranks of a job.
"""

from dpo_core.reference.cache import ReferenceCache, ReferenceFacts
from dpo_core.reference.keys import sequence_key
from dpo_core.reference.shard import LogpShard

__all__ = [
    "LogpShard",
    "ReferenceCache",
    "ReferenceFacts",
    "sequence_key",
]
