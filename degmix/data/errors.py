"""The one error of the data room."""

from __future__ import annotations


class DataError(ValueError):
    """Something is wrong with the data on disk; the message names the file, what was expected and what came."""
