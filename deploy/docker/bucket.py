"""Creates a bucket on the object store if it does not exist: `python -m deploy.docker.bucket NAME`."""

import os
import sys

import boto3

if __name__ == "__main__":
    store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    try:
        store.create_bucket(Bucket=sys.argv[1])
    except store.exceptions.BucketAlreadyOwnedByYou:
        print(f"the bucket {sys.argv[1]} exists already")
