"""CPU seconds of a process and all its descendants, by what they do. Read from /proc, so Linux alone."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_LOOK_SECONDS = 0.2
_SHELLS = "driver"
_KINDS = {  # part of a command line: what it is
    "PublishingGenerate": "generate",
    "DrainingPreprocess": "preprocess",
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
    "agent": "agents",
    "log_monitor": "log monitor",
    "ray/autoscaler": "autoscaler",
    "ray::IDLE": "idle workers",
    "default_worker": "idle workers",
    "ray::": "tasks",
}


def watched(process: subprocess.Popen) -> Counter[str]:
    """Waits for `process` to end; CPU seconds by kind of process, to the last look, every 0.2 s."""
    seen: dict[int, tuple[str, float]] = {}
    while process.poll() is None:
        for pid in _family(process.pid):
            seen[pid] = _kind_and_seconds(pid, process.pid) or seen.get(pid, (_SHELLS, 0.0))
        time.sleep(_LOOK_SECONDS)
    total: Counter[str] = Counter()
    for kind, seconds in seen.values():
        total[kind] += seconds  # type: ignore[assignment]
    return total


def _family(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def _kind_and_seconds(pid: int, root: int) -> tuple[str, float] | None:
    fields = _stat(pid)
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    if not fields or not line:
        return None
    kind = _SHELLS if pid == root else next((kind for part, kind in _KINDS.items() if part in line), "others")
    return kind, (int(fields[11]) + int(fields[12])) / _TICKS


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (the state) on: proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
