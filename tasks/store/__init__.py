"""The artifact store: manifests, locks, files."""
