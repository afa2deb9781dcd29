"""Files behind URIs (pyarrow filesystems), and directories that are published by a manifest written last.

A published directory looks like

    ROOT/manifest.json            written last; names the prefix, the files and their checksums
    ROOT/<fingerprint>/...        the files

so that a reader either finds everything or nothing, on a local disk and on an object store alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

SCHEMA_VERSION = 5


class StorageError(RuntimeError):
    """A directory or file that is missing, incomplete or damaged. Its message holds no credentials."""

    def __init__(self, message: object = "") -> None:
        super().__init__(without_keys(str(message)))


def without_keys(text: str) -> str:
    """A text without the keys that URIs in it may hold: s3://KEY:SECRET@bucket becomes s3://bucket."""
    return re.sub(r"(\w://)[^/@\s]*@", r"\1", text)


def resolve(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """URI or local path -> (filesystem, path). Local paths become absolute, since workers change directory."""
    text = str(uri)
    if "://" in text:
        filesystem, path = pafs.FileSystem.from_uri(text)
        return filesystem, path.rstrip("/")
    return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())


def is_local(uri: str | Path) -> bool:
    return isinstance(resolve(uri)[0], pafs.LocalFileSystem)


def absolute(uri: str | Path) -> str:
    """The same place, named so that it means the same in every process."""
    text = str(uri)
    return text if "://" in text else resolve(text)[1]


def shown(uri: str | Path) -> str:
    """As messages show it: without the keys and settings that a URI may hold."""
    text = str(uri)
    return re.sub("://[^/@]*@", "://", text).partition("?")[0] if "://" in text else text


def join(uri: str | Path, *parts: str) -> str:
    path, mark, query = str(uri).partition("?") if "://" in str(uri) else (str(uri), "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


@contextmanager
def _reading(uri: str | Path) -> Iterator[None]:
    """An error of reading names what could not be read: no permission, no network, a bucket that is not there."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{shown(uri)}: not found") from None
    except OSError as error:
        raise StorageError(f"{shown(uri)}: cannot be read: {error}") from error


def exists(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    with _reading(uri):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(uri: str | Path) -> bytes:
    filesystem, path = resolve(uri)
    with _reading(uri), filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


@contextmanager
def _writing(uri: str | Path) -> Iterator[None]:
    """An error of writing names what could not be written."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{shown(uri)}: cannot be written: {error}") from error


def write_bytes(uri: str | Path, data: bytes) -> None:
    """A whole file: whoever is stopped here leaves the one that was there. (Object stores do so by themselves.)"""
    filesystem, path = resolve(uri)
    folder, _, name = path.rpartition("/")
    with _writing(uri):
        filesystem.create_dir(folder, recursive=True)
        if not isinstance(filesystem, pafs.LocalFileSystem):
            with filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)
            return
        draft = Path(folder, f".{uuid.uuid4().hex[:12]}.draft")
        try:
            draft.write_bytes(data)
            os.replace(draft, Path(folder, name))
        finally:
            draft.unlink(missing_ok=True)


def read_json(uri: str | Path) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{shown(uri)}: damaged JSON: {error}") from None


def write_json(uri: str | Path, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode())


def write_table(uri: str | Path, table: pa.Table) -> None:
    filesystem, path = resolve(uri)
    with _writing(uri):
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        pq.write_table(table, path, filesystem=filesystem, **_parquet(table.schema))


def _parquet(schema: pa.Schema) -> dict[str, Any]:
    """Texts as dictionaries, numbers as they are: a third less time than dictionaries everywhere, and smaller files."""

    def text(kind: pa.DataType) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_dictionary(kind))

    names = [f.name for f in schema if text(f.type)]
    names += [f"{f.name}.list.element" for f in schema if pa.types.is_list(f.type) and text(f.type.value_type)]
    return {"compression": "zstd", "use_dictionary": names or False}


def write_tables(uri: str | Path, tables: Iterable[pa.Table]) -> None:
    """Tables of one schema, at least one, into one Parquet file; only one of them is in memory."""
    filesystem, path = resolve(uri)
    writer = None
    with _writing(uri):
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(path, table.schema, filesystem=filesystem, **_parquet(table.schema))
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def write_batches(uri: str | Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], compression: str | None = None) -> None:
    """Record batches into one Arrow file, from which any of them can be read alone."""
    filesystem, path = resolve(uri)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with _writing(uri):
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with (
            filesystem.open_output_stream(path, compression=None) as sink,
            pa.ipc.new_file(sink, schema, options=options) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)


