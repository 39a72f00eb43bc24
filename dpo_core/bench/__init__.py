"""Speed and memory against TRL: the same model, pairs, tokens, optimiser and reference values for both.

`workloads` makes the pairs, `contender` runs one side in a process of its own, `speed_comparison` compares.
"""
