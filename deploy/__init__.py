"""Where a training job runs: launchers that share one protocol."""
