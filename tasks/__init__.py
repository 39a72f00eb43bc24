"""One Prefect task a stage, and what the stages share: the artifact store, tracking, the recipe."""
