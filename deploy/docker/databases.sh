#!/bin/sh
# Run once by the Postgres image, when its volume is empty: a user for each server, and the databases it owns.
set -eu

owner() {
    # psql quotes the password itself; on a command line others would see it.
    psql --username "${POSTGRES_USER:-postgres}" --dbname postgres --set ON_ERROR_STOP=1 <<SQL
\\getenv password $2
CREATE ROLE $1 LOGIN PASSWORD :'password';
SQL
}

database() {
    psql --username "${POSTGRES_USER:-postgres}" --dbname postgres --set ON_ERROR_STOP=1 <<SQL
CREATE DATABASE $1 OWNER $2;
REVOKE CONNECT ON DATABASE $1 FROM PUBLIC;
SQL
}

owner mlflow MLFLOW_DATABASE_PASSWORD
owner prefect PREFECT_DATABASE_PASSWORD
database mlflow mlflow
database mlflow_auth mlflow
database prefect prefect
# Prefect searches texts by trigrams, and only a superuser may add that.
psql --username "${POSTGRES_USER:-postgres}" --dbname prefect --set ON_ERROR_STOP=1 \
    --command 'CREATE EXTENSION IF NOT EXISTS pg_trgm'