def read_batch(uri: str | Path, number: int) -> pa.RecordBatch:
    """One record batch of an Arrow file."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as source:
        return pa.ipc.open_file(source).get_batch(number)


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table as a single batch, empty or not."""
    batches = table.combine_chunks().to_batches()
    assert len(batches) < 2, "a column of text is longer than 2 GiB"
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def read_table(uri: str | Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file, or every `part-*.parquet` of a directory in name order."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise StorageError(f"{shown(uri)}: not found")
    paths = [path] if info.is_file else list_files(uri, ".parquet")
    if not paths:
        raise StorageError(f"{shown(uri)}: no Parquet files")
    return pa.concat_tables(pq.read_table(p, filesystem=filesystem, columns=columns, partitioning=None) for p in paths)


def iter_tables(uri: str | Path, rows: int) -> Iterator[pa.Table]:
    """A Parquet file, at most so many rows at a time; no more of it is in memory."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as source:
        for batch in pq.ParquetFile(source).iter_batches(rows):
            yield pa.Table.from_batches([batch])


def list_files(uri: str | Path, suffix: str = "") -> list[str]:
    """Paths (without scheme) of the files below a directory, sorted; hidden files are left out."""
    filesystem, path = resolve(uri)
    with _reading(uri):
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(i.path for i in infos if i.is_file and i.path.endswith(suffix) and not _hidden(i.path.removeprefix(path)))


def list_uris(uri: str | Path, suffix: str = "") -> list[str]:
    """The same files, named as the directory is, so that `storage` reads them."""
    _, path = resolve(uri)
    return [join(uri, p.removeprefix(path).lstrip("/")) for p in list_files(uri, suffix)]


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.strip("/").split("/"))


def copy(source: str, target: str) -> None:
    """The same file at another place of the same filesystem; a local one is linked where that is possible."""
    filesystem, path = resolve(source)
    _, other = resolve(target)
    filesystem.create_dir(other.rsplit("/", 1)[0], recursive=True)
    if is_local(source):
        Path(other).unlink(missing_ok=True)  # never write into a file that is linked to its source already
        try:
            os.link(path, other)
            return
        except FileExistsError:  # another attempt of the same task linked it just now; writing would go into the source
            return
        except OSError:  # another disk, or a filesystem without links
            pass
    filesystem.copy_file(path, other)


def rows(uri: str | Path) -> int:
    """Rows of a Parquet file, from its footer."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as source:
        return int(pq.ParquetFile(source).metadata.num_rows)


def delete(uri: str | Path) -> None:
    """Delete a file or a directory; nothing happens when there is none."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif info.type == pafs.FileType.File:
        filesystem.delete_file(path)


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False))


def file_fingerprint(uri: str | Path) -> str:
    """Content hash of a file, or of every file below a directory."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise StorageError(f"{shown(uri)}: not found")
    if info.is_file:
        return file_fingerprint_of_path(str(uri), path)
    return fingerprint({p.removeprefix(path): file_fingerprint_of_path(str(uri), p) for p in list_files(uri)})


class Directory:
    """A published directory.

    Writing: `prefix = directory.begin(fp)`, write below `prefix`, then `directory.publish(...)`.
    Reading: `directory.prefix`, `directory.manifest`, `directory.path("name")`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = absolute(root)

    @property
    def _manifest_uri(self) -> str:
        return join(self.root, "manifest.json")

    def begin(self, inputs: str) -> str:
        """A fresh, empty, unpublished prefix for what is made from `inputs` (a fingerprint)."""
        prefix = join(self.root, inputs[:16])
        if self.is_published(inputs):
            delete(self._manifest_uri)  # the same prefix is written anew: never a manifest over half of it
        delete(prefix)
        return prefix

    def is_published(self, inputs: str) -> bool:
        """Whether what is made from `inputs` is here and complete."""
        if not exists(self._manifest_uri):
            return False
        try:
            manifest = read_json(self._manifest_uri)
        except StorageError:  # damaged: as if there were none
            return False
        return bool(manifest.get("inputs") == inputs and manifest.get("schema_version") == SCHEMA_VERSION)

    def publish(self, inputs: str, **meta: Any) -> dict[str, Any]:
        """Write the manifest: from now on readers see the prefix. Older prefixes are removed afterwards."""
        prefix = inputs[:16]
        base = resolve(join(self.root, prefix))[1]
        paths = list_files(join(self.root, prefix))
        with ThreadPoolExecutor(8) as pool:
            hashes = pool.map(lambda path: file_fingerprint_of_path(self.root, path), paths)
            files = {p.removeprefix(base + "/"): h for p, h in zip(paths, hashes, strict=True)}
        manifest = {"schema_version": SCHEMA_VERSION, "inputs": inputs, "prefix": prefix, "files": files, **meta}
        write_json(self._manifest_uri, manifest)
        for old in self._prefixes():
            if old != prefix:
                delete(join(self.root, old))
        return manifest

    def amend(self, **meta: Any) -> None:
        """Change what the manifest says beside its files."""
        write_json(self._manifest_uri, self.manifest | meta)

    def _prefixes(self) -> Iterator[str]:
        filesystem, path = resolve(self.root)
        for info in filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
            if info.type == pafs.FileType.Directory and re.fullmatch("[0-9a-f]{16}", info.base_name):
                yield info.base_name

    @property
    def manifest(self) -> dict[str, Any]:
        if not exists(self._manifest_uri):
            raise StorageError(f"{shown(self.root)}: nothing is published here (no manifest.json)")
        manifest = read_json(self._manifest_uri)
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise StorageError(
                f"{shown(self.root)}: schema_version {manifest.get('schema_version')!r}, this version reads {SCHEMA_VERSION}; "
                "make it anew with this version"
            )
        return dict(manifest)

    @property
    def prefix(self) -> str:
        return join(self.root, self.manifest["prefix"])

    def path(self, *parts: str) -> str:
        return join(self.prefix, *parts)

    def verify(self) -> None:
        """Raise StorageError unless every file is there with its checksum."""
        manifest = self.manifest
        for name, expected in manifest["files"].items():
            uri = join(self.root, manifest["prefix"], name)
            if not exists(uri):
                raise StorageError(f"{shown(uri)}: missing, though the manifest names it")
            if sha256(read_bytes(uri)) != expected:
                raise StorageError(f"{shown(uri)}: checksum differs from the manifest; the file is damaged or was changed")


def file_fingerprint_of_path(root: str, path: str) -> str:
    """SHA-256 of one file given as a path on `root`'s filesystem."""
    filesystem, _ = resolve(root)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
