"""The kinds of jobs: what each is told (`files`), and one module a kind that every rank runs."""
