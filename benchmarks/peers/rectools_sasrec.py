"""RecTools' SASRec: runs in its own environment, started by benchmarks/vs_sasrec.py and against_peers.py."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from common import Watch, arguments, one_thread

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

SETTINGS = arguments()
one_thread(SETTINGS["seed"])

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


train, valid = (pd.read_csv(f"{SETTINGS['folder']}/{split}.csv", dtype={"user": str, "item": str}) for split in ("train", "valid"))


def dataset_of(frame: pd.DataFrame) -> Dataset:
    frame = frame.rename(columns={"user": "user_id", "item": "item_id"})
    frame["datetime"] = pd.to_datetime(frame["place"], unit="s")  # the order of the log, ties and all
    frame["weight"] = 1.0
    return Dataset.construct(frame[["user_id", "item_id", "weight", "datetime"]])


dataset, later = dataset_of(train), dataset_of(pd.concat([train, valid]))
length = SETTINGS["window"]
per_epoch = int((train.groupby("user").size() - 1).clip(upper=length).sum())
layers = {"transformer_layers_type": PreLNTransformerLayers} if SETTINGS["pre_norm"] else {}
model = SASRecModel(
    n_factors=SETTINGS["width"], n_blocks=SETTINGS["layers"], n_heads=SETTINGS["heads"], dropout_rate=SETTINGS["dropout"],
    session_max_len=length, loss="softmax", batch_size=SETTINGS["batch"], lr=SETTINGS["learning_rate"], epochs=1,
    get_trainer_func=trainer, recommend_torch_device="cpu", **layers,
)  # fmt: skip
users = train["user"].unique()
epochs, due = 0, SETTINGS["every"]


def lists_of(known: Dataset) -> dict[str, Any]:
    """Ten items for each user after what the data hold of them."""
    table = model.recommend(users=users, dataset=known, k=10, filter_viewed=True).sort_values("rank")
    return {"lists": {user: [int(i) for i in rows["item_id"]] for user, rows in table.groupby("user_id")}}


while watch.processor < SETTINGS["seconds"]:
    model.fit_partial(dataset, min_epochs=1, max_epochs=1)
    epochs += 1
    if epochs == 1 and SETTINGS["warm_up"]:
        watch, epochs = Watch(), 0
        SETTINGS["warm_up"] = False
        continue
    wanted = SETTINGS["lists"] and watch.processor >= due
    if wanted:
        due += SETTINGS["every"] * (1 + (watch.processor - due) // SETTINGS["every"])
    watch.say(epochs * per_epoch, lists_of(dataset) if wanted else None, lists_of(later) if wanted and SETTINGS["test"] else None)
