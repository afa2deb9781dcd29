"""The log of a synthetic world, piece by piece in order of time: for benchmarks.generate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.world import CHUNK, DAY_MS, DEVICES, RATING, START_MS, STRATA, Floats, Ints, World, ids

SLATE = (3, STRATA)
LABELS = ("click", "purchase", "rating")
DELAYS_MS = {"click": (1e3, 8e3, 60e3), "purchase": (60e3, 30 * 60e3, 6 * 3600e3), "rating": (600e3, 12 * 3600e3, 3.0 * DAY_MS)}
"""Least, mean beyond it, most."""


def wide_chunk(world: World, chunk: int, user_ids: pa.Array, item_ids: pa.Array) -> pa.Table:
    """The impressions of one chunk, in order of time."""
    p = world.parameters
    rng = np.random.default_rng([p.seed, 2, chunk])
    n = min(CHUNK, p.events - chunk * CHUNK)
    low, high = chunk * CHUNK / p.events, (chunk * CHUNK + n) / p.events

    size = rng.integers(SLATE[0], SLATE[1] + 1, n // SLATE[0] + 1)
    size = size[: int(np.searchsorted(np.cumsum(size), n)) + 1]
    size[-1] -= size.sum() - n
    requests = len(size)
    user_R, s_R, session_R = _requests(world, rng, requests, low, high)
    device_R = np.where(rng.random(requests) < 0.01, len(DEVICES), _devices(world, rng, user_R, session_R))
    time_R = START_MS + (_warp(s_R * p.days) * DAY_MS).astype(np.int64)

    request = np.repeat(np.arange(requests), size)
    position = np.arange(n) - np.repeat(np.cumsum(size) - size, size) + 1
    user, when, device = user_R[request], time_R[request], device_R[request]
    stratum = (rng.integers(0, STRATA, requests)[request] + position) % STRATA
    item, propensity = world.draw_items(rng, low, user, stratum)
    affinity = world.affinity(user, item, world.passed(when))
    price = world.price(item, when)
    click = rng.random(n) < world.click_probability(affinity, item, position, device)
    purchase = click & (rng.random(n) < world.purchase_probability(affinity, price))
    rated = click & (rng.random(n) < np.where(purchase, 0.4, 0.1))
    rating = RATING @ np.stack([np.ones(n), affinity, world.item_quality[item], rng.standard_normal(n)])

    first_request = chunk * CHUNK  # at most one request for an impression, so that numbers never meet
    names = pc.binary_join_element_wise("r", pa.array(first_request + np.arange(requests)).cast(pa.string()), "")
    return pa.table(
        {
            "user_id": user_ids.take(pa.array(user)),
            "item_id": item_ids.take(pa.array(item)),
            "timestamp": pa.array(when),
            "request_id": names.take(pa.array(request)),
            "position": pa.array(position.astype(np.int8)),
            "device": pa.array([*DEVICES, None], pa.string()).take(pa.array(device)),
            "price": pa.array(price),
            "propensity": pa.array(propensity),
            "click": pa.array(click.astype(np.int8)),
            "purchase": pa.array(purchase.astype(np.int8)),
            "rating": pa.array(np.clip(np.rint(rating), 1, 5).astype(np.float32), mask=~rated),
        }
    )


def _requests(world: World, rng: np.random.Generator, n: int, low: float, high: float) -> tuple[Ints, Floats, Ints]:
    """Sessions of users within a share of the log's time -> (user, share of time passed, session) per request, in order."""
    length = rng.geometric(1 / 3, n)
    length = length[: int(np.searchsorted(np.cumsum(length), n)) + 1]
    length[-1] -= length.sum() - n
    start = np.cumsum(length) - length
    gap = (2.0 + rng.exponential(40.0, n)) * 1000 / (world.parameters.days * DAY_MS)
    gap[start] = 0
    since = np.cumsum(gap)
    since -= np.repeat(since[start], length)
    lasts = since[start + length - 1]
    since *= np.repeat(np.minimum(1, (high - low) / np.maximum(lasts, 1e-300)), length)  # a session ends within its chunk
    begins = low + rng.random(len(length)) * np.maximum(0, high - low - lasts)
    session = np.repeat(np.arange(len(length)), length)
    user = world.draw_users(rng, begins)[session]
    s = begins[session] + since
    order = np.argsort(s, kind="stable")
    return user[order], s[order], session[order]


def _devices(world: World, rng: np.random.Generator, user_R: Ints, session_R: Ints) -> Ints:
    """A user's own device, or any for 15 % of the sessions."""
    sessions = int(session_R.max()) + 1
    other, strays = rng.integers(0, len(DEVICES), sessions), rng.random(sessions) < 0.15
    return np.where(strays[session_R], other[session_R], world.user_device[user_R])


def _warp(days: Floats) -> Floats:
    """Even time -> time that is busiest at eight in the evening and quiet in the morning; whole days stay."""
    turn = 2 * np.pi
    return days - 0.6 / turn * (np.sin(turn * (days - 20 / 24)) - np.sin(turn * (-20 / 24)))


