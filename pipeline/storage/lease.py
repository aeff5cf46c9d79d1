"""The lease: one run at a time on one output.

Why: two schedulers start the same job, or a laptop and a cluster. Both would caption the same rows and pay twice.

`_tessera/lease.json` belongs to the run it names, and changes hands only by compare-and-swap (created if absent, or
replaced if still what was read; storage.py). The holder changes a counter in it every HEARTBEAT_SECONDS. No clock of
another machine is ever trusted: who wants the lease watches it by his own stopwatch, and takes it once nothing has
changed for EXPIRY_SECONDS. A holder that died on this very machine is known by its process, and needs no waiting.

Fencing: a run that was paused, or whose request is being retried, may have lost its lease meanwhile, and must not
write any more. So every attempt to write or delete a file, on whatever machine, begins with a look at the lease
(`Fence.check`, the `guard` of the ledger's Storage). A run that lost the lease before that look, or before it tries a
failed request again, or before it hears of a request that was carried out, changes nothing from then on. What remains
is the moment between the look and the store's carrying out the request. What a run that was held up in it and
succeeded by another one can do stands here; tests/faults/test_lease_matrix.py has a line for each, on disk and on S3:

- spec.json: nothing. It is swapped for the version that was compared with, and the successor's is another version,
  since it names the run.
- A part is added. It is named after its content, so it replaces none, and it holds captions of the same spec as
  anybody's, for a spec changes only while the output holds none. One case is left: a run held up before its very
  first part, and succeeded by a run of another spec, leaves that one part behind.
- A seal: nothing where the successor has sealed the shard, or amended its seal, for then it is another version. Where
  it has not come to that yet, the shard is sealed or amended from the same parts as the successor would.
- A deletion: parts are deleted that are sealed and readable, or merged, or of a version of a shard that was replaced.
  What the successor publishes has another name, unless it has the same content.
- `_SUCCESS`: nothing. It is created, swapped or deleted for the mark that was read, so the successor's stays. But a
  successor that found no mark to take away leaves no trace there, and no store makes one file's write depend on another
  file. So the writer looks at the lease once more when the mark is written, and takes its own back if that is lost. A
  mark that is not true is left only by a process that is killed between the two, or by a request that the store carries
  out after its client gave up. Tessera does not believe it (`Ledger.succeeded` compares it with the files) and its next
  run removes or replaces it; readers that ask only whether the file exists believe it until then.
- The run's own record under `_tessera/runs` is written.

A store that does not keep conditional writes is found out when a run starts (`acquire`). There, files are compared
before they are written or deleted, and the moment between the two counts as well.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.storage.storage import Storage

LEASE = "_tessera/lease.json"
PROBE = "_tessera/probe"
HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 30.0  # six heartbeats: a run whose storage stutters keeps its lease
_WATCH_SECONDS = 0.5  # between two looks at somebody else's lease
_STOP_SECONDS = 2.0  # between two looks of a worker at whether to stop

log = logging.getLogger(__name__)


class LeaseHeld(RuntimeError):
    """Another run holds the output; nothing was started."""


class LeaseLost(RuntimeError):
    """Another run took the output over; this one writes nothing more."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What lease.json says: which run holds the output, where it runs, and how often it has said so (`beat`).

    `machine` and `started` tell processes apart (kernel boot, process namespace; clock ticks), `since` is for people.
    """

    run: str
    host: str
    pid: int
    since: str
    machine: str = ""
    started: str = ""
    beat: int = 0
    draining: bool = False
    released: bool = False

    @classmethod
    def here(cls, run: str) -> "Holder":
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(run, socket.gethostname(), os.getpid(), now, _machine(), _started(os.getpid()))

    @classmethod
    def decode(cls, data: bytes) -> "Holder":
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):  # damaged, or of a later version: it expires like any other
            return cls("unknown", "unknown", 0, "unknown")

    def encode(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def describe(self) -> str:
        return f"run {self.run} on {self.host} (pid {self.pid}) since {self.since}"

    @property
    def is_dead(self) -> bool:
        """True if it ran on this machine and its process is gone; False where that cannot be known."""
        if not self.machine or self.machine != _machine():
            return False
        started = _started(self.pid)
        return started != self.started and not (started == "" and _may_be_hidden(self.pid))


def holder_of(storage: Storage) -> Holder | None:
    """Who holds the output, as the file says; None if nobody does."""
    try:
        holder = Holder.decode(storage.read(LEASE, 0, 1 << 16))
    except FileNotFoundError:
        return None
    return None if holder.released else holder


class Fence:
    """Fencing check: whether lease.json still names this run. Picklable and small, for any process."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self.run = storage, run
        self._looked = (float("-inf"), False)

    def __getstate__(self) -> dict[str, object]:
        return {"storage": self.storage, "run": self.run, "_looked": (float("-inf"), False)}

    def check(self) -> None:
        """Raises LeaseLost unless the run holds the lease now."""
        self._holder()

    def stopping(self) -> bool:
        """True when the run drains, or has lost its lease. Asks storage every other second at most."""
        looked, answer = self._looked
        if time.monotonic() - looked >= _STOP_SECONDS:
            try:
                answer = self._holder().draining
            except LeaseLost:
                answer = True
            self._looked = (time.monotonic(), answer)
        return answer

    def _holder(self) -> Holder:
        holder = holder_of(self.storage)
        if holder is None or holder.run != self.run:
            raise LeaseLost(_lost(self.storage, holder))
        return holder


