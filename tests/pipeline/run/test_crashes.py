"""The register's rules, without Ray: lives are begun and ended by hand."""

import pytest

from actors.attempts import Isolate, Proceed, RowKey
from pipeline.run.crashes import LOST, MAX_CRASHES, Process, Register, last_words

SEGFAULT = "Fatal Python error: Segmentation fault"


def rows(*numbers: int) -> list[RowKey]:
    return [("a.parquet", number) for number in numbers]


class Actor:
    """An actor that lives, dies and is born again, as Ray does it."""

    def __init__(self, register: Register, name: str = "one", node: str = "here") -> None:
        self.register, self.name, self.node, self.lives = register, name, node, 0
        self.born()

    def born(self, words: str = "") -> str:
        self.lives += 1
        self.process = Process(self.name, "generate", self.node, self.lives, "")
        return self.register.started(self.process, words)

    def begin(self, *numbers: int, alone: bool = False):
        return self.register.begin(self.process, rows(*numbers), alone)

    def settle(self, *numbers: int) -> list[int]:
        """Goes through a block as the guard does; returns the quarantined rows, and None where it dies."""
        quarantined = []
        ruling = self.begin(*numbers)
        if isinstance(ruling, Proceed):
            self.register.done(ruling.ticket)
            return [row for _, row in ruling.quarantined]
        for number in numbers:
            ruling = self.begin(number, alone=True)
            quarantined += [row for _, row in ruling.quarantined]
            self.register.done(ruling.ticket)
        self.register.settled("generate", rows(*numbers))
        return quarantined


@pytest.fixture
def register() -> Register:
    return Register(lambda node: node != "lost")


def test_what_was_done_is_no_suspect(register):
    actor = Actor(register)
    register.done(actor.begin(0, 1, 2).ticket)
    actor.born(SEGFAULT)
    assert isinstance(actor.begin(0, 1, 2), Proceed)


def test_a_segfault_is_found_after_two_deaths(register):
    actor = Actor(register)
    actor.begin(0, 1, 2)
    actor.born(SEGFAULT)
    assert actor.begin(0, 1, 2) == Isolate()
    register.done(actor.begin(0, alone=True).ticket)
    actor.begin(1, alone=True)
    actor.born(SEGFAULT)
    assert actor.settle(0, 1, 2) == [1]
    assert actor.begin(0, 1, 2).quarantined == {("a.parquet", 1): f"kills its process: {SEGFAULT}"}


def test_a_mute_death_must_come_twice_to_the_same_row_alone(register):
    actor = Actor(register)
    actor.begin(0, 1)
    actor.born()
    actor.begin(0, alone=True)
    actor.born()  # somebody's kill: it hits row 0 while it is tried alone
    register.done(actor.begin(0, alone=True).ticket)
    actor.begin(1, alone=True)
    actor.born()
    actor.begin(1, alone=True)
    actor.born()
    assert actor.settle(0, 1) == [1]


def test_blocks_side_by_side_are_all_suspects_and_only_one_row_is_quarantined(register):
    actor = Actor(register)
    for first in (0, 2, 4):
        actor.begin(first, first + 1)
    actor.born(SEGFAULT)
    assert [actor.begin(first, first + 1) for first in (0, 2, 4)] == [Isolate()] * 3
    assert actor.settle(4, 5) == []
    register.done(actor.begin(0, alone=True).ticket)
    actor.begin(1, alone=True)
    actor.born(SEGFAULT)
    assert actor.settle(2, 3) == [] and actor.settle(0, 1) == [1] and actor.settle(4, 5) == []


def test_a_process_that_goes_with_its_node_is_nobodys_fault(register):
    actor = Actor(register, node="lost")
    for _ in range(MAX_CRASHES):
        actor.begin(0)
        assert not actor.born()
    assert isinstance(actor.begin(0), Proceed)


def test_stages_do_not_share_suspects(register):
    actor = Actor(register)
    actor.begin(0)
    actor.born(SEGFAULT)
    other = Process("two", "preprocess", "here", 1, "")
    register.started(other, "")
    assert isinstance(register.begin(other, rows(0), False), Proceed) and actor.begin(0) == Isolate()


def test_a_replica_that_only_dies_ends_the_job(register):
    actor = Actor(register)
    for _ in range(MAX_CRASHES - 1):
        actor.begin(7, 8)
        assert not actor.born(SEGFAULT)
    register.done(Actor(register, "two").begin(0).ticket)  # others' progress does not help this one
    actor.begin(7, alone=True)
    over = actor.born(SEGFAULT)
    assert f"died {MAX_CRASHES} times" in over and "a.parquet row 7" in over and SEGFAULT in over
    assert Actor(register, "three").born() == over, "whoever comes now is told"


def test_progress_between_deaths_is_no_end(register):
    actor = Actor(register)
    for number in range(4 * MAX_CRASHES):
        register.done(actor.begin(2 * number).ticket)
        actor.begin(2 * number + 1)
        assert not actor.born()


def test_nothing_is_remembered_of_what_went_well(register):
    actor = Actor(register)
    for number in range(50):
        actor.settle(number)
    actor.begin(50, 51)
    actor.born()
    actor.settle(50, 51)
    assert not register._open and not register._suspects and not register._quarantined


def test_last_words(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "loading\n*** SIGSEGV received at time=1 on cpu 0 ***\nFatal Python error: Segmentation fault\n\n"
        'Stack (most recent call first):\n  File "/lib/PIL/Image.py", line 9 in load\n  File "x.py", line 1 in y\n'
    )
    assert last_words(str(log)) == "Fatal Python error: Segmentation fault in load (Image.py:9)"
    log.write_text(f"warming up\n{LOST} AcceleratorError: CUDA error: device-side assert triggered\n")
    assert (
        last_words(str(log))
        == "the device is lost: AcceleratorError: CUDA error: device-side assert triggered"
    )
    log.write_text(
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
    )
    assert last_words(str(log)).startswith("terminate called")
    log.write_text("a warning\n" * 9)
    assert last_words(str(log)) == "" and last_words(str(tmp_path / "none")) == ""
