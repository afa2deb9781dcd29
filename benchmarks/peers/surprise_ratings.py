"""Surprise's rating models: runs in its own environment, started by benchmarks/against_peers.py.

Valid is answered by a model of the training events, test by one of those and the valid events; the time is the first one's.
"""

from __future__ import annotations

from typing import Any

from common import Watch, arguments

SETTINGS = arguments()

import pandas as pd
from surprise import SVD, BaselineOnly, Dataset, KNNBaseline, Reader, SVDpp

MODELS = {"svd": SVD, "svdpp": SVDpp, "baseline": BaselineOnly, "knn": KNNBaseline}
folder, watch = SETTINGS["folder"], Watch()
train, valid, test = (pd.read_csv(f"{folder}/{split}.csv") for split in ("train", "valid", "test"))


def fitted(frame: pd.DataFrame) -> Any:
    data = Dataset.load_from_df(frame[["user", "item", "rating"]], Reader(rating_scale=(1, 5)))
    seed = {"random_state": SETTINGS["seed"]} if SETTINGS["model"] in ("svd", "svdpp") else {}
    options = {"verbose": False} | SETTINGS["options"]
    return MODELS[SETTINGS["model"]](**seed, **options).fit(data.build_full_trainset())


def ratings_of(model: Any, frame: pd.DataFrame) -> dict[str, Any]:
    return {"rating": {str(u): model.predict(u, i).est for u, i in zip(frame["user"], frame["item"], strict=True)}}


watch.start()
model = fitted(train)
watch.stop()
watch.say(len(train), ratings_of(model, valid), ratings_of(fitted(pd.concat([train, valid])), test))
