"""Health check of a server, because the image has no curl: `python -m deploy.docker.healthcheck URL`."""

import sys
import urllib.request

if __name__ == "__main__":
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=8) as answer:
            answer.read()
    except OSError as error:  # an HTTP error is one too
        sys.exit(f"{sys.argv[1]}: {error}")
