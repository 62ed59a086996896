"""Dataclasses from the plain values of a YAML or JSON file; nothing from a file is taken on trust.

An unknown key or a value of the wrong type is an error that names the key, what came and what was expected.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


class RecordError(ValueError):
    """A value that is not what was wanted; the message is one sentence for the file's author."""


def convert(value: object, wanted: Any, key: str = "") -> Any:
    """A value as the type that is wanted.

    Args:
        value: of dictionaries, lists and plain values, as YAML and JSON have them.
        wanted: a dataclass, a plain type, or a union, dictionary or tuple of these.
        key: where the value stands, such as "train.lr"; "" for the whole file.

    Raises:
        RecordError: naming the first key that is wrong.
    """
    if is_dataclass(wanted):
        return _section(value, wanted, key)
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        for choice in arguments:
            try:
                return convert(value, choice, key)
            except RecordError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) == len(arguments):
            return tuple(
                convert(item, kind, f"{key}[{i}]")
                for i, (item, kind) in enumerate(zip(value, arguments, strict=True))
            )
    elif origin is dict and isinstance(value, dict):
        return {
            convert(name, arguments[0], key): convert(item, arguments[1], f"{key}.{name}")
            for name, item in value.items()
        }
    elif wanted is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string.
        if isinstance(value, (int, float, str)) and _is_finite(value):
            return float(value)
    elif isinstance(wanted, type) and type(value) is wanted:
        return value
    raise RecordError(f"{key}: expected {_describe(wanted)}, got {_show(value)}")


def _section(value: object, section: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{key or 'the file'}: expected a section of keys, got {_show(value)}")
    wanted = typing.get_type_hints(section)
    for name in value:
        if name not in wanted:
            close = difflib.get_close_matches(str(name), wanted, n=1)
            prefix = f"{key}." if key else ""
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(wanted)}"
            raise RecordError(f"{prefix}{name}: unknown key; {hint}")
    for each in fields(section):
        if each.name not in value and each.default is MISSING and each.default_factory is MISSING:
            raise RecordError(f"{f'{key}.' if key else ''}{each.name}: missing key")
    return section(
        **{
            name: convert(item, wanted[name], f"{key}.{name}" if key else name)
            for name, item in value.items()
        }
    )


def _is_finite(value: float | str) -> bool:
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _show(value: object) -> str:
    """A value as its author wrote it, or nearly so where JSON cannot hold it."""
    try:
        return json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):
        return repr(value)


def _describe(wanted: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return " or ".join(_describe(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} × {_describe(arguments[0])}"
    if origin is dict:
        return "a section of keys"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names[wanted]
