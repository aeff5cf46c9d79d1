"""Enough blocks feed an engine: its slots stay full while blocks wait for their last rows."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from actors.engine import Request, Sampling
from actors.engine.devices.cpu import prepare as cpu
from actors.engine.devices.cuda import prepare as cuda
from actors.engine.scheduler import Scheduler, SequenceState
from pipeline.run.feeding import BLOCK_ROWS, blocks_at_once
from pipeline.spec.job_spec import GenerateResources
from tests.commands import ROOT, environment
from tests.pipeline.run.full_replica import BLOCKS

LIMITS = {0: cpu.LIMITS, 1: cuda.LIMITS}


def block(number: int, random: np.random.Generator) -> list[SequenceState]:
    """Rows whose captions are 60 tokens on average and 128 at most."""
    lengths = np.clip(random.lognormal(np.log(60) - 0.28, 0.75, BLOCK_ROWS), 4, 128)
    requests = [
        Request(
            number, np.zeros(1, np.int32), np.zeros((0, 3, 1, 1)), (), Sampling(max_new_tokens=int(length))
        )
        for length in lengths
    ]
    return [SequenceState(each, emit=lambda _: None, placeholders=np.arange(0)) for each in requests]


@pytest.mark.parametrize("gpus", LIMITS)
def test_slots_stay_full_over_the_borders_of_blocks(gpus):
    limits, at_once = LIMITS[gpus], blocks_at_once(GenerateResources(gpus=gpus))
    scheduler = Scheduler(limits, lambda _: True, lambda _: None)
    random, left, taken = np.random.default_rng(0), Counter[int](), 0
    running = []
    for _ in range(600):
        while len(left) < at_once:  # a block leaves when its last row is done, and another one comes
            for sequence in block(taken, random):
                scheduler.add(sequence)
            left[taken], taken = BLOCK_ROWS, taken + 1
        assert not list(scheduler.admit())
        running.append(len(scheduler.running))
        for chunk in scheduler.plan():
            sequence = chunk.sequence
            sequence.computed = chunk.end
            sequence.generated.append(0)
            if sequence.complete:
                scheduler.remove(sequence)
                key = sequence.request.key
                assert isinstance(key, int)
                left[key] -= 1
        left = +left
    assert max(running) == limits.sequences
    assert np.mean(running[150:]) > 0.95 * limits.sequences


def test_one_replica_works_on_so_many_blocks_at_once(ray_address):
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.run.full_replica"],
        cwd=ROOT,
        env=environment(RAY_ADDRESS=ray_address),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.split() == [str(BLOCKS)], done.stderr
