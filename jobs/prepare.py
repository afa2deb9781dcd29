"""Validate a log and cut it into windows.

python -m jobs.prepare --config jobs/configs/ml100k.yaml --out runs/ml100k [key=value ...]
"""

import sys

from jobs.command import main

if __name__ == "__main__":
    sys.exit(main(("prepare",), "Validate a log and cut it into windows."))
