"""The bodies of the commands of `flows.cli`, which import what they need at the top."""
