"""Results to compare with: of a file, or of another revision, measured now on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.harness.machine import COMMIT_VARIABLE, REPOSITORY
from bench.harness.results import Results, read


class CompareError(ValueError):
    """There is nothing to compare with; the message says why."""


def earlier_results(source: str, options: Sequence[str]) -> Results:
    """Read a result file, or run the same benchmark of a git revision.

    Raises:
        CompareError: if it is neither, or the revision's benchmark does not run.
        ValueError: if the file is no result file.
    """
    if Path(source).is_file():
        return read(Path(source))
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{source}^{{commit}}").strip()
    except (OSError, subprocess.CalledProcessError):
        raise CompareError(f"--compare {source}: neither a file nor a git revision") from None
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        tree, file = Path(folder, "tree"), Path(folder, "results.jsonl")
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            return _run_there(source, tree, file, options)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _run_there(source: str, tree: Path, file: Path, options: Sequence[str]) -> Results:
    if not Path(tree, "bench", "__main__.py").is_file():
        raise CompareError(f"--compare {source}: that revision has no benchmark yet")
    # -m puts the folder it is started in first, before any installed copy of the library.
    command = [sys.executable, "-m", "bench", *options, "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != COMMIT_VARIABLE}
    code = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
    if not file.is_file():
        raise CompareError(f"--compare {source}: the benchmark of that revision left no results")
    try:
        found = read(file)
    except ValueError:
        raise CompareError(f"--compare {source}: that revision writes its results in another form") from None
    # An op of its own that failed is what 1 stands for; without one, Python itself ended with it.
    if code != int(found.failed > 0):
        raise CompareError(
            f"--compare {source}: the benchmark of that revision ended early, with exit code {code} "
            f"after {len(found.rows)} rows"
        )
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
