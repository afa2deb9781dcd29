"""implicit's matrix factorisation and neighbours: runs in its own environment, started by benchmarks/against_peers.py.

Valid is answered by a model of the training events, test by one of those and the valid events; the time is the first one's.
"""

from __future__ import annotations

from typing import Any

from common import Watch, arguments

SETTINGS = arguments()

import numpy as np
import pandas as pd
import scipy.sparse as sp
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.lmf import LogisticMatrixFactorization
from implicit.nearest_neighbours import BM25Recommender

MODELS = {
    "als": AlternatingLeastSquares,
    "bpr": BayesianPersonalizedRanking,
    "lmf": LogisticMatrixFactorization,
    "bm25": BM25Recommender,
}
folder, watch = SETTINGS["folder"], Watch()
train, valid = (pd.read_csv(f"{folder}/{split}.csv") for split in ("train", "valid"))
users, items = SETTINGS["users"], SETTINGS["items"]


def fitted(frame: pd.DataFrame) -> tuple[Any, sp.csr_matrix]:
    ones = np.ones(len(frame), np.float32)
    matrix = sp.csr_matrix((ones, (frame["user"], frame["item"])), shape=(users, items))
    seed = {} if SETTINGS["model"] == "bm25" else {"random_state": SETTINGS["seed"]}
    model = MODELS[SETTINGS["model"]](num_threads=1, **seed, **SETTINGS["options"])
    model.fit(matrix, show_progress=False)
    return model, matrix


def lists_of(model: Any, matrix: sp.csr_matrix) -> dict[str, Any]:
    found, _ = model.recommend(np.arange(users), matrix, N=10, filter_already_liked_items=True)
    return {"lists": {str(user): [int(i) for i in row if i >= 0] for user, row in enumerate(found)}}


watch.start()
model, matrix = fitted(train)
watch.stop()
later = pd.concat([train, valid])
watch.say(len(train), lists_of(model, matrix), lists_of(*fitted(later)))
