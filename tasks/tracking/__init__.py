"""What MLflow is told, and what is kept for it while it is away."""
