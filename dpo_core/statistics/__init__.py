"""Statistics: estimates with intervals, significance tests, and text metrics."""
