"""The data gate: checks data with Great Expectations suites built in Python, with typed thresholds."""
