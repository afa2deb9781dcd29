"""Encode the items' texts.

python -m jobs.encode --config jobs/configs/ml100k.yaml --out runs/ml100k [key=value ...]
"""

import sys

from jobs.command import main

if __name__ == "__main__":
    sys.exit(main(("encode",), "Encode the items' texts."))
