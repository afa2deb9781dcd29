"""RecBole's SASRec: runs in its own environment, started by benchmarks/vs_sasrec.py and against_peers.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Watch, arguments, one_thread

SETTINGS = arguments()
one_thread(SETTINGS["seed"])

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer

logging.disable(logging.INFO)
watch = Watch()


class Limited:
    """Batches of the loader until this turn's time is up; the next turn goes on in the same epoch."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.shuffle, self.sampler = loader, getattr(loader, "shuffle", True), getattr(loader, "sampler", None)
        self.batches = iter(loader)
        self.until = 0.0
        self.targets = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        while watch.processor < self.until:
            watch.start()
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            yield batch
            watch.stop()
            self.targets += len(batch)


root = Path(SETTINGS["folder"]) / "recbole"
(root / "log").mkdir(parents=True, exist_ok=True)
parts = [pd.read_csv(f"{SETTINGS['folder']}/{split}.csv", dtype={"user": str, "item": str}) for split in ("train", "valid", "test")]
with open(root / "log" / "log.inter", "w") as out:
    out.write("user_id:token\titem_id:token\ttimestamp:float\n")
    pd.concat(parts)[["user", "item", "place"]].to_csv(out, sep="\t", header=False, index=False)
config = Config(
    model="SASRec",
    dataset="log",
    config_dict={
        "data_path": str(root), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "use_gpu": False, "state": "ERROR",
        "n_layers": SETTINGS["layers"], "n_heads": SETTINGS["heads"], "hidden_size": SETTINGS["width"],
        "inner_size": SETTINGS["inner"], "hidden_dropout_prob": SETTINGS["dropout"], "attn_dropout_prob": SETTINGS["dropout"],
        "loss_type": "CE", "MAX_ITEM_LIST_LENGTH": SETTINGS["window"], "train_neg_sample_args": None, "seed": SETTINGS["seed"],
        "train_batch_size": SETTINGS["batch"], "learning_rate": SETTINGS["learning_rate"], "show_progress": False,
        "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
        "checkpoint_dir": str(root / "saved"),
    },
)  # fmt: skip
dataset = create_dataset(config)
train, valid, test = data_preparation(config, dataset)
model = SASRec(config, train.dataset).to("cpu")
trainer = Trainer(config, model)
torch.set_num_threads(1)
limited = Limited(train)


def lists_of(loader: Any, known: pd.DataFrame) -> dict[str, Any]:
    """Ten items for each user, none of those that are known of them."""
    model.eval()
    items = dataset.field2token_id["item_id"]
    names = dataset.id2token("item_id", np.arange(dataset.item_num))
    seen = known.groupby("user")["item"].apply(list).to_dict()
    found = {}
    with torch.no_grad():
        for batch in loader:
            interaction = batch[0]
            score = model.full_sort_predict(interaction).view(len(interaction), -1)
            users = dataset.id2token("user_id", interaction["user_id"].numpy())
            for row, user in enumerate(users):
                score[row, [0] + [items[i] for i in seen[user]]] = -np.inf
            top = score.topk(10).indices.numpy()
            found |= {user: [int(i) for i in names[top[row]]] for row, user in enumerate(users)}
    return {"lists": found}


turn = 0
if SETTINGS["warm_up"]:
    limited.until = 3.0
    trainer._train_epoch(limited, 0)
    watch, limited.targets = Watch(), 0
while watch.processor < SETTINGS["seconds"]:
    limited.until = watch.processor + min(SETTINGS["every"], SETTINGS["seconds"])
    trainer._train_epoch(limited, turn)
    turn += 1
    told = lists_of(valid, parts[0]) if SETTINGS["lists"] else None
    watch.say(limited.targets, told, lists_of(test, pd.concat(parts[:2])) if SETTINGS["test"] else None)
