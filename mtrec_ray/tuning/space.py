"""The search space: key paths of the run configuration with distributions, checked at load; and the points drawn from it.

    search:
      tasks.rating.weight: {log_uniform: [0.01, 1]}
      model.width: {choice: [32, 64, 128]}
    fixed:
      train.epochs: 60
    points:
      - {model.width: 128}

Point 0 is the configuration as it is, then come the given `points`, then a scrambled Sobol sequence (Sobol 1967; Owen 1998):
it covers many dimensions more evenly than independent draws, and more points continue the same sequence.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, model_validator
from scipy.stats import qmc

from mtrec_ray.config import ConfigError, RunConfig, parse_config
from mtrec_ray.config.base import Int, Model
from mtrec_ray.config.load import read_mapping, set_key

DIGITS = 4
"""Significant digits of a drawn number, so that the best configuration can be read."""
INSIDE = 0.37
"""A place inside a range that is tried at load beside its ends: a fraction where only whole numbers are accepted shows there."""
COMBINATIONS = 64
"""Other points that a value is tried in before it is refused at load."""

PREPARED = "changes the prepared data, which all trials share; make a configuration of its own for each value and tune each"
JUDGED = "says how trials are run or judged, so trials would not be comparable"
MEANING = "is what the task means, so trials would not be comparable; make a configuration of its own and tune it"
NEVER = {
    "data": PREPARED,
    "encoder": PREPARED,
    "pretrain": "makes an encoder, which all trials share; pre-train with each value and tune each",
    "name": "is not trained with; leave it out",
    "seed": "is not searched, since the luckiest would win; --finalists K --seeds S tries other seeds",
    "evaluation": JUDGED + "; set it in the configuration",
    "ranking": JUDGED + "; set it in the configuration",
    "scoring": "is not trained with; leave it out",
    "balancing.record": "measures and trains nothing; leave it out",
    "balancing.record_every": "measures and trains nothing; leave it out",
    **{f"train.{n}": "is set by the job for all trials; leave it out"
       for n in ("workers", "threads", "use_gpu", "feed", "stream_buffer", "checkpoint_every", "max_failures")},
}  # fmt: skip
NOT_SEARCHED = {
    f"train.{n}": JUDGED + "; put it under fixed" for n in ("epochs", "patience", "monitor", "reference", "evaluate_every")
}
TASK_MEANING = {"kind", "label", "labels", "attribute", "interest", "column", "positive"}


class Distribution(Model):
    """Exactly one of these."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    """Uniform in the logarithm: as often between 0.01 and 0.1 as between 0.1 and 1."""
    int_uniform: tuple[Int, Int] | None = None
    """Whole numbers, both ends included."""
    choice: tuple[Any, ...] | None = None
    """Values of any kind, whole sections too."""

    @model_validator(mode="after")
    def _check(self) -> Distribution:
        given = [n for n in type(self).model_fields if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"one distribution of {sorted(type(self).model_fields)} is needed, found {given or 'none'}")
        if self.choice is not None:
            if len(self.choice) < 2:
                raise ValueError("choice: a single value is no search; put it under fixed")
            if any(v in self.choice[:i] for i, v in enumerate(self.choice)):
                raise ValueError(f"choice: a value occurs twice in {list(self.choice)}")
            return self
        low, high = self.ends
        if not low < high:
            raise ValueError(f"{given[0]}: two increasing ends, found {[low, high]}")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform: both ends are above 0, found {[low, high]}; use uniform")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        found = self.uniform or self.log_uniform or self.int_uniform
        assert found is not None
        return found

    @property
    def tried(self) -> tuple[Any, ...]:
        """The values that are tried at load."""
        return self.choice or (*self.ends, self.at(INSIDE))

    def at(self, share: float) -> Any:
        """The value below which a share in [0, 1) of the distribution lies."""
        if self.choice is not None:
            return self.choice[int(share * len(self.choice))]
        low, high = self.ends
        if self.int_uniform is not None:
            return int(low) + int(share * (high - low + 1))
        value = low + share * (high - low) if self.uniform is not None else low * math.exp(share * math.log(high / low))
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)


class Asha(Model):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934)."""

    first_rung: Int | None = Field(default=None, ge=1)
    """Epochs after which a trial may be stopped for the first time. Default: a ninth of train.epochs."""
    reduction: float = Field(default=3.0, gt=1)
    """Of the trials at a rung, one in so many goes on; the next rung is so many times later."""


class Space(Model):
    """What is searched, what is fixed for all trials, where the search starts."""

    search: dict[str, Distribution]
    fixed: dict[str, Any] = Field(default_factory=dict)
    points: tuple[dict[str, Any], ...] = ()
    """Tried after the configuration itself; keys that a point leaves out are the configuration's."""
    seed: Int = Field(default=0, ge=0)
    asha: Asha = Asha()


