"""MLflow tracking: writing runs and registering models, with a retry queue for outages."""
