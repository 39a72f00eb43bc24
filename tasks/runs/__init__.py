"""Records of a workspace's runs: status, resolved recipe, and the artifacts that each run references."""
