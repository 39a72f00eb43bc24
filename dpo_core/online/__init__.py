"""Training on the policy's own samples: PPO, GRPO and its relatives, RLOO, online and iterative DPO.

`rounds` is the loop that all share, `rollouts` what a round samples, `*_math` the arithmetic without models.
"""
