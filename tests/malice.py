"""What a file of somebody else's may hold."""

from __future__ import annotations

import os
from pathlib import Path


class Malice:
    """It makes a folder if it is ever unpickled."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)
