"""Messages for what is wrong in a config: the key, the file it stands in, and what was probably meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Layers = list[tuple[str, dict[str, Any]]]
"""Config layers, lowest first: the file, or "the command line", and its content."""


def explain(error: ValidationError, model: type[BaseModel], layers: Layers) -> str:
    """The first problem that pydantic found in the merged layers, in one line."""
    # a misspelt key first: a missing one is often its consequence
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    location = [part for part in problem["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location)
    file = origin(location, layers)
    more = f" ({error.error_count() - 1} more problems after this one.)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        near = nearest(str(location[-1]), _keys_at(model, location[:-1]))
        return f"{file}: unknown key {key!r}; {near}{more}"
    if problem["type"] == "literal_error":
        near = nearest(
            str(problem["input"]),
            [part.strip(" '") for part in problem["ctx"]["expected"].replace(" or ", ",").split(",")],
        )
        return f"{file}: {key}: {problem['input']!r} is not possible; {near}{more}"
    if problem["type"] == "missing":
        return f"{file}: the key {key!r} is missing.{more}"
    hint = ""
    if "patterns" in location and isinstance(problem["input"], int):
        hint = "; YAML reads 2:4 without quotes as a number, write '2:4'"
    return f"{file}: {key}: {problem['msg']} (found {problem['input']!r}){hint}.{more}"


def nearest(word: str, known: list[str]) -> str:
    """What was probably meant by `word`, and all that would be valid."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    choices = ", ".join(known)
    return f"did you mean {close[0]!r}? Valid: {choices}." if close else f"valid: {choices}."


def origin(location: Sequence[Any], layers: Layers) -> str:
    """The last layer in which the key, or the longest part of its path, stands."""
    best, depth = layers[-1][0] if layers else "config", -1
    for file, content in layers:
        node: Any = content
        reached = 0
        for part in location:
            if (isinstance(node, dict) and part in node) or (
                isinstance(node, list) and isinstance(part, int) and part < len(node)
            ):
                node = node[part]
            else:
                break
            reached += 1
        if reached >= depth:
            best, depth = file, reached
    return best


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    annotation: Any = model
    for part in location:
        annotation = _model_in(annotation)
        if annotation is None:
            return []
        if isinstance(part, str) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
    found = _model_in(annotation)
    return list(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as dict[str, Model] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, dict, list, tuple):
        return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
    return None
