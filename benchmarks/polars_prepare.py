"""The preparation as a single-process Polars program: `python -m benchmarks.polars_prepare --log DIR --out DIR`.

DIR is a wide log of benchmarks.generate. The same steps as `mtrec_ray.data.prepare` on its run.yaml, written as one would write
them in Polars for this log alone, with the whole log in memory: read, validate, quarantine, drop duplicates, sort by (user, time,
row), cut by time, fit (id map, counts, label statistics, vocabulary), cut into windows and moments, history store, Parquet with
zstd. It shares no code with mtrec_ray; benchmarks.prepare measures both and compares their windows.

    history    rows of clicks, one after the other; a user's are contiguous, so every list of history is a range of them
    before     clicks before an event, over the whole table: turns "the clicks a target sees" into arithmetic
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

LABELS = ("click", "purchase", "rating")
KEYS = ("user_id", "item_id", "timestamp", *LABELS, "device")
YEAR_2200_MS = 7_258_118_400_000
RECENT_MS = 30 * 86_400_000
TRAIN, VALID, TEST = 0, 1, 2


def read(folder: Path, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """-> (events in the order of the log, quarantined rows). A row's number is file · 2^40 + position."""
    files = sorted((folder / "log").rglob("*.parquet"))
    scans = [
        pl.scan_parquet(file, hive_partitioning=False)
        .select(KEYS)
        .with_row_index("row")
        .with_columns(pl.col("row").cast(pl.Int64) + (number << 40), file=pl.lit(str(file)))
        for number, file in enumerate(files)
    ]
    when, rating = pl.col("timestamp"), pl.col("rating")
    checks = {
        "user_id is missing": pl.col("user_id").is_null() | (pl.col("user_id") == ""),
        "item_id is missing": pl.col("item_id").is_null() | (pl.col("item_id") == ""),
        "timestamp is missing": when.is_null(),
        "timestamp is outside 1970 to 2200 (time_unit ms)": (when < 0) | (when > YEAR_2200_MS),
        "click is not 0 or 1": ~pl.col("click").is_in([0, 1]),
        "purchase is not 0 or 1": ~pl.col("purchase").is_in([0, 1]),
        "rating is below 1": rating < 1,
        "rating is above 5": rating > 5,
        "item_id is not in the items table": pl.col("known").is_null(),
    }
    catalogue = pl.Enum(items["item_id"])
    checked = (
        pl.concat(scans)
        .with_columns(known=pl.col("item_id").cast(catalogue, strict=False).to_physical().cast(pl.Int32))
        .with_columns(bad=pl.any_horizontal(bad.fill_null(False) for bad in checks.values()))
    )
    good = checked.filter(~pl.col("bad")).select(
        "user_id", "known", "timestamp", "row", *[pl.col(n).cast(pl.Float32) for n in LABELS], "device"
    )
    reason = pl.coalesce(pl.when(bad).then(pl.lit(why)) for why, bad in checks.items())
    bad = checked.filter("bad").select("row", "file", reason.alias("reason"), raw=pl.struct(KEYS).struct.json_encode())
    events, quarantine = pl.collect_all([good, bad], engine="streaming")
    return events, quarantine


def sort_and_deduplicate(events: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series, pl.DataFrame]:
    """-> (events sorted by user, time, row, with users as integers, ids of users, doubles)."""
    users = events["user_id"].unique().sort()
    span = pl.col("timestamp").max() - pl.col("timestamp").min() + 1
    by_user_and_time = pl.col("user").cast(pl.Int64) * span + pl.col("timestamp") - pl.col("timestamp").min()
    events = (
        events.with_columns(user=pl.col("user_id").cast(pl.Enum(users)).to_physical().cast(pl.Int32))
        .drop("user_id")
        .sort(by_user_and_time, maintain_order=True)  # one key sorts faster than two, and rows are in order already
    )
    values = [n for n in events.columns if n != "row"]
    # equal rows have equal hashes: only the few rows whose hash occurs twice are compared
    twice = events.select(pl.struct(values).hash().is_duplicated()).to_series()
    if not twice.any():
        return events, users, events.clear()
    suspects = events.filter(twice)
    doubles = suspects.filter(~pl.struct(values).is_first_distinct())
    return events.join(doubles.select("row"), on="row", how="anti", maintain_order="left"), users, doubles


