"""The data gate: Great Expectations suites as Python builders with typed thresholds."""
