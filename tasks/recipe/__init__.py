"""The recipe: its fields, its checks, and reading it from YAML."""
