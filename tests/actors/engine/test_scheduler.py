"""The scheduler's laws: nothing leaks, nothing starves, nothing runs without its room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Request, Sampling
from actors.engine.devices.kv_cache import Extent, ExtentAllocator, PageAllocator, Pages
from actors.engine.scheduler import Limits, Scheduler, SequenceState

CAPACITY = 100


def sequence(prompt: int, new: int, visual: int = 0) -> SequenceState:
    request = Request(
        None, np.zeros(prompt, np.int32), np.zeros((0, 3, 1, 1)), (), Sampling(max_new_tokens=new)
    )
    return SequenceState(request, emit=lambda _: None, placeholders=np.arange(visual), prefix=visual)


def drive(sequences: Sequence[SequenceState], limits: Limits) -> tuple[list[int], list[int]]:
    """Runs a scheduler to its end; the indices of sequences in order of entry, and of those refused."""
    runs = ExtentAllocator(CAPACITY)
    scheduler = Scheduler(limits, lambda each: runs.allocate(each.reserve), runs.free)
    for each in sequences:
        scheduler.add(each)
    entered: list[int] = []
    refused: list[int] = []
    while len(scheduler):
        known = len(scheduler.running)
        refused += [sequences.index(each) for each in scheduler.admit()]
        entered += [sequences.index(each) for each in scheduler.running[known:]]
        assert len(scheduler.running) <= limits.sequences
        chunks = scheduler.plan()
        assert chunks or not scheduler.running, "a step without work would never end"
        assert [chunk.length > 1 for chunk in chunks] == sorted(chunk.length > 1 for chunk in chunks)
        assert sum(chunk.length for chunk in chunks if not chunk.sequence.decoding) <= limits.prefill_tokens
        decoding = [each for each in scheduler.running if each.decoding]
        assert decoding == [chunk.sequence for chunk in chunks if chunk.sequence.decoding], (
            "a decode was skipped"
        )
        for chunk in chunks:
            assert chunk.start == chunk.sequence.computed
            assert chunk.end <= chunk.sequence.reserve
            chunk.sequence.computed = chunk.end
            if chunk.samples:
                chunk.sequence.generated.append(0)
            if len(chunk.sequence.generated) == chunk.sequence.request.sampling.max_new_tokens:
                scheduler.remove(chunk.sequence)
    assert runs.used == 0
    assert runs.allocate(CAPACITY) == Extent(0, CAPACITY), "the arena is in pieces"
    return entered, refused


requests = st.tuples(st.integers(1, 70), st.integers(1, 50), st.integers(0, 40))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(requests, max_size=25), st.integers(1, 6), st.integers(2, 40), st.integers(1, 60))
def test_every_sequence_enters_in_order_or_is_refused(
    drawn: list[tuple[int, int, int]], slots: int, budget: int, visual: int
) -> None:
    sequences = [sequence(prompt, new, min(prompt, seen)) for prompt, new, seen in drawn]
    entered, refused = drive(sequences, Limits(slots, budget, visual))
    assert entered == sorted(entered), "somebody was overtaken"
    assert sorted(entered + refused) == list(range(len(sequences)))
    assert refused == [index for index, each in enumerate(sequences) if each.reserve > CAPACITY]
    for index in entered:
        assert len(sequences[index].generated) == sequences[index].request.sampling.max_new_tokens


def choose(data: st.DataObject, options: int) -> int:
    return data.draw(st.integers(0, options - 1))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_runs_never_overlap(data: st.DataObject) -> None:
    runs = ExtentAllocator(60)
    held: list[Extent] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if held and choose(data, 2):
            runs.free(held.pop(choose(data, len(held))))
        elif (run := runs.allocate(data.draw(st.integers(1, 20)))) is not None:
            held.append(run)
        taken = [place for run in held for place in range(run.start, run.start + run.length)]
        assert len(taken) == len(set(taken)) == runs.used
        assert all(0 <= place < 60 for place in taken)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_pages_are_held_until_the_last_holder_leaves(data: st.DataObject) -> None:
    pages = PageAllocator(pages=12, page_size=4)
    held: list[Pages] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if held and choose(data, 2):
            pages.free(held.pop(choose(data, len(held))))
        else:
            prefix = held[0].ids[:1] if held and choose(data, 2) else ()
            got = pages.allocate(data.draw(st.integers(1, 20)), prefix)
            if got is not None:
                held.append(got)
        assert pages.used == len({page for each in held for page in each.ids})
    for each in held:
        pages.free(each)
    assert pages.used == 0
