"""Rewards of completions: functions, HTTP servers, reward models, and the quality of reward models."""
