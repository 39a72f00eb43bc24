"""What all training shares: loop, engine, batches, checkpoints, ranks."""
