"""Online training (PPO, GRPO, online DPO): the loop over rounds, sampling, rollouts, and the arithmetic."""