class Lease:
    """The lease held by this process: a context manager that beats in the background and releases at the end."""

    def __init__(self, storage: Storage, me: Holder) -> None:
        self.storage = storage
        self.fence = Fence(storage, me.run)
        self.lost: str | None = None  # why, once it is
        self.warning: str | None = None  # what the run's record says of the store
        self._me = me
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tessera-lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(OSError, LeaseLost):  # whoever wants it next waits for it to expire
            self._renew(replace(self._me, released=True))

    def drain(self) -> None:
        """Tells the run's workers to finish what they hold and to begin nothing new."""
        with suppress(OSError, LeaseLost):
            self._renew(replace(self._me, draining=True))

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                self._renew(self._me)
            except LeaseLost as error:
                self.lost = str(error)
                return
            except OSError:  # bad weather: the lease is ours until another run takes it
                continue

    def _renew(self, me: Holder) -> None:
        with self._lock:
            while True:
                me = replace(me, beat=self._me.beat + 1)
                try:
                    data, version = self.storage.read_version(LEASE)
                except FileNotFoundError:
                    raise LeaseLost(_lost(self.storage, None)) from None
                holder = Holder.decode(data)
                if holder.run != me.run or holder.released:
                    raise LeaseLost(_lost(self.storage, None if holder.released else holder))
                if self.storage.put_if(LEASE, me.encode(), version):
                    self._me = me
                    return


def acquire(
    storage: Storage, run: str, take_over: bool = False, say: Callable[[str], None] = lambda _: None
) -> Lease:
    """The output's lease for `run`. Raises LeaseHeld if another run holds it and is alive.

    `take_over` takes it from whoever holds it. `say` is told whom this waits for. A store that cannot hold two runs
    apart is warned of: the run goes on, and `Lease.warning` is kept with it.
    """
    lease = _acquired(storage, run, take_over, say)
    try:
        if not storage.keeps_conditions(PROBE):
            lease.warning = (
                f"{storage.url}: this store does not keep conditional writes (If-Match, If-None-Match); two runs at "
                "once on this output are not safe: see to it that there is one at a time"
            )
            log.warning(lease.warning)
    except BaseException:
        lease.__exit__()
        raise
    return lease


def _acquired(storage: Storage, run: str, take_over: bool, say: Callable[[str], None]) -> Lease:
    me = Holder.here(run)
    first: bytes | None = None
    watched = time.monotonic()
    while True:
        try:
            data, version = storage.read_version(LEASE)
        except FileNotFoundError:
            if storage.create_exclusive(LEASE, me.encode()):
                return Lease(storage, me)
            continue
        holder = Holder.decode(data)
        expired = data == first and time.monotonic() - watched >= EXPIRY_SECONDS
        if holder.released or holder.is_dead or take_over or expired:
            if storage.put_if(LEASE, me.encode(), version):
                return Lease(storage, me)
        elif first is None:
            first, watched = data, time.monotonic()
            say(f"waiting to see whether {holder.describe()} is alive")
        elif data != first:
            raise LeaseHeld(
                f"{storage.url} is held by {holder.describe()}; wait for it to end, stop it, or take its place "
                "with --take-over"
            )
        time.sleep(_WATCH_SECONDS)


def _lost(storage: Storage, holder: Holder | None) -> str:
    who = f"{holder.describe()} took it over" if holder else "the lease is gone"
    return f"this run no longer holds {storage.url}: {who}; what it published is kept"


def _machine() -> str:
    """This kernel's boot and this process namespace: where a pid means something. Empty where there is no telling."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; empty if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _may_be_hidden(pid: int) -> bool:
    """Whether a process lives that /proc does not show (mounted with hidepid, for other users' processes)."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not Path(f"/proc/{pid}").exists()