def long_rows(world: World, wide: pa.Table, chunk: int) -> pa.Table:
    """Impressions -> a row for each impression, click, purchase and rating, in order of time."""
    rng = np.random.default_rng([world.parameters.seed, 3, chunk])
    n = len(wide)
    shown = wide.drop_columns(LABELS).append_column("event_type", pa.array(np.full(n, "impression", dtype=object), pa.string()))
    parts = [shown.append_column("value", pa.nulls(n, pa.float32()))]
    when = wide["timestamp"].to_numpy()
    for label in LABELS:
        least, mean, most = DELAYS_MS[label]
        delay = np.minimum(least + rng.exponential(mean, n), most).astype(np.int64)
        values = wide[label].cast(pa.float32())
        happened = np.flatnonzero(values.fill_null(0).to_numpy() > 0)
        columns = {c: wide[c].take(happened) if c in ("user_id", "item_id", "request_id") else None for c in shown.column_names}
        columns |= {"timestamp": pa.array(when[happened] + delay[happened]), "event_type": pa.array([label] * len(happened))}
        filled = {c: pa.nulls(len(happened), shown[c].type) if v is None else v for c, v in columns.items()}
        parts.append(pa.table(filled).append_column("value", values.take(happened)))
    return pa.concat_tables(parts)


def make_dirty(table: pa.Table, rng: np.random.Generator, share: float, counts: Counter[str]) -> tuple[pa.Table, Ints]:
    """Add bad copies of rows, each after the row it copies -> (table, number of the row that each row comes from)."""
    n = len(table)
    source = np.flatnonzero(rng.random(n) < share)
    kinds = ["user_id is missing", "item_id is missing", "timestamp is missing", "timestamp is negative",
             "timestamp is in microseconds", "item_id is unknown", "duplicate"]  # fmt: skip
    if "click" in table.column_names:
        kinds += ["click is 2", "rating is 9"]
    kind = rng.integers(0, len(kinds), len(source))
    bad = table.take(source)

    def put(column: str, why: str, value: Any) -> None:
        nonlocal bad
        values = pc.if_else(pa.array(kind == kinds.index(why)), value, bad[column].combine_chunks())
        bad = bad.set_column(bad.column_names.index(column), column, values)

    for column in ("user_id", "item_id", "timestamp"):
        put(column, f"{column} is missing", pa.scalar(None, table[column].type))
    put("timestamp", "timestamp is negative", pc.negate(bad["timestamp"].combine_chunks()))
    put("timestamp", "timestamp is in microseconds", pc.multiply(bad["timestamp"].combine_chunks(), 1000))
    put("item_id", "item_id is unknown", "i-unknown")
    if "click" in table.column_names:
        put("click", "click is 2", pa.scalar(2, pa.int8()))
        put("rating", "rating is 9", pa.scalar(9, pa.float32()))
    counts.update({why: int(c) for why, c in zip(kinds, np.bincount(kind, minlength=len(kinds)), strict=True)})
    came_from = np.concatenate([np.arange(n), source])
    order = np.argsort(came_from, kind="stable")
    return pa.concat_tables([table, bad]).take(order), came_from[order]


def log_pieces(world: World, counts: Counter[str], dirty: Counter[str]) -> Iterator[tuple[pa.Table, Ints, Ints]]:
    """Pieces of the log in order -> (rows, number of each row's impression or of the last one before, day of each row)."""
    p = world.parameters
    user_ids, item_ids = ids("u", p.users), ids("i", p.items)
    pending, impressions = None, 0
    for chunk in range(p.chunks):
        table = wide_chunk(world, chunk, user_ids, item_ids)
        counts["impression"] += len(table)
        for name in LABELS:
            counts[name] += int(pc.sum(pc.greater(table[name], 0)).as_py() or 0)
        if p.long:
            until = _warp(np.array([min(1.0, (chunk + 1) * CHUNK / p.events) * p.days]))[0]
            rows, until_ms = long_rows(world, table, chunk), START_MS + int(until * DAY_MS)
            table, pending = _in_time(rows, pending, until_ms, chunk == p.chunks - 1)
            shown = pc.equal(table["event_type"], "impression").to_numpy()
        else:
            shown = np.ones(len(table), bool)
        number = np.maximum(impressions + np.cumsum(shown) - 1, 0)
        impressions += int(shown.sum())
        day = (table["timestamp"].to_numpy() - START_MS) // DAY_MS
        if p.dirty:
            table, came_from = make_dirty(table, np.random.default_rng([p.seed, 4, chunk]), p.dirty, dirty)
            number, day = number[came_from], day[came_from]
        yield table, number, day


def _in_time(new: pa.Table, pending: pa.Table | None, until_ms: int, last: bool) -> tuple[pa.Table, pa.Table]:
    """Rows before a time, sorted, and those that wait for later chunks."""
    table = new if pending is None else pa.concat_tables([pending, new])
    when = table["timestamp"].to_numpy()
    order = np.argsort(when, kind="stable")
    ready = len(order) if last else int(np.searchsorted(when[order], until_ms))
    return table.take(order[:ready]), table.take(order[ready:]).combine_chunks()
