"""The data gate: checks data with Great Expectations suites built in Python, with typed thresholds."""

import os

# Great Expectations reads it when it is imported.
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
