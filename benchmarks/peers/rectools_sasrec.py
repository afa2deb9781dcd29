"""RecTools' SASRec: runs in its own environment, started by benchmarks/vs_sasrec.py."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from common import Watch, arguments

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

SETTINGS = arguments()

import pandas as pd
import pytorch_lightning as pl
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers

watch = Watch()


class Timer(pl.Callback):
    """Counts the epochs' batches alone: neither the preparation of data nor that of the trainer."""

    def on_train_epoch_start(self, *_: Any) -> None:
        watch.start()

    def on_train_epoch_end(self, *_: Any) -> None:
        watch.stop()


def trainer() -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(max_epochs=1, devices=1, accelerator="cpu", callbacks=[Timer()], precision=SETTINGS["precision"], **quiet)


frame = pd.read_csv(SETTINGS["log"], dtype={"user_id": str, "item_id": str})
frame["datetime"] = pd.to_datetime(frame["place"], unit="s")  # the order of the log, ties and all
frame["weight"] = 1.0
dataset = Dataset.construct(frame[["user_id", "item_id", "weight", "datetime"]])
length = SETTINGS["window"]
per_epoch = int((frame.groupby("user_id").size() - 1).clip(upper=length).sum())
layers = {"transformer_layers_type": PreLNTransformerLayers} if SETTINGS["pre_norm"] else {}
model = SASRecModel(
    n_factors=SETTINGS["width"], n_blocks=SETTINGS["layers"], n_heads=SETTINGS["heads"], dropout_rate=SETTINGS["dropout"],
    session_max_len=length, loss="softmax", batch_size=SETTINGS["batch"], lr=SETTINGS["learning_rate"], epochs=1,
    get_trainer_func=trainer, recommend_torch_device="cpu", **layers,
)  # fmt: skip
users = frame["user_id"].unique()
epochs, due = 0, SETTINGS["every"]
while watch.processor < SETTINGS["seconds"]:
    model.fit_partial(dataset, min_epochs=1, max_epochs=1)
    epochs += 1
    if epochs == 1 and SETTINGS["warm_up"]:
        watch, epochs = Watch(), 0
        SETTINGS["warm_up"] = False
        continue
    lists = None
    if SETTINGS["lists"] and watch.processor >= due:
        due += SETTINGS["every"] * (1 + (watch.processor - due) // SETTINGS["every"])
        table = model.recommend(users=users, dataset=dataset, k=10, filter_viewed=True)
        lists = {user: rows["item_id"].tolist() for user, rows in table.sort_values("rank").groupby("user_id")}
    watch.say(epochs * per_epoch, lists)
