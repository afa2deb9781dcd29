"""A prepared run of ML-100K as the files that other systems' scripts read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mtrec_ray import storage

LABELS = {"label_rating": "rating", "label_like": "like"}
ATTRIBUTES = ("gender", "age_group", "occupation")


def write_logs(run: Path, folder: Path) -> dict[str, pd.DataFrame]:
    """train.csv, valid.csv and test.csv (user, item, rating, like, place; test without the labels), users.csv and items.csv ->
    events of each split, of the held-out ones indexed by user.

    Users are their places among the valid windows, items those in the catalogue; `place` counts a user's events.
    """
    data = storage.Directory(run / "data")
    tables = {split: storage.read_table(data.path("windows", split)).to_pandas() for split in ("train", "valid", "test")}
    code = {user: place for place, user in enumerate(tables["valid"]["user_id"])}
    events = {}
    for split, table in tables.items():
        several = ["target_item", "target_time", "target_row", *LABELS]
        rows = table[["user_id", *several]].explode(several)
        frame = pd.DataFrame({"user": rows["user_id"].map(code), "item": rows["target_item"].astype(int)})
        for column, name in LABELS.items():
            frame[name] = rows[column].astype(float)
        frame["time"], frame["row"] = rows["target_time"].astype("int64"), rows["target_row"].astype("int64")
        frame = frame.sort_values(["user", "time", "row"], kind="stable").drop(columns=["time", "row"])
        assert frame["user"].notna().all(), "a user has no valid window"
        frame["user"] = frame["user"].astype(int)
        events[split] = frame.reset_index(drop=True)
    events["train"]["place"] = events["train"].groupby("user").cumcount()
    first = events["train"].groupby("user").size()
    for later, split in enumerate(("valid", "test")):
        events[split]["place"] = events[split]["user"].map(first) + later
    for split, frame in events.items():
        frame[[c for c in frame if split != "test" or c not in LABELS.values()]].to_csv(folder / f"{split}.csv", index=False)
    tables["valid"][[f"profile_{a}" for a in ATTRIBUTES]].rename(columns=lambda c: c.removeprefix("profile_")).to_csv(
        folder / "users.csv", index=False
    )
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    genres = ["|".join((row or "").split()) for row in catalogue["genres"].to_pylist()]
    pd.DataFrame({"year": catalogue["year"].to_pylist(), "genres": genres}).to_csv(folder / "items.csv", index=False)
    return {split: frame if split == "train" else frame.set_index("user") for split, frame in events.items()}
