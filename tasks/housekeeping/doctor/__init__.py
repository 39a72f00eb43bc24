"""The common faults of an installation, a workspace and its servers; each check looks and changes nothing."""