@dataclass(frozen=True)
class Point:
    """One point of the space."""

    number: int
    values: dict[str, Any]
    config: RunConfig | None
    """None: the configuration refuses it."""
    refused: str = ""


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values at some key paths. Raises ConfigError."""
    raw = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        set_key(raw, key, copy.deepcopy(value))
    return parse_config(raw)


def value_at(config: RunConfig, key: str) -> Any:
    """What the configuration says at a key path. Raises ConfigError for one that it does not have."""
    node: Any = config.model_dump(mode="json")
    passed = ""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            near = difflib.get_close_matches(part, node, 1) if isinstance(node, dict) else []
            hint = f"; did you mean {passed + near[0]}?" if near else ""
            raise ConfigError(f"unknown key{hint}")
        node, passed = node[part], f"{passed}{part}."
    return node


def load_space(path: str | Path, config: RunConfig) -> Space:
    """Read a space and check it against the configuration. Raises ConfigError with one line for each mistake."""
    try:
        space = Space.model_validate(read_mapping(path))
    except ValidationError as error:
        raise ConfigError(_joined(path, [_said(e) for e in error.errors()])) from None
    wrong = list(_wrong_keys(space, config)) or list(_wrong_values(space, config))
    if wrong:
        raise ConfigError(_joined(path, wrong))
    return space


def start_of(space: Space, config: RunConfig) -> RunConfig:
    """The configuration with what is fixed: the trial that all others are compared with."""
    return with_values(config, space.fixed)


def draw(space: Space, config: RunConfig, trials: int) -> list[Point]:
    """Points in a fixed order until so many are accepted; refused ones are in the list too, repeated ones are not.

    Fewer when the space has no more. More trials later give the same points first.
    """
    start = start_of(space, config)
    base = {key: value_at(start, key) for key in space.search}
    found: list[Point] = []
    known: list[dict[str, Any]] = []
    accepted = 0
    for values in _values(space, base, 64 * (trials + 8)):
        if accepted == trials:
            break
        if values in known:
            continue
        known.append(values)
        point = _point(len(found), values, start)
        accepted += point.config is not None
        found.append(point)
    return found


def _values(space: Space, base: dict[str, Any], draws: int) -> Iterator[dict[str, Any]]:
    yield base
    for point in space.points:
        yield base | point
    yield from _drawn(space, draws)


def _drawn(space: Space, draws: int) -> Iterator[dict[str, Any]]:
    power = math.ceil(math.log2(draws))
    engine = qmc.Sobol(len(space.search), scramble=True, rng=np.random.default_rng(space.seed))
    for share_K in engine.random_base2(power):
        yield {key: distribution.at(float(u)) for (key, distribution), u in zip(space.search.items(), share_K, strict=True)}


def _point(number: int, values: dict[str, Any], start: RunConfig) -> Point:
    try:
        return Point(number, values, with_values(start, values))
    except ConfigError as error:
        return Point(number, values, None, _reason(error))


def _wrong_keys(space: Space, config: RunConfig) -> Iterator[str]:
    if not space.search:
        yield "search: empty; name at least one key, such as train.learning_rate: {log_uniform: [3e-4, 3e-3]}"
    keys = [("search", k) for k in space.search] + [("fixed", k) for k in space.fixed]
    for place, key in keys:
        refused = _refused(key, place)
        if refused:
            yield f"{place}.{key}: {refused}"
            continue
        try:
            value_at(config, key)
        except ConfigError as error:
            yield f"{place}.{key}: {error}"
    for (one, key), (other, again) in itertools.combinations(keys, 2):
        if f"{key}.".startswith(f"{again}.") or f"{again}.".startswith(f"{key}."):
            cure = "leave one of them out" if one == other else "a key is either fixed or searched"
            yield f"{one}.{key}: is set by {other}.{again} too; {cure}"
    for number, point in enumerate(space.points):
        for key in point.keys() - space.search.keys():
            yield f"points[{number}].{key}: is not searched; put it under search or leave it out"


def _refused(key: str, place: str) -> str:
    """Why a key may not be here; empty when it may."""
    parts = key.split(".")
    for known, why in (NEVER | (NOT_SEARCHED if place == "search" else {})).items():
        if f"{key}.".startswith(f"{known}."):
            return why
    if parts[0] == "tasks" and (len(parts) < 3 or parts[2] in TASK_MEANING):
        return MEANING
    if len(parts) == 1:
        return "is a whole section; name the keys in it, such as model.width"
    return ""


def _wrong_values(space: Space, config: RunConfig) -> Iterator[str]:
    for key, value in space.fixed.items():
        try:
            with_values(config, {key: value})
        except ConfigError as error:
            yield f"fixed.{key}: {value!r} is refused: {_reason(error)}"
            return
    try:
        start = start_of(space, config)
    except ConfigError as error:
        yield f"fixed: the values contradict each other: {_reason(error)}"
        return
    others = list(_drawn(space, COMBINATIONS))
    for key, distribution in space.search.items():
        for value in distribution.tried:
            first = _point(0, {key: value}, start).refused
            # a contradiction with the rest may be resolved by what else is searched: then single points are refused, not the value
            if first and all(_point(0, values | {key: value}, start).refused for values in others):
                yield f"search.{key}: {value!r} is refused: {first}{_whole(distribution, first)}"
                break
    for number, point in enumerate(space.points):
        refused = _point(0, point, start).refused
        if refused:
            yield f"points[{number}]: refused: {refused}"


def _whole(distribution: Distribution, why: str) -> str:
    fractions = distribution.choice is None and distribution.int_uniform is None and "integer" in why
    return ". Whole numbers need int_uniform or choice" if fractions else ""


def _reason(error: ConfigError) -> str:
    """The lines about keys, as one."""
    return "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)


def _said(error: Any) -> str:
    place = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = Space if len(error["loc"]) == 1 else Distribution if error["loc"][0] == "search" else Asha
        return f"{place}: unknown key; there is {sorted(known.model_fields)}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"


def _joined(path: str | Path, wrong: list[str]) -> str:
    return "\n".join([f"{path}: {len(wrong)} wrong key(s)", *[f"  {line}" for line in wrong]])
