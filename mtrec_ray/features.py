"""Features of events as fitted transforms: one `encode` for prepare, batch scoring and serving. It knows no Ray.

    kind          the clean log and the history store hold   the model reads
    categorical   text                                       its number in the vocabulary, an embedding
    multihot      a list of texts                            their numbers, the mean or sum of embeddings
    numerical     a number                                   a standardised number, or a bucket's embedding
    text          text                                       the TextEncoder's vector (encoders/event_texts.py), projected
    kept          a number                                   nothing

In a vocabulary 0 is missing, 1 is any value outside it, and its values count from 2.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Use = Literal["history", "request", "both"]
"""Where a feature is read: in the tokens of past events, in the event to predict, or in both."""
MISSING, UNKNOWN, FIRST = 0, 1, 2
MAX_VALUES = 1000
"""Values of one event that a multi-hot feature takes."""
MAX_TEXT = 20_000
"""Characters of one event's text."""
LIMIT = 10.0
"""A standardised number is cut at this many standard deviations, so that a wrong price does not drown everything else."""

TEXT, TEXTS, NUMBER = pa.string(), pa.list_(pa.string()), pa.float64()

Encoded: TypeAlias = NDArray[Any] | pa.ListArray
"""One entry per event: numbers of a vocabulary or buckets (int32), standardised numbers (float32, NaN is missing), hashes of
texts (int64, 0 is missing), or lists of distinct numbers of a vocabulary in ascending order."""
Raw = str | bool | int | float


class FeatureError(ValueError):
    """A value that a feature cannot have; the message says what it expects."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def column(self, values: Sequence[object]) -> pa.Array:
        """Values as a request or the store has them -> the column of them, as in the clean log. Raises FeatureError."""
        try:
            return self._column(values)
        except FeatureError as error:
            raise FeatureError(f"{self.name}: {error}") from None

    def _column(self, values: Sequence[object]) -> pa.Array:
        raise NotImplementedError


class _Input(_Spec):
    use: Use = "both"
    at_inference: Raw | tuple[Raw, ...] | None = None
    """What every request has, whatever it says; None: what it says."""

    @property
    def in_history(self) -> bool:
        return self.use != "request"

    @property
    def in_request(self) -> bool:
        return self.use != "history"


class _Vocabulary(_Input):
    values: tuple[str, ...]
    outside: int = 0
    """Occurrences in training of values that are out of the vocabulary."""

    @property
    def size(self) -> int:
        """Numbers that an encoded value can be."""
        return len(self.values) + FIRST

    @cached_property
    def _numbers(self) -> dict[str | None, int]:
        return {None: MISSING, "": MISSING} | {v: i for i, v in enumerate(self.values, start=FIRST)}

    def _encode(self, texts: pa.StringArray) -> NDArray[np.int32]:
        """Every distinct text is looked up once."""
        distinct = texts.dictionary_encode()
        table = [self._numbers.get(v, UNKNOWN) for v in distinct.dictionary.to_pylist()]
        places = distinct.indices.fill_null(len(table)).to_numpy(zero_copy_only=False)
        return np.array([*table, MISSING], dtype=np.int32)[places]


class CategoricalSpec(_Vocabulary):
    """One text per event."""

    kind: Literal["categorical"] = "categorical"

    def _column(self, values: Sequence[object]) -> pa.Array:
        return pa.array([text_of(v) for v in values], TEXT)

    def encode(self, values: pa.Array | Sequence[object]) -> NDArray[np.int32]:
        """Texts, or values as in `column` -> numbers of the vocabulary."""
        return self._encode(values if isinstance(values, pa.Array) else self.column(values))


class MultihotSpec(_Vocabulary):
    """A set of texts per event; missing is the empty set."""

    kind: Literal["multihot"] = "multihot"
    separator: str | None = None
    pool: Literal["mean", "sum"] = "mean"

    def _column(self, values: Sequence[object]) -> pa.Array:
        lists = [v if isinstance(v, list | tuple) else [v] for v in values]
        found = clean_lists(pa.array([[text_of(x) for x in v] for v in lists], TEXTS), self.separator)
        if np.diff(found.offsets.to_numpy()).max(initial=0) > MAX_VALUES:
            raise FeatureError(f"expected at most {MAX_VALUES} values")
        return found

    def encode(self, values: pa.Array | Sequence[object]) -> pa.ListArray:
        """Lists of texts, or values as in `column` -> lists of numbers of the vocabulary."""
        lists = values if isinstance(values, pa.Array) else self.column(values)
        owner, texts = _flat(lists)
        code = self._encode(texts).astype(np.int64)
        there = code != MISSING
        pairs = np.sort(owner[there] * self.size + code[there])
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        owner, code = np.divmod(pairs, self.size)
        return _lists(owner, pa.array(code.astype(np.int32)), len(lists))


class NumericalSpec(_Input):
    """A number per event."""

    kind: Literal["numerical"] = "numerical"
    transform: Literal["standard", "log", "quantile"] = "standard"
    mean: float = 0.0
    std: float = 1.0
    edges: tuple[float, ...] = ()
    """`quantile`: upper edges of all buckets but the last, inclusive."""
    fitted_on: int = 0
    """Training values that it was fitted on."""

    @property
    def size(self) -> int:
        """`quantile`: missing, and the buckets."""
        return len(self.edges) + 2

    def _column(self, values: Sequence[object]) -> pa.Array:
        return pa.array([number_of(v) for v in values], NUMBER)

    def encode(self, values: pa.Array | Sequence[object]) -> NDArray[Any]:
        """Numbers, or values as in `column` -> standardised numbers, or buckets from 1 on with 0 for missing."""
        column = values if isinstance(values, pa.Array) else self.column(values)
        x = column.to_numpy(zero_copy_only=False).astype(np.float64)
        if self.transform == "quantile":
            return np.where(np.isnan(x), MISSING, 1 + np.searchsorted(self.edges, x, side="left")).astype(np.int32)
        with np.errstate(over="ignore"):
            z = ((signed_log(x) if self.transform == "log" else x) - self.mean) / self.std
        return np.clip(z, -LIMIT, LIMIT).astype(np.float32)


class TextSpec(_Spec):
    """A free text per event, of the history alone: a review, a search."""

    kind: Literal["text"] = "text"

    in_history: ClassVar[bool] = True

    def _column(self, values: Sequence[object]) -> pa.Array:
        found = clean_texts(pa.array([text_of(v) for v in values], TEXT))
        if (pc.max(pc.utf8_length(found)).as_py() or 0) > MAX_TEXT:
            raise FeatureError(f"expected at most {MAX_TEXT} characters")
        return found

    def encode(self, values: pa.Array | Sequence[object]) -> NDArray[np.int64]:
        """Texts, or values as in `column` -> their hashes."""
        return hash_texts(values if isinstance(values, pa.Array) else self.column(values))


class KeptSpec(_Spec):
    """A number per event that no model reads."""

    kind: Literal["kept"] = "kept"

    def _column(self, values: Sequence[object]) -> pa.Array:
        return pa.array([number_of(v) for v in values], NUMBER)


RequestSpec = CategoricalSpec | MultihotSpec | NumericalSpec
"""Features that a request may have."""
InputSpec = RequestSpec | TextSpec
"""Features that the model reads."""
FeatureSpec = Annotated[InputSpec | KeptSpec, Field(discriminator="kind")]


# --------------------------------------------------------------------------- values


def text_of(value: object) -> str | None:
    """A value as text, the way that a column of such values becomes text. Raises FeatureError."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(float(value))
    raise FeatureError(f"expected text or a number, found {reprlib.repr(value)}")


