"""`python -m deploy.docker.bucket NAME`: make a bucket on the object store, unless it is there."""

import os
import sys

if __name__ == "__main__":
    import boto3

    store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    try:
        store.create_bucket(Bucket=sys.argv[1])
    except store.exceptions.BucketAlreadyOwnedByYou:
        print(f"the bucket {sys.argv[1]} is there")
