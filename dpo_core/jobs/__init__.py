"""The kinds of jobs: their job files (`files`), and a module for each kind, which every rank runs."""
