"""Crash registry: one Ray actor per run that records the rows in flight at each crash and quarantines repeat offenders.

Ray restarts a dead actor and gives it the same block again, for ever. Here is what ends that: one tiny actor on
the driver's node to which every process reports its start and what it begins and has done (actors/attempts.py). A
process starts again under the same actor id; what its predecessor had begun and not done is what it crashed on.

The rules:
1. Rows in flight at a death are suspects, and are tried again one by one, each with nothing beside it.
2. A suspect is quarantined when its process dies while it is tried alone: at once if the process left last words
   (a fatal signal's trace, a lost device), the second time if it died without a sound. A mute death may come
   from outside (a preempted pod, the OOM killer after somebody else's memory), and twice on the same row it
   hardly does. So a segfault costs two deaths, a SIGKILL three, and neither costs a neighbour.
3. A process that went down with its node is nobody's fault, and counts for nothing.
4. A replica that dies `MAX_CRASHES` times without one row done between ends the job: Ray would go on for ever.

The memory is of the run: a new run tries quarantined rows that it has to caption again. Should this actor die itself,
it comes back with an empty memory, which costs a few more deaths and no row.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.attempts import Isolate, Proceed, RowKey, Ruling

MAX_CRASHES = 6  # two rows side by side that both kill without a sound take five
LOST = "tessera: the device is lost:"

_LOG_TAIL = 64 << 10  # bytes of a dead process's standard error that are looked at
_LAST_WORDS = re.compile(
    rf"{re.escape(LOST)} .*|Fatal Python error: .*|terminate called .*|\*\*\* SIG\w+ received|"
    r"CUDA error: .*|free\(\): .*|malloc\(\): .*|double free .*|\*\*\* stack smashing .*"
)
log = logging.getLogger(__name__)


class ReplicaLostError(RuntimeError):
    """Processes of a stage die again and again and nothing gets done: the job cannot go on."""


@dataclass(frozen=True, slots=True)
class Process:
    """One life of an actor. `log` is the file its standard error goes to, empty where that is no file."""

    actor: str
    stage: str
    node: str
    pid: int
    log: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    process: Process
    rows: tuple[RowKey, ...]
    alone: bool


@dataclass(slots=True)
class _Tally:
    """Deaths of one actor since it last got something done."""

    deaths: int = 0
    words: str = ""


@dataclass(slots=True)
class Register:
    """The rules, apart from Ray. Holds what is in flight and the suspects: nothing that grows with the job."""

    node_is_alive: Callable[[str], bool]
    _processes: dict[str, Process] = field(default_factory=dict)  # by actor
    _open: dict[int, _Attempt] = field(default_factory=dict)  # by ticket
    _tickets: int = 0
    _suspects: dict[tuple[str, RowKey], int] = field(default_factory=dict)  # mute deaths while alone
    _quarantined: dict[tuple[str, RowKey], str] = field(default_factory=dict)
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _over: str = ""

    def predecessor(self, actor: str) -> Process | None:
        """The life before, of an actor that is about to be born again."""
        return self._processes.get(actor)

    def started(self, process: Process, words: str) -> str:
        """A process is born; `words` are its predecessor's last. Returns why the job must end, or nothing."""
        before = self._processes.get(process.actor)
        self._processes[process.actor] = process
        if before and before != process:
            self._died(before, words)
        return self._over

    def begin(self, process: Process, rows: Sequence[RowKey], alone: bool) -> Ruling:
        """See Attempts.begin."""
        stage = process.stage
        quarantined = {
            row: self._quarantined[stage, row] for row in rows if (stage, row) in self._quarantined
        }
        if not alone and any((stage, row) in self._suspects for row in rows):
            return Isolate()
        self._tickets += 1
        tried = tuple(row for row in rows if row not in quarantined)
        if tried:
            self._open[self._tickets] = _Attempt(process, tried, alone)
        return Proceed(self._tickets, quarantined)

    def done(self, ticket: int) -> None:
        """See Attempts.done."""
        attempt = self._open.pop(ticket, None)
        if attempt:
            self._tallies.pop(attempt.process.actor, None)
            if attempt.alone:  # it lived: a mute death before was not its doing
                self._suspects.update({(attempt.process.stage, row): 0 for row in attempt.rows})

    def settled(self, stage: str, rows: Sequence[RowKey]) -> None:
        """See Attempts.settled."""
        for row in rows:
            self._suspects.pop((stage, row), None)

    def _died(self, process: Process, words: str) -> None:
        ended = [ticket for ticket, attempt in self._open.items() if attempt.process == process]
        attempts = [self._open.pop(ticket) for ticket in ended]
        if not self.node_is_alive(process.node):
            return
        for attempt in attempts:
            for row in attempt.rows:
                self._accuse((process.stage, row), attempt.alone, words)
        tally = self._tallies.setdefault(process.actor, _Tally())
        tally.deaths += 1
        tally.words = words or tally.words
        log.warning("a %s process died (pid %d): %s", process.stage, process.pid, words or "no last words")
        if tally.deaths >= MAX_CRASHES:
            self._over = (
                f"a {process.stage} process died {tally.deaths} times with no row done between, the last time "
                f"{_at(attempts)}; its last words: {tally.words or 'none (killed from outside, or out of memory?)'}"
            )

    def _accuse(self, suspect: tuple[str, RowKey], alone: bool, words: str) -> None:
        mute = self._suspects.get(suspect, 0) + (alone and not words)
        self._suspects[suspect] = mute
        if alone and (words or mute > 1):
            self._quarantined[suspect] = (
                f"kills its process: {words or 'ended without a word, twice with this row alone'}"
            )


