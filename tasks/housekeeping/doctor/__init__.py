"""Health checks (`dpo doctor`) of the installation, the workspace and its servers. Checks change nothing."""
