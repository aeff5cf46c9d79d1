"""Error recovery: what an exception from the device means (no memory, no device any more, one odd row), and how a batch
that fails is tried apart.

Out-of-memory and row errors are dealt with inside; only a lost device ends the engine, because after it every further
call in the process fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from actors.errors import RowError

Item = TypeVar("Item")


def is_out_of_memory(error: BaseException) -> bool:
    """On any device: torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_fatal(error: BaseException) -> bool:
    """Whether the device's context is lost, as after an illegal address or an ECC error."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def device_is_lost(device: torch.device) -> bool:
    """Whether `device` computes no more. For errors that may or may not mean it: a CUDA graph that cannot be captured
    raises the same AcceleratorError on a healthy device."""
    for _ in range(2):  # the first call may only report what is left of the error that raised the question
        try:
            torch.zeros(1, device=device).add_(1).item()  # `item` waits for the device
            return False
        except Exception as error:
            if is_out_of_memory(error):
                return False
    return True


def try_apart(
    items: Sequence[Item],
    attempt: Callable[[Sequence[Item]], None],
    recover: Callable[[Sequence[Item], Exception], bool],
    alone: Callable[[Item, Exception, bool], None],
) -> None:
    """Calls `attempt(items)`; where that raises, halves of them, until one item fails alone.

    `recover(items, error)` comes first: it raises what no smaller batch mends, and returns whether it made room.
    `alone(item, error, recovered)` settles an item that failed by itself.
    """
    try:
        attempt(items)
    except Exception as error:
        recovered = recover(items, error)
        if len(items) == 1:
            alone(items[0], error, recovered)
            return
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            try_apart(half, attempt, recover, alone)


def row_error(error: BaseException) -> RowError:
    """The error of the one row that `error` comes from."""
    if isinstance(error, RowError):
        return error
    return RowError("oom" if is_out_of_memory(error) else "generate", describe(error))


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
