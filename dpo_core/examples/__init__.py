"""Training examples that methods make from rows."""
