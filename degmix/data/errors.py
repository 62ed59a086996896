"""The one error of the data room."""

from __future__ import annotations


class DataError(ValueError):
    """The data on disk is not as it must be; the message names the file, what was expected, what came."""
