"""The whole main job: prepare, encode, train, index, evaluate, score.

python -m jobs.pipeline --config jobs/configs/ml100k.yaml --out runs/ml100k [key=value ...]
"""

import sys

from jobs.command import main
from mtrec_ray.pipeline import STAGES

if __name__ == "__main__":
    sys.exit(main(STAGES, "Run every stage; finished ones are reused by fingerprint."))
