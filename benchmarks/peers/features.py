"""Events as the columns that click models read; runs in the environments of torch-rechub and deepctr-torch.

Ids of user and item, the user's age group, gender and occupation, the item's year and genres, and the HISTORY items that the
user met last, with those that were liked a second time; 0 is padding or unknown.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

HISTORY, GENRES = 50, 19
USER = ("gender", "age_group", "occupation")
ITEM = ("year",)
TASKS = ("rating", "like")


class Columns:
    """Columns of a log's three parts, and the number of values of each."""

    def __init__(self, folder: str) -> None:
        self.parts = {split: pd.read_csv(f"{folder}/{split}.csv") for split in ("train", "valid", "test")}
        users, items = (pd.read_csv(f"{folder}/{name}.csv", dtype=str, keep_default_na=False) for name in ("users", "items"))
        self.users = {n: pd.factorize(users[n], sort=True)[0] + 1 for n in USER}
        self.items = {n: pd.factorize(items[n], sort=True)[0] + 1 for n in ITEM}
        names = sorted({g for row in items["genres"] for g in row.split("|") if g})
        self.genres = np.zeros((len(items), GENRES), np.int64)
        for i, row in enumerate(items["genres"]):
            found = [names.index(g) + 1 for g in row.split("|") if g][:GENRES]
            self.genres[i, : len(found)] = found
        self.sizes = {"user": len(users) + 1, "item": len(items) + 1, "genres": len(names) + 1}
        self.sizes |= {n: int(v.max()) + 1 for n, v in (self.users | self.items).items()}
        self.mean = float(self.parts["train"]["rating"].mean())

    def _histories(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(all, liked): items of the user's events before each event of a part."""
        frame, met, liked = self.parts[split], {}, {}
        known = [s for s in ("train", "valid", "test")[: ("train", "valid", "test").index(split)]]
        for earlier in known:
            for user, item, like in self.parts[earlier][["user", "item", "like"]].itertuples(index=False):
                met.setdefault(user, []).append(item + 1)
                if like:
                    liked.setdefault(user, []).append(item + 1)
        out = np.zeros((2, len(frame), HISTORY), np.int64)
        labels = frame["like"] if split == "train" else [0] * len(frame)
        for row, (user, item, like) in enumerate(zip(frame["user"], frame["item"], labels, strict=True)):
            for part, before in zip(out, (met, liked), strict=True):
                last = before.get(user, [])[-HISTORY:]
                part[row, : len(last)] = last
            if split == "train":  # of a held-out event nothing is known afterwards
                met.setdefault(user, []).append(item + 1)
                if like:
                    liked.setdefault(user, []).append(item + 1)
        return out[0], out[1]

    def of(self, split: str) -> dict[str, np.ndarray]:
        """Name -> a column of the events of a part."""
        frame = self.parts[split]
        user, item = frame["user"].to_numpy(), frame["item"].to_numpy()
        found = {"user": user + 1, "item": item + 1, "genres": self.genres[item]}
        found |= {n: v[user] for n, v in self.users.items()} | {n: v[item] for n, v in self.items.items()}
        found["history"], found["liked"] = self._histories(split)
        return found

    def labels(self, split: str) -> np.ndarray:
        """(events, 2): rating less its training mean, like."""
        frame = self.parts[split]
        return np.stack([frame["rating"] - self.mean, frame["like"]], 1).astype(np.float32)

    def answers(self, split: str, predicted: np.ndarray) -> dict[str, dict[str, float]]:
        """Predictions (events, 2) -> task -> user -> prediction."""
        users = self.parts[split]["user"]
        whole = predicted + np.array([self.mean, 0.0])
        return {t: {str(u): float(v) for u, v in zip(users, whole[:, i], strict=True)} for i, t in enumerate(TASKS)}
