"""S3 by a real server in this process (moto)."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterator

import pyarrow as pa
import pytest

from mtrec_ray import storage
from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources import SourceError, list_units, read_unit
from tests.tiny import read_all
from tests.unit.test_sources import FILE, read

moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    """What a URI says after its path to reach the server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    server.stop()


def uri(path: str, query: str) -> str:
    return f"s3://key:secret@{path}{query}"


@pytest.mark.slow
def test_a_log_on_s3_is_listed_and_read_in_every_format(query: str) -> None:
    storage.write_table(uri("shop/parquet/day=1/a.parquet", query), pa.table({"u": [1, 2]}))
    storage.write_table(uri("shop/parquet/day=2/a.parquet", query), pa.table({"u": [3]}))
    filesystem, _ = storage.resolve(uri("shop", query))
    filesystem.create_dir("shop/csv")
    with filesystem.open_output_stream("shop/csv/a.csv.gz", compression=None) as stream:
        stream.write(gzip.compress(b"u\n1\n2\n"))
    storage.write_bytes(uri("shop/jsonl/a.jsonl", query), b'{"u": 1}\nbroken\n')
    storage.write_bytes(uri("shop/ml/u.data", query), b"1\t2\t3\t4\n")
    table = TableConfig(path=uri("shop/parquet", query))
    assert read(table, ["u", "day"])[0] == [(0, 1, "1"), (1, 2, "1"), (FILE, 3, "2")]
    assert read(TableConfig(path=uri("shop/csv", query), format="csv"), ["u"])[0] == [(0, "1"), (1, "2")]
    assert read(TableConfig(path=uri("shop/jsonl", query), format="jsonl"), ["u"]) == ([(0, 1)], [(1, "broken")])
    assert read(TableConfig(path=uri("shop/ml/u.data", query), format="movielens"), ["user_id"])[0] == [(0, "1")]
    assert read_all(table, ["u"], "items")["u"].to_pylist() == ["1", "2", "3"]


def test_an_object_that_vanishes_or_is_replaced_is_named(query: str) -> None:
    storage.write_bytes(uri("change/a.csv", query), b"u\n1\n")
    table = TableConfig(path=uri("change", query), format="csv")
    [unit] = list_units(table, ["u"], "interactions")
    storage.write_bytes(uri("change/a.csv", query), b"u\n1\n2\n")
    with pytest.raises(SourceError, match=r"change/a\.csv was replaced or changed"):
        list(read_unit(table, unit, ["u"]))
    storage.delete(uri("change/a.csv", query))
    with pytest.raises(SourceError, match=r"change/a\.csv is gone"):
        list(read_unit(table, unit, ["u"]))


def test_a_missing_bucket_is_refused_with_its_path(query: str) -> None:
    with pytest.raises(SourceError, match=r"interactions: s3://nowhere/log does not exist"):  # and no secret
        list_units(TableConfig(path=uri("nowhere/log", query)), ["u"], "interactions")


def test_a_uri_that_cannot_be_understood_is_named(query: str) -> None:
    with pytest.raises(SourceError, match=r"items: s3://.* cannot be listed: Unexpected query parameter.*'colour'"):
        list_units(TableConfig(path=uri("shop/log", query + "&colour=red")), ["u"], "items")


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_named() -> None:
    where = uri("shop/log", "?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    with pytest.raises(SourceError, match=r"interactions: s3://.* cannot be listed: .*connect"):
        list_units(TableConfig(path=where), ["u"], "interactions")
