"""docs/configuration.md, from the models and their docstrings: `python -m mtrec_ray.config.reference > docs/configuration.md`."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mtrec_ray.config import BaseTask, RunConfig
from mtrec_ray.tasks import KINDS

HEAD = """# Configuration

Every key of a run's YAML, with its default. Unknown keys are refused; `key.path=value` on the command line overrides one.
Written by `python -m mtrec_ray.config.reference`: change the docstrings in `mtrec_ray/config/`, not this page.
"""


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type is made of."""
    if annotation is BaseTask:
        yield from (KINDS[kind].config for kind in sorted(KINDS))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_of(part)


def type_of(annotation: Any) -> str:
    """A type as people write it in YAML."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{p}`" for p in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_of(p) for p in parts))
    if origin is typing.Annotated:
        return type_of(parts[0])
    if origin in (tuple, list):
        return "list of " + " or ".join(dict.fromkeys(type_of(p) for p in parts if p is not Ellipsis))
    if origin is dict:
        return f"mapping to {type_of(parts[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "`null`"}
    return names.get(annotation, "section" if list(models_of(annotation)) else str(getattr(annotation, "__name__", annotation)))


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=str)}`"


def keys(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo, list[type[BaseModel]]]]:
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field, list(dict.fromkeys(models_of(field.annotation)))


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def section(model: type[BaseModel], title: str, path: str, seen: set[tuple[type[BaseModel], str]]) -> list[str]:
    """A table of a model's keys, and the sections below it."""
    lines, below = [f"## {title}", ""], []
    if doc := inspect.getdoc(model):
        lines += [_sentence(doc), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field, models in keys(model, path):
        meaning = field.description or (inspect.getdoc(models[0]) if models else None)
        lines.append(f"| `{key}` | {_sentence(type_of(field.annotation))} | {default_of(field)} | {_sentence(meaning)} |")
        many = typing.get_origin(field.annotation) is dict
        for inner in models:
            kind = inner.model_fields.get("kind")
            values = typing.get_args(kind.annotation) if kind is not None and len(models) > 1 else ()
            place = f"{key}.NAME" if many else key
            name = f"{place}, kind: {values[0]}" if len(values) == 1 else place
            if (inner, name) not in seen:
                seen.add((inner, name))
                below += section(inner, f"`{name}`", f"{place}.", seen)
    return [*lines, "", *below]


def page() -> str:
    return "\n".join([HEAD, *section(RunConfig, "The file", "", set())]).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
