"""The command line `dpo`: a file per command, which imports its body from `flows.commands` when called."""
