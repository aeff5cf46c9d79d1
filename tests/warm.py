"""`tessera` commands in processes that have imported everything already: `python -m tests.warm`.

Why: importing torch, transformers and Ray takes longer than most commands, and the tests run a hundred of them. This
process imports them once, then forks itself for each command. The copy has its own environment, files, threads and
exit code, and ends as any process does.

A line of JSON comes in for each command: {"arguments": [..], "environment": {..}, "out": file, "err": file}. Two lines
go out: the copy's process id when it starts, its exit code (negative for a signal) when it has ended.
"""

import gc
import importlib
import json
import os
import random
import sys
from typing import Any

_MODULES = (
    "actors.checkpoint_hub",
    "pipeline.input.source",
    "pipeline.ledger.load_job",
    "pipeline.report.page",
    "pipeline.report.reader",
    "pipeline.report.status",
    "pipeline.run.graph",
)


def serve() -> dict[str, Any] | None:
    """Forks for each command. Returns it in the copy, and None in the original, once there are no more."""
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if not (pid := os.fork()):
            return command
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def put_on(command: dict[str, Any]) -> None:
    """Gives this process the command's arguments, environment, and files for what it prints."""
    os.environ.clear()
    os.environ.update(command["environment"])
    for descriptor, name in enumerate([os.devnull, command["out"], command["err"]]):
        opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["tessera", *command["arguments"]]
    random.seed()


def import_everything() -> None:
    """What commands import on their way, with the settings that Ray reads when it is imported."""
    from pipeline import dataflow

    dataflow._prepare_ray()
    for name in _MODULES:
        importlib.import_module(name)


if __name__ == "__main__":
    from jobs.cli import main

    import_everything()
    gc.freeze()  # or a collection in a copy would copy all of the memory, too
    command = serve()
    if command:
        put_on(command)
        sys.exit(main())