def _at(attempts: Sequence[_Attempt]) -> str:
    if not attempts:
        return "before its first row"
    (shard, row), *more = [row for attempt in attempts for row in attempt.rows]
    return f"at {shard} row {row}" + (f" and {len(more)} more in flight" if more else "")


class RayAttempts:
    """`actors.attempts.Attempts` over the register's actor. Picklable: built by the driver, used in actors."""

    def __init__(self, stage: str, register: Any) -> None:
        self._stage, self._register = stage, register

    def __getstate__(self) -> dict[str, Any]:
        return {"_stage": self._stage, "_register": self._register}

    @property
    def stage(self) -> str:
        return self._stage

    @cached_property
    def _process(self) -> Process:
        context = ray.get_runtime_context()
        log_file = os.path.realpath("/proc/self/fd/2")  # Ray gives each worker a file of its own
        return Process(
            context.get_actor_id() or "",
            self._stage,
            context.get_node_id(),
            os.getpid(),
            log_file if os.path.isfile(log_file) else "",
        )

    def started(self) -> None:
        before = ray.get(self._register.predecessor.remote(self._process.actor))
        words = last_words(before.log) if before and before.node == self._process.node else ""
        over = ray.get(self._register.started.remote(self._process, words))
        if over:
            raise ReplicaLostError(over)

    def begin(self, rows: Sequence[RowKey], alone: bool) -> Ruling:
        ruling: Ruling = ray.get(self._register.begin.remote(self._process, rows, alone))
        return ruling

    def done(self, ticket: int) -> None:
        self._register.done.remote(ticket)

    def settled(self, rows: Sequence[RowKey]) -> None:
        self._register.settled.remote(self._stage, rows)

    def end_process(self, error: BaseException) -> NoReturn:
        first_line = str(error).partition("\n")[0]
        os.write(2, f"{LOST} {type(error).__name__}: {first_line}\n".encode())
        os._exit(1)  # not sys.exit: a lost device may hang in its own clean-up


def last_words(log_file: str) -> str:
    """What a process that died of itself left in its standard error, with the innermost line of our own or of
    a library that it died in; nothing for one that was killed."""
    try:
        with open(log_file, "rb") as file:
            file.seek(max(0, os.path.getsize(log_file) - _LOG_TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = [match.group().strip() for match in _LAST_WORDS.finditer(text)]
    if not found:
        return ""
    fatal = [words for words in found if words.startswith(("Fatal Python error", LOST))]
    words = (fatal or found)[-1].removeprefix("tessera: ")
    place = re.search(
        r'most recent call first\):\n  File "([^"]+)", line (\d+) in (\w+)', text[text.rfind(words) :]
    )
    if place:
        words += f" in {place[3]} ({os.path.basename(place[1])}:{place[2]})"
    return words


def watch() -> Any:
    """Starts the register on this node; it lives as long as its handle, and serves the stages' `RayAttempts`."""
    here = ray.get_runtime_context().get_node_id()
    options = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }
    return ray.remote(**options)(Register).remote(_node_is_alive)


def _node_is_alive(node: str) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())
