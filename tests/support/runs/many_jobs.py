"""Several training jobs one after the other in the same ranks, started by torchrun.

Starting ranks costs more than a tiny job. Each job runs through the real entry point of a rank.
"""

import sys

from dpo_core.job import main

if __name__ == "__main__":
    sys.exit(max(main(["--config", job]) for job in sys.argv[1:]))
