"""Starts a process for every section, listens to it, and ends it when its time is up."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import IO, Any

from bench.gpu import decide

ROW_SECONDS = 8  # a row that takes longer is ended, with its process; so long because some compile
SAMPLE_SECONDS = 0.1  # of a measurement
SECONDS_AFTER_KILL = 3  # a process is not waited for that the driver holds
POLL_SECONDS = 0.02

Row = dict[str, Any]


class Child:
    """The process of a section, and where it is.

    Attributes:
        at: (name, variant) of the row that it is at, or None.
        since: when that row began.
        ready: whether every row has run once.
    """

    def __init__(self, name: str, log: IO[str], record: Callable[[Row], None], order: dict[str, Any]) -> None:
        self.at: Sequence[str] | None = None
        self.since, self.ready = time.monotonic(), False
        self._record = record
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
        command = [sys.executable, "-m", "bench.gpu.decide.section", f"{decide.PACKAGE}.{name}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, bufsize=1, env=environment
        )
        self._say(json.dumps(order))
        self.listener = Thread(target=self._listen, daemon=True)
        self.listener.start()

    def go(self) -> None:
        """Let it time its rows."""
        self.process.send_signal(signal.SIGCONT)
        self._say("go")
        self.since = time.monotonic()

    def pause(self) -> None:
        """Keep it from disturbing others until its turn."""
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> int | None:
        """Its exit code, after it was ended if it runs; None if it cannot be."""
        if self.listener.is_alive():
            self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_AFTER_KILL)
        self.listener.join(SECONDS_AFTER_KILL)
        return self.process.returncode

    def _say(self, line: str) -> None:
        with suppress(OSError):  # it has died
            self.process.stdin.write(line + "\n")

    def _listen(self) -> None:
        for line in self.process.stdout:
            message = json.loads(line)
            if "row" in message:
                self._record(message["row"])
            self.since, self.at = time.monotonic(), message.get("at")
            self.ready = self.ready or "ready" in message


class Driver:
    """Measures sections.

    Args:
        out: gets the rows, one line of JSON each.
        names: of the sections.
        seconds: of all together.
    """

    def __init__(self, out: Path, names: Sequence[str], seconds: float) -> None:
        self.out, self.names, self.seconds = out, names, seconds
        self.scale = seconds / decide.BUDGET_SECONDS
        self.found: dict[str, list[Row]] = {name: [] for name in names}
        self._children: dict[str, Child] = {}

    def run(self) -> list[Row]:
        """All rows; those that could not be measured say in "failed" why."""
        self.began = time.monotonic()
        with open(self.out, "w") as self._file, open(f"{self.out}.log", "w") as self._log:
            try:
                for name in self.names:
                    self._start(name, warm=True)
                self._warm_up()
                for name in self.names:
                    self._measure(name)
            finally:
                for child in self._children.values():
                    child.end()
        return [row for rows in self.found.values() for row in rows]

    def _start(self, name: str, warm: bool) -> Child:
        done = [(row["name"], row["variant"]) for row in self.found[name]]
        order = {"warm": warm, "done": done, "seconds": SAMPLE_SECONDS * self.scale}
        self._children[name] = Child(name, self._log, partial(self._record, name), order)
        return self._children[name]

    def _record(self, section: str, row: Row) -> None:
        """Keep and write a row, with its time over that of the first "present…" of the same name."""
        row = {"section": section, **row}
        timed = [each for each in [*self.found[section], row] if each["name"] == row["name"] and "ms" in each]
        present = [each["ms"] for each in timed if each["variant"].startswith("present")]
        if present and "ms" in row:
            row["ratio"] = row["ms"] / present[0]
        self.found[section].append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _warm_up(self) -> None:
        """Wait until all sections have run their rows once, or the time for that is over."""
        late = self._children
        while late and time.monotonic() - self.began < decide.COMPILE_SECONDS * self.scale:
            late = {name: each for name, each in late.items() if each.listener.is_alive() and not each.ready}
            time.sleep(POLL_SECONDS)
        for child in late.values():
            child.pause()
        unready = f"; not ready: {', '.join(late)}" if late else ""
        print(f"compiled after {time.monotonic() - self.began:.0f} s{unready}", flush=True)

    def _measure(self, name: str) -> None:
        """Time a section, in as many processes as that takes."""
        rows, child, began = self.found[name], self._children[name], time.monotonic()
        behind = sum(decide.SECTIONS[other] for other in self.names[self.names.index(name) + 1 :])
        deadline = self.began + self.seconds - behind * self.scale
        for tries in itertools.count():
            before = len(rows)
            child.go()
            why = self._wait(child, deadline)
            if child.end() == 0 and not why:
                break
            if child.at:
                at = dict(zip(("name", "variant"), child.at, strict=True))
                self._record(name, at | {"failed": why or "the process died here"})
            elif why or (tries and len(rows) == before):  # the first may have died before it was to time rows
                failure = why or "the process died outside of a row"
                self._record(name, {"name": "the section", "variant": "", "failed": failure})
                break
            if time.monotonic() > deadline:
                break
            child = self._start(name, warm=False)
        print(f"\n== {name}: {len(rows)} rows in {time.monotonic() - began:.1f} s\n{table(rows)}", flush=True)

    def _wait(self, child: Child, deadline: float) -> str:
        """Wait until the child ends, or has to be ended: why."""
        while child.listener.is_alive():
            now = time.monotonic()
            if now > deadline:
                return "the section's time was up"
            if child.at and now - child.since > ROW_SECONDS * self.scale:
                return f"took longer than {ROW_SECONDS * self.scale:.0f} s"
            time.sleep(POLL_SECONDS)
        return ""


def table(rows: Sequence[Row]) -> str:
    """The rows of a section, those of a name together."""
    lines = [f"{'':44} {'ms':>8} {'p20':>8} {'p80':>8} {'host':>5} {'rate':>15} {'error':>7} {'ratio':>5}"]
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    for name, own in by_name.items():
        lines.append(name)
        for row in own:
            cells = [_cell(row, key, form) for key, form in COLUMNS.items()]
            cells.insert(4, f"{_cell(row, 'rate', '7.1f')} {row.get('unit', ''):7}")
            what = f"failed: {row['failed'][:110]}" if "failed" in row else " ".join(cells)
            lines.append(f"  {row['variant'][:42]:42} {what} {row.get('note', '')}".rstrip())
    return "\n".join(lines)


COLUMNS = {"ms": "8.4f", "p20": "8.4f", "p80": "8.4f", "host": "5.2f", "error": "7.1e", "ratio": "5.2f"}


def _cell(row: Row, key: str, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{row[key]:{form}}" if key in row else " " * width
