"""The strict YAML loader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mtrec_ray.config.run import RunConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each key and the cure."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file into a `RunConfig`.

    overrides: `tasks.rating.weight=0.5`; the value is read as YAML.
    Raises ConfigError with one line for each wrong key.
    """
    raw = read_mapping(path)
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file with a mapping at its top, in which no key occurs twice. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(raw).__name__}")
    return raw


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_config(raw: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate a mapping; `source` names it in messages."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {len(error.errors())} wrong key(s)"]
        for e in error.errors():
            loc = [str(p) for p in e["loc"]]
            if len(loc) > 3 and loc[:2] in (["data", "context"], ["data", "item_features"]):
                del loc[3]  # pydantic names the kind of a feature in the path
            message = e["msg"].removeprefix("Value error, ")
            if e["type"] == "extra_forbidden":
                lines.append(f"  {'.'.join(loc)}: unknown key")
            elif e["type"] == "value_error" and isinstance(e["input"], dict):
                dot = bool(re.match(r"[\w.]+: ", message)) or not loc  # a part's own check may begin with the key
                lines.append("  " + ".".join(loc) + (("." if loc else "") if dot else ": ") + message)
            else:
                found = "" if isinstance(e["input"], dict) else f" (found {e['input']!r})"
                lines.append(f"  {'.'.join(loc)}: {message}{found}")
        raise ConfigError("\n".join(lines)) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        set_key(raw, key.strip(), yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value") from None
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a key path such as `tasks.rating.weight`; sections on the way are made. Raises ConfigError for one that is a value."""
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{parent!r} holds a value, not a mapping")
        node = child
    node[last] = value
