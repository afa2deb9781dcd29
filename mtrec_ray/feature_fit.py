"""Fitting features on training events, partition by partition. It knows no Ray.

What partitions say is merged into what the whole log says, and no result depends on their number or order:

    vocabularies   how often each value occurs, exactly
    numbers        all values where there are at most SAMPLE; else the SAMPLE values whose events have the smallest hash
                   (a sample without replacement: with 99 % probability every quantile is within 0.9 % of the ranks,
                   Dvoretzky-Kiefer-Wolfowitz with Massart's constant, 1990; mean and standard deviation are the sample's)
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config.features import FeatureConfig, MultihotFeature, NumericalFeature
from mtrec_ray.features import (
    UNKNOWN,
    CategoricalSpec,
    FeatureError,
    FeatureSpec,
    KeptSpec,
    MultihotSpec,
    NumericalSpec,
    TextSpec,
    dense,
    signed_log,
)  # fmt: skip
from mtrec_ray.hashing import GOLDEN, mix

SAMPLE = 1 << 15
"""Half a MiB per partition and feature."""
MAX_DISTINCT = 1 << 18
"""Values of a vocabulary that one partition may have."""

_COUNTS = pa.schema([("value", pa.string()), ("count", pa.int64())])
_SAMPLE = pa.schema([("hash", pa.uint64()), ("value", pa.float64())])


def count(feature: FeatureConfig, values: pa.Array, row: NDArray[np.int64]) -> pa.Table:
    """What some training events say about a feature. values: as in the clean log; row: the events' rows, each its own.

    Raises FeatureError where a vocabulary has too many values.
    """
    if feature.kind in ("kept", "text"):
        return _SAMPLE.empty_table()
    if isinstance(feature, NumericalFeature):
        there = values.is_valid()
        hashed = mix(row[there.to_numpy(zero_copy_only=False)].astype(np.uint64) + np.uint64(GOLDEN))
        return _smallest(pa.table([pa.array(hashed), values.filter(there)], schema=_SAMPLE))
    texts = (values.flatten() if isinstance(feature, MultihotFeature) else values).drop_null()
    counts = pc.value_counts(texts)
    if len(counts) > MAX_DISTINCT:
        raise FeatureError(
            f"has {len(counts)} different values in one partition, more than {MAX_DISTINCT}: such a column is an id, no feature"
        )
    return pa.table([counts.field("values"), counts.field("counts")], schema=_COUNTS)


def merge(feature: FeatureConfig, parts: list[pa.Table]) -> pa.Table:
    """What several sets of events say together."""
    together = pa.concat_tables(parts)
    if together.schema == _SAMPLE:
        return _smallest(together)
    return together.group_by("value").aggregate([("count", "sum")]).rename_columns(["value", "count"])


def _smallest(sample: pa.Table) -> pa.Table:
    return sample.sort_by("hash").slice(0, SAMPLE)


def fit(name: str, feature: FeatureConfig, found: pa.Table) -> FeatureSpec:
    """found: from `merge` (or `count`) over all training events. Raises FeatureError for an `at_inference` that training lacks."""
    if feature.kind == "kept":
        return KeptSpec(name=name)
    if feature.kind == "text":
        return TextSpec(name=name)
    common = {"name": name, "use": feature.use, "at_inference": feature.at_inference}
    if isinstance(feature, NumericalFeature):
        return _fit_numbers(NumericalSpec(**common, transform=feature.transform), feature.bins, found["value"].to_numpy())
    known = found.filter(pc.greater_equal(found["count"], feature.min_count))
    known = known.sort_by([("count", "descending"), ("value", "ascending")]).slice(0, feature.max_values)
    outside = (pc.sum(found["count"]).as_py() or 0) - (pc.sum(known["count"]).as_py() or 0)
    common |= {"values": tuple(sorted(known["value"].to_pylist())), "outside": outside}
    spec: CategoricalSpec | MultihotSpec
    if isinstance(feature, MultihotFeature):
        spec = MultihotSpec(**common, separator=feature.separator, pool=feature.pool)
    else:
        spec = CategoricalSpec(**common)
    if spec.at_inference is not None and (dense(spec.encode([spec.at_inference])) == UNKNOWN).any():
        raise FeatureError(
            f"at_inference: {spec.at_inference!r} is not in the vocabulary; no training event has it, or too few "
            f"(min_count {feature.min_count}, max_values {feature.max_values})"
        )
    return spec


def _fit_numbers(spec: NumericalSpec, bins: int, values: NDArray[np.float64]) -> NumericalSpec:
    fitted = {"fitted_on": len(values)}
    if not len(values):
        return spec.model_copy(update=fitted)
    if spec.transform == "quantile":
        # edges are values of the log; none stands where no training value lies above
        edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
        return spec.model_copy(update=fitted | {"edges": tuple(edges[edges < values.max()].tolist())})
    values = np.sort(signed_log(values) if spec.transform == "log" else values)
    # in units of a power of two near the largest, so that no square overflows or vanishes
    scale = 2.0 ** (np.frexp(np.abs(values).max())[1] - 1)
    mean, std = (float(x * scale) for x in ((values / scale).mean(), (values / scale).std()))
    constant = values[0] == values[-1] or std == 0
    return spec.model_copy(update=fitted | {"mean": float(values[0]) if constant else mean, "std": 1.0 if constant else std})
