"""Who is champion of a registered model, and how that changes."""