def time_cuts(events: pl.DataFrame, shares: tuple[float, float]) -> tuple[int, int]:
    """Whole seconds before which the shares of events have passed."""
    seconds = events.group_by(pl.col("timestamp") // 1000).len().sort("timestamp")
    passed = (seconds["len"].cum_sum() - seconds["len"]) / len(events)
    first, second = (int(seconds["timestamp"][min(int(passed.search_sorted(s)), len(seconds) - 1)]) * 1000 for s in shares)
    return first, second


def fit(events: pl.DataFrame, items: pl.DataFrame, out: Path) -> pl.DataFrame:
    """Catalogue and statistics of the training part; -> events with items and devices as the model's integers."""
    train = events.lazy().filter(pl.col("split") == TRAIN)
    clicks = train.filter(pl.col("history"))
    since = pl.col("timestamp") >= pl.col("timestamp").max() - RECENT_MS
    counted, recent, statistics, devices = pl.collect_all(
        [
            train.group_by("known").agg(count=pl.col("history").sum()),
            clicks.filter(since).group_by("known").agg(recent_count=pl.len()),
            train.select(
                pl.struct(count=pl.col(n).count(), mean=pl.col(n).mean(), std=pl.col(n).std(ddof=0)).alias(n) for n in LABELS
            ),
            train.select(pl.col("device").drop_nulls().unique().sort()),
        ]
    )
    catalogue = (
        items.with_row_index("known")
        .cast({"known": pl.Int32})
        .join(counted, on="known", how="left")
        .join(recent, on="known", how="left")
        .select(
            "known",
            "item_id",
            trained=pl.col("count").is_not_null(),
            count=pl.col("count").fill_null(0),
            recent_count=pl.col("recent_count").fill_null(0),
            title="title",
            text=pl.format("{}. {}", "title", "category"),
            category="category",
        )
        .sort(~pl.col("trained"), "item_id")
    )
    catalogue.drop("known").write_parquet(out / "catalogue.parquet", compression="zstd", compression_level=1)
    fitted = {"labels": {n: statistics[n][0] for n in LABELS}, "device": devices["device"].to_list()}
    (out / "schema.json").write_text(json.dumps(fitted, indent=1))
    item = catalogue.select("known", item=pl.int_range(pl.len(), dtype=pl.Int32)).sort("known")["item"]
    code = {name: i + 1 for i, name in enumerate(fitted["device"])}
    return events.with_columns(
        item=item.gather(events["known"]),
        context_device=events["device"].replace_strict(code, default=0, return_dtype=pl.Int32),
    )


def lists(frame: pl.DataFrame, length: pl.Series) -> list[pl.Series]:
    """Columns of consecutive rows -> columns of lists with these lengths, without a copy."""
    offsets = pl.concat([pl.Series([0], dtype=pl.Int64), length.cast(pl.Int64).cum_sum()]).to_arrow()
    return [
        pl.Series(c.name, pl.from_arrow(pa.LargeListArray.from_arrays(offsets, c.rechunk().to_arrow())))
        for c in frame.get_columns()
    ]


def ranges(frame: pl.DataFrame, start: pl.Series, end: pl.Series) -> list[pl.Series]:
    """Rows [start, end) of a frame for each pair -> columns of lists."""
    place = pl.select(pl.int_ranges(start, end, dtype=pl.UInt32).explode(empty_as_null=False)).to_series()
    return lists(frame.select(pl.all().gather(place)), end - start)


def windows(plan: pl.DataFrame, targets: pl.DataFrame, clicks: pl.DataFrame, users: pl.DataFrame, path: Path) -> None:
    """Write windows. plan: user, window, count, base, start, end, n_targets; targets: in the order of the plan."""
    head = plan.select("window", profile_weight=(1 / pl.col("count")).cast(pl.Float32))
    about = users.select(pl.all().gather(plan["user"]))
    history = ranges(clicks.select(pl.exclude("^seen_.*$")), plan["start"], plan["end"])
    # a moment holds what the user's moment before did not
    seen_from = plan.select(pl.max_horizontal("base", pl.col("start").shift(1).over("user"))).to_series()
    seen = ranges(clicks.select("seen_item"), seen_from, plan["start"])
    columns = [*about.get_columns(), *head.get_columns(), *history, *lists(targets, plan["n_targets"]), *seen]
    write(pl.DataFrame(columns), path)


def write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path, compression="zstd", compression_level=1)


