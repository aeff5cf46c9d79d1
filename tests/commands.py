"""Runs Tessera's commands as a user does: in a process of their own, from the root of the project."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import untrained

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


# What the installed command does; `-m jobs.cli` would look into the working folder first.
_MAIN = "import sys; sys.path.remove(''); from jobs.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with one thread a process, the project importable, and `extra`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def tessera(*arguments: str | Path, timeout: float = 240, **extra: str) -> Finished:
    """`tessera ARGUMENTS` from the root of the project, with `extra` environment variables, that no module reads when
    it is imported: the process is a copy of one that has imported all of them (warm.py)."""
    server = _warm()
    assert server.stdin and server.stdout
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        command = {
            "arguments": [*map(str, arguments)],
            "environment": environment(**extra),
            "out": out.name,
            "err": err.name,
        }
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        late = threading.Timer(timeout, os.kill, [pid, signal.SIGKILL])
        late.start()
        code = int(server.stdout.readline())
        late.cancel()
        done = Finished(code, out.read(), err.read())
    assert code >= 0, f"ended by signal {-code}, after {timeout:g} s at the latest: {done.err}"
    return done


def fresh_tessera(*arguments: str | Path, timeout: float = 240, cwd: Path = ROOT, **extra: str) -> Finished:
    """`tessera ARGUMENTS` from the folder `cwd`, with any `extra` environment variables, as a shell starts it."""
    command = [sys.executable, "-c", _MAIN, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@functools.cache
def _warm() -> subprocess.Popen[str]:
    """The process of warm.py; it ends with this one, which closes its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.warm"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def settings(**fields: object) -> list[str]:
    """--set options; a double underscore stands for a dot."""
    return [f"--set={name.replace('__', '.')}={value}" for name, value in fields.items()]


def options(tmp_path: Path, **changes: object) -> list[str]:
    """--set options of a short job from in/ to out/ in `tmp_path`, on a model of random weights."""
    fields: dict[str, object] = {
        "input__path": tmp_path / "in",
        "output__path": tmp_path / "out",
        "model__path": untrained("llava_onevision"),
        "generation__max_new_tokens": 6,
        "resources__generate__cpus": 1,  # beside other tests
    }
    return settings(**{**fields, **changes})


def ray_environment() -> dict[str, str]:
    """What a person's shell gives `ray`: this Python's programs first on the path, and no cluster joined."""
    env = environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        env.pop(name, None)
    return env


def ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray ARGUMENTS` from the root of the project."""
    command = [str(BIN / "ray"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=ray_environment(), capture_output=True, text=True, timeout=240, check=False
    )
