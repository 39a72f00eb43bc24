"""The method `online_dpo`: online and iterative DPO; its settings, data and trainer.

Online DPO (Guo et al. 2024, arXiv 2402.04792): many rounds, one step each, a fixed reference. Iterative DPO
(Xu et al. 2024, 2404.10719): few rounds of many episodes and steps; the reference of a round is the policy
that it began with.
"""

from pydantic import Field, model_validator

from dpo_core.methods.method import PREFERENCE, ROUNDS, Method
from dpo_core.methods.rounds import RoundsConfig
from dpo_core.objectives import ObjectiveName, Term, get


class OnlineDpoConfig(RoundsConfig):
    """Online or iterative preference optimisation."""

    objective: ObjectiveName = "dpo"
    """An objective on pairs that reads only log-probs of both sides; see `dpo objectives`."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Parameters of the objective."""
    samples_per_prompt: int = Field(2, ge=2)
    """Completions of each prompt in a round; the best and the worst make the pair."""
    epochs: int = Field(1, ge=1)
    """Passes over each round's pairs."""
    min_gap: float = Field(0.0, ge=0)
    """A pair whose scores differ by at most this is a tie and has no loss."""
    renew_reference: bool = False
    """false: the reference is fixed, as in online DPO; true: the reference of a round is the policy that it
    began with, as in iterative DPO."""

    @property
    def completions_per_prompt(self) -> int:
        return self.samples_per_prompt

    @property
    def term(self) -> Term:
        """The objective with every parameter filled in."""
        return Term(self.objective, 1.0, get(self.objective).resolve(self.parameters))

    @model_validator(mode="after")
    def _objective_fits(self) -> "OnlineDpoConfig":
        objective = get(self.objective)
        if objective.data != "pairs" or objective.extras or objective.batch_coupled:
            raise ValueError(
                f"objective '{self.objective}' reads more than the log-probs of a pair, which is all that "
                "online_dpo computes: choose another, such as dpo, ipo_mean or hinge"
            )
        if self.renew_reference and self.reference_ema is not None:
            raise ValueError("reference_ema moves a reference that renew_reference replaces: choose one")
        pairs = self.episodes // self.samples_per_prompt
        share = self.minibatches * self.micro_batch_size * self.engine.processes
        if pairs % share:
            raise ValueError(
                f"the {pairs} pairs of a round are not a multiple of minibatches x micro_batch_size x "
                f"processes = {share}"
            )
        return self


METHOD = Method(
    name="online_dpo",
    title="Online and iterative DPO",
    citation="Guo et al. 2024, arXiv 2402.04792; Xu et al. 2024, arXiv 2404.10719",
    settings=OnlineDpoConfig,
    data="prompts",
    curves=(*PREFERENCE[:-1], *ROUNDS),
    scored=True,
    reference=lambda config: "live",
    total_steps=lambda config, rows: config.iterations,
)
