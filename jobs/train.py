"""Train with Ray Train.

python -m jobs.train --config jobs/configs/ml100k.yaml --out runs/ml100k [key=value ...]
"""

import sys

from jobs.command import main

if __name__ == "__main__":
    sys.exit(main(("train",), "Train with Ray Train."))
