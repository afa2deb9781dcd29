"""`data.context`: columns of the event that are features, and how each of them is read (docs/features.md)."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mtrec_ray.config.base import Int, Model
from mtrec_ray.features import Use


class _Feature(Model):
    use: Use = "both"
    """`history`: it enters the tokens of past events. `request`: it is known of the event to predict, and enters the sharing
    layers. `both`: the two."""

    @model_validator(mode="after")
    def _check_use(self) -> _Feature:
        if getattr(self, "at_inference", None) is not None and self.use != "request":
            raise ValueError("at_inference: it fixes what a request says, and past events keep what they had: add use: request")
        return self


class _Vocabulary(_Feature):
    min_count: Int = Field(default=1, ge=1)
    """Values that occur less often in training are out of the vocabulary."""
    max_values: Int = Field(default=10_000, ge=1)
    """The most frequent are kept, ties by value; all others are out of the vocabulary."""


class CategoricalFeature(_Vocabulary):
    """One text (or number read as text) per event."""

    kind: Literal["categorical"]
    at_inference: str | bool | int | float | None = None
    """The value of every request, whatever it says; the column then is a feature of training alone. Null: as requested."""


class MultihotFeature(_Vocabulary):
    """A set of texts per event: a list column, or one text with a separator."""

    kind: Literal["multihot"]
    separator: str | None = Field(default=None, min_length=1)
    """What stands between two values of a text; white space around values is dropped then."""
    pool: Literal["mean", "sum"] = "mean"
    """How the vectors of the values become one."""
    at_inference: str | tuple[str | bool | int | float, ...] | None = None
    """The value of every request, whatever it says; the column then is a feature of training alone. Null: as requested."""


class _Number(Model):
    min: float | None = None
    """Values below are quarantined."""
    max: float | None = None
    """Values above are quarantined."""

    @model_validator(mode="after")
    def _check_bounds(self) -> _Number:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min: it is above max")
        return self


class NumericalFeature(_Feature, _Number):
    """A number per event: price at the time, hours since publication."""

    kind: Literal["numerical"]
    transform: Literal["standard", "log", "quantile"] = "standard"
    """`standard`: (x - mean) / standard deviation. `log`: the same of sign(x) · log(1 + |x|). `quantile`: a bucket of equally
    many training events, which has an embedding."""
    bins: Int = Field(default=10, ge=2, le=1000)
    """`quantile` only: buckets; fewer where many values are equal."""
    at_inference: float | None = None
    """The value of every request, whatever it says; the column then is a feature of training alone. Null: as requested."""


class TextFeature(Model):
    """A free text per event, such as a review or a search, that the history shows through the TextEncoder."""

    kind: Literal["text"]


class KeptFeature(_Number):
    """A number per event that no model reads, such as the propensity of an impression: kept in the clean log and in the
    windows."""

    kind: Literal["kept"]


def _named(value: Any) -> Any:
    """The short form: a list of names of categorical columns."""
    if isinstance(value, list | tuple) and all(isinstance(n, str) for n in value):
        twice = sorted(n for n, count in Counter(value).items() if count > 1)
        if twice:
            raise ValueError(f"{twice} are listed twice")
        return {name: {"kind": "categorical"} for name in value}
    return value


FeatureConfig = Annotated[
    CategoricalFeature | MultihotFeature | NumericalFeature | TextFeature | KeptFeature, Field(discriminator="kind")
]
Features = Annotated[dict[str, FeatureConfig], BeforeValidator(_named)]


class _ItemVocabulary(Model):
    min_count: Int = Field(default=1, ge=1)
    """Values of fewer items of the training catalogue are out of the vocabulary."""
    max_values: Int = Field(default=100, ge=2)
    """The most frequent are kept, ties by value; all others are out of the vocabulary."""


class CategoricalItemFeature(_ItemVocabulary):
    """One text per item."""

    kind: Literal["categorical"]

    def as_feature(self) -> CategoricalFeature | MultihotFeature:
        """The same as a feature of events, as feature_fit.py counts and fits it."""
        return CategoricalFeature(kind=self.kind, min_count=self.min_count, max_values=self.max_values)


class MultihotItemFeature(_ItemVocabulary):
    """A set of texts per item."""

    kind: Literal["multihot"]
    separator: str | None = Field(default=None, min_length=1)
    """What stands between two values of a text; white space around values is dropped then."""

    def as_feature(self) -> CategoricalFeature | MultihotFeature:
        """The same as a feature of events, as feature_fit.py counts and fits it."""
        return MultihotFeature(kind=self.kind, separator=self.separator, min_count=self.min_count, max_values=self.max_values)


ItemFeatureConfig = Annotated[CategoricalItemFeature | MultihotItemFeature, Field(discriminator="kind")]
