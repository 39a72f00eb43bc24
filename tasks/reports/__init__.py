"""Reports of runs, studies and evaluations: what they hold and how they are shown."""
