"""What the stages and the run page say of rows that an objective on single answers learns from."""

import pandas as pd

from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.kto import imbalance
from tasks.store.facts import GateFacts, facts_of
from tasks.store.manifest import Manifest, kind_of


def taken_apart(config: DpoConfig, pairs: int) -> str:
    """What an objective on unpaired rows makes of pairs, in words."""
    return (
        f"objective {config.objective} learns from single answers: {pairs:,} pairs are taken apart, chosen "
        "as desirable and rejected as undesirable"
    )


def class_facts(config: DpoConfig, rows: Manifest) -> dict[str, str]:
    """Notes for the run page: how many answers of each label, and class weights that are out of balance."""
    if not config.unpaired:
        return {}
    if kind_of(rows) == "pairs":
        split = pd.read_parquet(rows.path / "data.parquet", columns=["split"])["split"]
        good = bad = int((split == "train").sum())
        notes = {"Training data": taken_apart(config, good)}
    else:
        facts = facts_of(rows, GateFacts)
        good, bad = facts.desirable or 0, facts.undesirable or 0
        notes = {"Training data": f"{good:,} desirable and {bad:,} undesirable answers"}
    found = imbalance(config.terms[0].parameters, good, bad)
    return notes | ({"Class weights": found} if found else {})