def prepare(folder: Path, out: Path, window: int = 100, shares: tuple[float, float] = (0.8, 0.9)) -> dict[str, Any]:
    """Prepare the log of `folder` into `out` -> counts and the seconds of each step."""
    clock = time.perf_counter()
    cpu = time.process_time()
    seconds, cpu_seconds = {}, {}

    def lap(step: str) -> None:
        nonlocal clock, cpu
        seconds[step], clock = round(time.perf_counter() - clock, 3), time.perf_counter()
        cpu_seconds[step], cpu = round(time.process_time() - cpu, 3), time.process_time()

    out.mkdir(parents=True, exist_ok=True)
    items = pl.read_parquet(folder / "items.parquet").sort("item_id")
    events, quarantine = read(folder, items)
    lap("read and validate")
    events, user_ids, doubles = sort_and_deduplicate(events)
    raw = pl.struct(pl.all()).struct.json_encode()
    doubles = doubles.select("row", file=pl.lit(""), reason=pl.lit("duplicate event"), raw=raw)
    quarantine = pl.concat([quarantine, doubles])
    write(quarantine, out / "quarantine.parquet")
    lap("sort, deduplicate")
    cuts = time_cuts(events, shares)
    events = events.with_columns(
        history=pl.col("click") > 0,
        split=(pl.col("timestamp") >= cuts[0]).cast(pl.Int8) + (pl.col("timestamp") >= cuts[1]).cast(pl.Int8),
    )
    events = fit(events, items, out)
    lap("cut, fit")
    write(
        events.select(
            user_ids.gather(events["user"]).alias("user_id"),
            items["item_id"].gather(events["known"]).alias("item_id"),
            "timestamp", "row", *LABELS, "device",
        ),
        out / "events.parquet",
    )  # fmt: skip
    lap("write events")

    new_user = pl.col("user") != pl.col("user").shift(1, fill_value=-1)
    new_time = new_user | (pl.col("timestamp") != pl.col("timestamp").shift(1, fill_value=-1))
    events = events.with_columns(before=pl.col("history").cum_sum().cast(pl.Int64) - pl.col("history"), new=new_time)
    events = events.with_columns(
        base=pl.when(new_user).then("before").forward_fill(), visible=pl.when("new").then("before").forward_fill()
    )
    trained = pl.col("split") == TRAIN
    users = events.group_by("user").agg(
        base=pl.col("base").first(), clicks=pl.col("history").sum().cast(pl.Int64),
        n=(pl.col("history") & trained).sum().cast(pl.Int64), trained=trained.any(),
    ).sort("user")  # fmt: skip
    shown = events.filter("history")
    clicks = shown.select(
        history_item="item", history_time="timestamp", history_row="row", history_positive=pl.lit(1, dtype=pl.Int8),
        **{f"history_action_{n}": pl.col(n).fill_null(float("nan")) for n in LABELS},
        history_context_device="context_device", seen_item="item",
    )  # fmt: skip
    target = {
        "target_item": pl.col("item"), "target_time": pl.col("timestamp"), "target_row": pl.col("row"),
        "target_split": pl.col("split"), "target_positive": pl.col("history").cast(pl.Int8),
        **{f"label_{n}": pl.col(n).fill_null(float("nan")) for n in LABELS}, "target_context_device": pl.col("context_device"),
    }  # fmt: skip
    about = profiles(folder, user_ids)
    lap("visible history")

    capacity, stride = window - 1, max(window // 2, 1)
    by_user = users.with_columns(
        count=pl.when("trained").then(1 + (-((capacity - pl.col("n")) // stride)).clip(0)).otherwise(0)
    ).with_columns(first=pl.col("count").cum_sum() - pl.col("count"))
    plan = (
        by_user.filter("trained")
        .with_columns(window=pl.int_ranges("count", dtype=pl.Int32))
        .explode("window")
        .with_columns(end=pl.col("n") - (pl.col("count") - 1 - pl.col("window")) * stride)
        .with_columns(start=(pl.col("end") - capacity).clip(0))
    )
    of_user = by_user.select("base", "n", "count", "first")
    targets = events.filter(trained).select("user", "visible", **target)
    targets = targets.with_columns(of_user.select(pl.all().gather(targets["user"])).get_columns()).with_columns(
        k=pl.col("visible") - pl.col("base")
    )
    targets = targets.with_columns(
        place=pl.col("first") + pl.col("count") - 1 - pl.min_horizontal(pl.col("count") - 1, (pl.col("n") - pl.col("k")) // stride)
    )
    targets = targets.with_columns(target_pos=(pl.col("k") - plan["start"].gather(targets["place"])).cast(pl.Int32))
    per_window = targets.group_by("place").len("n_targets")
    plan = plan.with_row_index("place").with_columns(
        pl.col("place").cast(pl.Int64), start=pl.col("base") + pl.col("start"), end=pl.col("base") + pl.col("end")
    )
    plan = plan.join(per_window, on="place", how="left", maintain_order="left").with_columns(
        pl.col("n_targets").fill_null(0),
        base=pl.col("start"),  # training windows list nothing as seen
    )
    windows(plan, targets.select("target_pos", *target), clicks, about, out / "windows" / "train.parquet")
    found = {"train": len(plan)}
    del targets, plan
    lap("training windows")

    for which, name in ((VALID, "valid"), (TEST, "test")):
        part = events.filter(pl.col("split") == which).with_columns(k=pl.col("visible") - pl.col("base"))
        plan = part.with_columns(moment=pl.col("new").cum_sum()).group_by("moment", maintain_order=True).agg(
            pl.col("user", "base", "k").first(), n_targets=pl.len()
        ).with_columns(
            start=pl.col("base") + (pl.col("k") - capacity).clip(0), end=pl.col("base") + pl.col("k"),
            window=pl.lit(0, dtype=pl.Int32), count=pl.lit(1),
        )  # fmt: skip
        targets = part.select(target_pos=pl.col("k").clip(upper_bound=capacity).cast(pl.Int32), **target)
        windows(plan, targets, clicks, about, out / "windows" / f"{name}.parquet")
        found[name] = len(plan)
    lap("moments")

    end = users["base"] + users["clicks"]
    start = users.select(pl.col("base") + (pl.col("clicks") - capacity).clip(0)).to_series()
    ids = items["item_id"].gather(shown["known"])
    kept = shown.select(
        history_item_id=ids, history_time="timestamp", **{f"history_action_{n}": pl.col(n).fill_null(float("nan")) for n in LABELS},
        history_context_device="device",
    )  # fmt: skip
    seen = shown.select(seen_item_id=ids, seen_time="timestamp")
    store = [user_ids.alias("user_id"), *ranges(kept, start, end), *ranges(seen, users["base"], start)]
    write(pl.DataFrame(store), out / "store.parquet")
    lap("store")
    reasons = dict(quarantine.group_by("reason").len().sort("reason").iter_rows())
    return {
        "events": len(events), "users": len(user_ids), "cuts": list(cuts), "reasons": reasons, "windows": found,
        "seconds": seconds, "cpu_seconds": cpu_seconds,
    }  # fmt: skip


def profiles(folder: Path, user_ids: pl.Series) -> pl.DataFrame:
    """user_id, fold and the attributes' classes of each user; -1 is missing."""
    table = pl.read_parquet(folder / "users.parquet")
    joined = pl.DataFrame({"user_id": user_ids}).join(table, on="user_id", how="left", maintain_order="left")

    def classes(name: str) -> pl.Expr:
        values = table[name].drop_nulls().unique().sort().to_list()
        return pl.col(name).replace_strict({v: i for i, v in enumerate(values)}, default=-1, return_dtype=pl.Int32)

    age = pl.sum_horizontal(pl.col("age") >= edge for edge in (25, 35, 50)).cast(pl.Int32)
    return joined.select(
        "user_id",
        fold=(pl.col("user_id").hash() % 10).cast(pl.Int8),
        profile_gender=classes("gender"),
        profile_age_group=pl.when(pl.col("age").is_null()).then(-1).otherwise(age).cast(pl.Int32),
        profile_segment=classes("segment"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.polars_prepare")
    parser.add_argument("--log", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--window", type=int, default=100)
    args = parser.parse_args()
    begun = time.perf_counter()
    found = prepare(Path(args.log).absolute(), Path(args.out).absolute(), args.window)
    total, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found | {"total_seconds": total, "peak_mib": peak}))


if __name__ == "__main__":
    main()
