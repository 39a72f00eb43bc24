"""What methods that train on their own samples share: rounds, sampling, rollouts, and their mathematics."""
