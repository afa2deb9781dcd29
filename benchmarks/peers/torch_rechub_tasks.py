"""torch-rechub's MMoE and PLE: runs in its own environment, started by benchmarks/against_peers.py."""

from __future__ import annotations

import contextlib
import io

from common import Watch, arguments, one_thread

SETTINGS = arguments()
one_thread(SETTINGS["seed"])

import numpy as np
import torch
from features import ITEM, USER, Columns
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE, PLE
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator, PredictDataset

columns, options, watch = Columns(SETTINGS["folder"]), SETTINGS["options"], Watch()
wide = options["embedding"]
parts = {split: columns.of(split) for split in ("train", "valid", "test")}
features = [SparseFeature(n, columns.sizes[n], embed_dim=wide) for n in ("user", "item", *USER, *ITEM)]
features.append(SequenceFeature("genres", columns.sizes["genres"], embed_dim=wide, padding_idx=0))
features += [
    SequenceFeature(n, columns.sizes["item"], embed_dim=wide, shared_with="item", padding_idx=0) for n in ("history", "liked")
]
expert = {"dims": [128, 64], "activation": "relu", "dropout": options["dropout"]}
towers = [{"dims": [32], "activation": "relu", "dropout": options["dropout"]}] * 2
kinds = ["regression", "classification"]
if SETTINGS["model"] == "mmoe":
    model = MMOE(features, kinds, n_expert=4, expert_params=expert, tower_params_list=towers)
else:
    model = PLE(features, kinds, n_level=2, n_expert_specific=2, n_expert_shared=1, expert_params=expert, tower_params_list=towers)
loader, _, _ = DataGenerator(parts["train"], columns.labels("train")).generate_dataloader(
    x_val=parts["valid"], y_val=columns.labels("valid"), x_test=parts["valid"], y_test=columns.labels("valid"),
    batch_size=options["batch"],
)  # fmt: skip
trainer = MTLTrainer(
    model, kinds, optimizer_params={"lr": options["learning_rate"], "weight_decay": options["weight_decay"]}, n_epoch=1
)


def predicted(split: str) -> np.ndarray:
    held = torch.utils.data.DataLoader(PredictDataset(parts[split]), batch_size=1024)
    return np.array(trainer.predict(trainer.model, held))


for epoch in range(SETTINGS["epochs"]):
    with contextlib.redirect_stdout(io.StringIO()):
        watch.start()
        trainer.train_one_epoch(loader)
        watch.stop()
        told = {split: columns.answers(split, predicted(split)) for split in ("valid", "test")}
    watch.say((epoch + 1) * len(columns.parts["train"]), told["valid"], told["test"])