def number_of(value: object) -> float | None:
    """A value as a number; None is missing, and so is NaN. Raises FeatureError."""
    if value is None:
        return None
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isinf(number):
            return None if math.isnan(number) else number
    raise FeatureError(f"expected a finite number, found {reprlib.repr(value)}")


def signed_log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sign(x) * np.log1p(np.abs(x)))


def clean_lists(lists: pa.Array, separator: str | None) -> pa.ListArray:
    """Lists of texts: every text is cut at the separator and loses the white space around it; empty and missing texts go."""
    owner, texts = _flat(lists)
    if separator is not None:
        parts = pc.split_pattern(texts, separator)
        inner, texts = _flat(parts)
        owner, texts = owner[inner], pc.utf8_trim_whitespace(texts)
    there = pc.fill_null(pc.not_equal(texts, ""), False)
    return _lists(owner[there.to_numpy(zero_copy_only=False)], texts.filter(there), len(lists))


def clean_texts(texts: pa.Array | pa.ChunkedArray) -> Any:
    """Free texts without white space around them; what is left empty is missing."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, TEXT), trimmed)


def hash_texts(texts: pa.Array) -> NDArray[np.int64]:
    """SipHash of every text with a key of its own; 0 where it is missing. Two of 10^8 texts have one hash with 3 in 10,000."""
    encoded = texts.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
    hashed = (
        pd.util.hash_array(distinct, hash_key="mtrec_ray_texts!", categorize=False) if len(distinct) else np.zeros(0, np.uint64)
    )
    table = np.append(hashed, np.uint64(MISSING)).view(np.int64)
    return table[encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)]


def _flat(lists: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """-> (the list that each value is of, values); a missing list has none."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lists)), lengths), lists.flatten()


def _lists(owner: NDArray[np.int64], values: pa.Array, n: int) -> pa.ListArray:
    """The inverse of `_flat`; owner ascends."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n))])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def dense(encoded: Encoded) -> NDArray[Any]:
    """Encoded values as one array: lists become rows, see `padded`."""
    if isinstance(encoded, pa.ListArray):
        return padded(encoded.flatten().to_numpy(), pc.list_value_length(encoded).to_numpy())
    return encoded


def padded(values: NDArray[Any], length: NDArray[Any]) -> NDArray[np.int64]:
    """Lists one after the other, and their lengths -> (lists, longest), filled with MISSING; at least one column."""
    out = np.full((len(length), max(1, int(length.max(initial=0)))), MISSING, np.int64)
    start = np.cumsum(length) - length
    out[np.repeat(np.arange(len(length)), length), np.arange(len(values)) - np.repeat(start, length)] = values
    return out
