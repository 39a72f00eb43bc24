"""Reports of runs, studies and evaluations: their data and their pages, tables and figures."""
