"""What completions are worth: functions, servers, and the quality of a reward model."""
