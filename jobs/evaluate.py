"""Evaluate against baselines and publish the bundle.

python -m jobs.evaluate --config jobs/configs/ml100k.yaml --out runs/ml100k [key=value ...]
"""

import sys

from jobs.command import main

if __name__ == "__main__":
    sys.exit(main(("evaluate",), "Evaluate against baselines and publish the bundle."))
