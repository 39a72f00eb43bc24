"""Generated prompts and demonstrations, for runs without data files."""
