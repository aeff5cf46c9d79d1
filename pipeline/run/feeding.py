"""How many blocks feed a replica, and when a stage gets another one.

An engine has a fixed number of slots: sequences that run at once. A block leaves when its last row is done, so rows
beyond the slots must be at hand: captions are about half as long as the longest on average, and a block stays for the
longest. Two and a half times the slots keep these full at such lengths (by simulation 0.96 of 64 and all of 256; four
blocks kept 0.84 and 0.22). A kill costs what ran, at most the slots, and finished rows of blocks that did not leave.

This is a limit on blocks. Where rows are large, bytes bound it first: Ray Data starts no more preprocessing than its
share of the object store has room for, and the engine then runs with fewer rows.
"""

from __future__ import annotations

from ray.data import ActorPoolStrategy, DataContext

from pipeline.spec.job_spec import GenerateResources

BLOCK_ROWS = 32  # rows of a block, hence of a journal part: a kill costs a few of these

# Sequences that run at once on either kind of device. The engine says so itself (its `LIMITS`), but the driver must
# know before there is one; a test compares what slots hold with the engine's own limits.
_CPU_SLOTS, _CUDA_SLOTS = 64, 256
_WAITING_BLOCKS = 2  # already at the replica's node when a place gets free

# Of its places, on average over a pool: it grows once all are taken, and shrinks when few are, since a new replica
# costs the loading of a model.
_GROW, _SHRINK = 1.0, 0.25


def blocks_at_once(generate: GenerateResources) -> int:
    """Blocks in one engine."""
    slots = _CUDA_SLOTS if generate.gpus else _CPU_SLOTS
    return 5 * slots // 2 // BLOCK_ROWS


def generate_pool(generate: GenerateResources) -> ActorPoolStrategy:
    """Replicas whose engines are kept full."""
    scaling = DataContext.get_current().autoscaling_config
    scaling.actor_pool_util_upscaling_threshold = _GROW
    scaling.actor_pool_util_downscaling_threshold = _SHRINK
    blocks = blocks_at_once(generate)
    return ActorPoolStrategy(
        min_size=generate.replicas[0],
        max_size=generate.replicas[1],
        max_tasks_in_flight_per_actor=blocks + _WAITING_BLOCKS,
        max_concurrent_calls_per_actor=blocks,
        enable_true_multi_threading=True,  # or calls run one after the other
    )
