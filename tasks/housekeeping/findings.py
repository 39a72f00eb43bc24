"""What a garbage collection keeps and removes, and why."""

from dpo_core.config import Config


class Kept(Config):
    """Something that is kept, and why."""

    what: str
    """`run NAME`, `dpo-demo version 3`, `model 66fed04e8a6e7aea`, or `3 entries of judgements`."""
    why: str
    """Of a run: newest, unfinished, study or named. Of others: an alias, rollback, evaluated or recent."""
    bytes: int
    """Size of what it needs, without what something before it needs."""


class Removed(Config):
    """Something to remove, and why."""

    what: str
    """`model 66fed04e8a6e7aea`, or a path in the workspace."""
    why: str
    """unused; unfinished, by a killed process; or finished, of a stage's working folder."""
    bytes: int
