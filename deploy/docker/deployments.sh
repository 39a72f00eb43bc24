#!/bin/sh
# The process pool from its template, and the deployments of the image, on the server that PREFECT_API_URL names.
set -eu
templates=$(python -c 'import deploy; print(deploy.__path__[0])')/work_pools
prefect work-pool create dpo --type process --base-job-template "$templates/process.json" --overwrite
dpo deploy
