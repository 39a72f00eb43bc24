"""Training, independent of the method: loop, engine, batches, checkpoints, ranks."""
