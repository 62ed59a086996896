"""Dataclasses from JSON, key by key and type by type: nothing from a file is taken on trust."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not JSON, naming the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or no text at all
        raise ValueError(f"{path}: not JSON: {error}") from None


def record(kind: type[_Record], data: Any, where: str) -> _Record:
    """The data as a record, with the records in it.

    What has a default may be missing: earlier revisions, which can be compared with, did not have it.

    Args:
        kind: a dataclass, of plain values, dictionaries of them, dataclasses and tuples of dataclasses.
        data: from :func:`read_json`.
        where: what the data is of, for messages.

    Raises:
        ValueError: naming the first place that is wrong.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    hints = get_type_hints(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not needed <= data.keys() <= hints.keys():
        missing, unknown = sorted(needed - data.keys()), sorted(data.keys() - hints.keys())
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    return kind(**{name: _value(value, hints[name], where, name) for name, value in data.items()})


def _value(value: Any, hint: Any, where: str, name: str) -> Any:
    if is_dataclass(hint):
        return record(hint, value, f"{where}: {name}")
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: {name}: expected a list, got {type(value).__name__}")
        entry, _ = get_args(hint)
        return tuple(record(entry, each, f"{where}: {name}[{index}]") for index, each in enumerate(value))
    if not _fits(value, hint):
        raise ValueError(f"{where}.{name}: expected {_words(hint)}, got {value!r}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is dict:
        _, entry = get_args(hint)
        return isinstance(value, dict) and all(_fits(each, entry) for each in value.values())
    accepted = [hint] if isinstance(hint, type) else get_args(hint)
    if len(accepted) > 1:
        return any(_fits(value, each) for each in accepted)
    # Python counts bool among the integers; a whole number is a float, too.
    return type(value) in accepted or (float in accepted and type(value) is int)


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
