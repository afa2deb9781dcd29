"""deepctr-torch's MMoE and PLE: runs in its own environment, started by benchmarks/against_peers.py."""

from __future__ import annotations

import contextlib
import io

from common import Watch, arguments, one_thread

SETTINGS = arguments()
one_thread(SETTINGS["seed"])

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import MMOE, PLE
from features import GENRES, HISTORY, ITEM, TASKS, USER, Columns

columns, options, watch = Columns(SETTINGS["folder"]), SETTINGS["options"], Watch()
wide = options["embedding"]
parts = {split: columns.of(split) for split in ("train", "valid", "test")}
features = [SparseFeat(n, columns.sizes[n], wide) for n in ("user", "item", *USER, *ITEM)]
features.append(VarLenSparseFeat(SparseFeat("genres", columns.sizes["genres"], wide), GENRES))
features += [
    VarLenSparseFeat(SparseFeat(n, columns.sizes["item"], wide, embedding_name="item"), HISTORY) for n in ("history", "liked")
]
shared = {
    "dnn_feature_columns": features, "expert_dnn_hidden_units": (128, 64), "tower_dnn_hidden_units": (32,),
    "dnn_dropout": options["dropout"], "l2_reg_embedding": options["l2"], "task_types": ("regression", "binary"),
    "task_names": TASKS, "seed": SETTINGS["seed"],
}  # fmt: skip
model = MMOE(num_experts=4, **shared) if SETTINGS["model"] == "mmoe" else PLE(specific_expert_num=2, num_levels=2, **shared)
model.compile(torch.optim.Adam(model.parameters(), lr=options["learning_rate"]), ["mse", "binary_crossentropy"])


def inputs(split: str) -> list[np.ndarray]:
    return [parts[split][name] for name in model.feature_index]


for epoch in range(SETTINGS["epochs"]):
    with contextlib.redirect_stdout(io.StringIO()):
        watch.start()
        model.fit(inputs("train"), columns.labels("train"), batch_size=options["batch"], epochs=1, verbose=0)
        watch.stop()
        told = {split: columns.answers(split, model.predict(inputs(split))) for split in ("valid", "test")}
    watch.say((epoch + 1) * len(columns.parts["train"]), told["valid"], told["test"])
