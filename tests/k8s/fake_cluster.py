"""A fake Kubernetes cluster with KubeRay's operator, for the CronJob's script: it answers `kubectl` and `sleep`.

Objects are held by name, and the submitter of a RayJob is a Job of the RayJob's own name, as KubeRay 1.7 makes it
(ray-operator/controllers/ray/rayjob_controller.go). Time passes while the script sleeps; after each sleep the operator
looks at every RayJob once.
"""

import argparse
import json
import os
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.k8s import kuberay_rules as rules

CRON, OPERATOR = "cronjob-controller", "kuberay-operator"  # who creates Jobs
PATIENCE, LOOKS = 5 * 86400, 300  # seconds, or sleeps, after which a script that still waits is killed
KILLED = 137

# A command of the script: its words go into one pipe, the exit status comes back through another.
SHIM = """#!/bin/sh
cd "${0%/*}"
if [ "$1" = create ]; then cat > input; fi
printf '%s\\0' "${0##*/}" "$@" > asked
read -r status < answered
if [ "$status" = 0 ]; then cat output; else cat output >&2; fi
exit "$status"
"""


class CommandError(Exception):
    """What a command writes to stderr; its exit status is 1 if `status` does not say otherwise."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class FakeCluster:
    """The fields but the first two are what a test may change about the cluster."""

    folder: Path  # for the two commands
    files: Mapping[str, Path]  # the pod's: path in the pod -> path here
    verbs: Sequence[str] = ("get", "create")  # that the pod may use on RayJobs
    ray: list[str] = field(default_factory=list)  # what each look finds of a running Ray job; then RUNNING
    nodes: bool = True  # whether pods find a place
    away: tuple[float, float] = (0, 0)  # from when to when the API server does not answer
    # Verbs of which one answer each is lost, with the deed done
    lost: list[str] = field(default_factory=list)
    pace: float = 1  # how much faster time goes than the script sleeps
    clock: float = 0  # seconds

    def __post_init__(self) -> None:
        self.jobs: dict[str, tuple[str, str]] = {}  # name -> (uid, who created it)
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.created: list[str] = []  # names of RayJobs, in order
        self.looks = 0
        self.error: Exception | None = None
        os.mkfifo(self.folder / "asked")
        os.mkfifo(self.folder / "answered")
        for name in ("kubectl", "sleep"):
            (self.folder / name).write_text(SHIM)
            (self.folder / name).chmod(0o755)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """A pod's command from start to end: its exit status and what it said."""
        server = threading.Thread(target=self._serve, daemon=True)
        server.start()
        path = {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        try:
            done = subprocess.run(
                command, env={**environment, **path}, capture_output=True, text=True, timeout=60
            )
        finally:
            (self.folder / "asked").write_text("")
            server.join()
        if self.error:
            raise self.error
        return done.returncode, done.stdout + done.stderr

    def _serve(self) -> None:
        while words := (self.folder / "asked").read_text().split("\0")[:-1]:
            try:
                output, status = self._command(*words), 0
            except CommandError as error:
                output, status = f"{error}\n", error.status
            except Exception as error:  # of this file, or a call it does not know: `run` raises it
                self.error, output, status = error, "", KILLED
            (self.folder / "output").write_text(output)
            (self.folder / "answered").write_text(f"{status}\n")

    def _command(self, name: str, *arguments: str) -> str:
        return self.kubectl(*arguments) if name == "kubectl" else self.sleep(float(*arguments))

    # The API

    def kubectl(self, *arguments: str) -> str:
        parser = argparse.ArgumentParser("kubectl", allow_abbrev=False, exit_on_error=False)
        parser.add_argument("verb")
        parser.add_argument("names", nargs="*")
        for flag in ("--local", "--ignore-not-found"):
            parser.add_argument(flag, action="store_true")
        for name in ("--filename", "--type", "--patch", "--output", "--request-timeout"):
            parser.add_argument(name)
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise CommandError(f"error: unknown flag: {unknown[0]}")
        if options.verb == "patch" and options.local:  # asks no server
            return self._patch(options)
        self._reach(options)
        answer = {"get": self._get, "create": self._create}[options.verb](options)
        if options.verb in self.lost:
            self.lost.remove(options.verb)
            raise CommandError("Unable to connect to the server: unexpected EOF")
        return answer

    def _reach(self, options: argparse.Namespace) -> None:
        """Raises CommandError where the API server does not answer, or refuses to."""
        if self.away[0] <= self.clock < self.away[1]:
            timeout = options.request_timeout  # without one, kubectl waits for ever on a silent connection
            self.clock += int(timeout.removesuffix("s")) if timeout else PATIENCE
            raise CommandError("Unable to connect to the server: net/http: request canceled")
        if options.verb not in self.verbs:
            raise CommandError(f"Error from server (Forbidden): cannot {options.verb} resource rayjobs")

    def _get(self, options: argparse.Namespace) -> str:
        kind, name = options.names
        assert kind == "rayjob"
        if name not in self.rayjobs:
            if options.ignore_not_found:
                return ""
            raise CommandError(f'Error from server (NotFound): rayjobs.ray.io "{name}" not found')
        template = options.output.removeprefix("jsonpath=")
        return re.sub(r"\{\.([\w.]+)\}", lambda found: _field(self.rayjobs[name], found[1]), template)

    def _create(self, options: argparse.Namespace) -> str:
        assert options.filename == "-"
        rayjob = yaml.safe_load((self.folder / "input").read_text())
        if not rayjob:
            raise CommandError("error: no objects passed to create")
        name = rayjob["metadata"]["name"]
        if name in self.rayjobs:
            raise CommandError(f'Error from server (AlreadyExists): rayjobs.ray.io "{name}" already exists')
        self.rayjobs[name] = rayjob
        self.created.append(name)
        return f"rayjob.ray.io/{name} created\n"

    def _patch(self, options: argparse.Namespace) -> str:
        assert (options.type, options.output) == ("merge", "yaml")
        manifest = yaml.safe_load(self.files[options.filename].read_text())
        return yaml.safe_dump(merged(manifest, json.loads(options.patch)))

    # The controllers

    def sleep(self, seconds: float) -> str:
        self.clock += seconds * self.pace
        self.looks += 1
        if self.clock > PATIENCE or self.looks > LOOKS:
            raise CommandError("Killed: the script waits for ever", KILLED)
        uids = {uid for uid, _ in self.jobs.values()}
        for name, rayjob in list(self.rayjobs.items()):
            if {owner["uid"] for owner in rayjob["metadata"].get("ownerReferences", ())} - uids:
                del self.rayjobs[name]  # the garbage collector does
            else:
                self._reconcile(name, rayjob)
        return ""

    def _reconcile(self, name: str, rayjob: dict[str, Any]) -> None:
        """One look of KubeRay's operator at a RayJob."""
        spec, status = rayjob["spec"], rayjob.setdefault("status", {})
        before = status.get("jobDeploymentStatus", "")
        age = self.clock - status.get("startTime", self.clock)
        late = {deadline for deadline in rules.DEADLINES if age >= spec.get(deadline, PATIENCE)}
        if before == "":
            broken = rules.problems(rayjob)
            after = "ValidationFailed" if broken else "Initializing"
            status.update(jobDeploymentStatus=after, message="; ".join(broken), startTime=self.clock)
        elif before in ("Initializing", "Running") and "activeDeadlineSeconds" in late:
            _fail(spec, status, "DeadlineExceeded")
        elif before == "Initializing" and "preRunningDeadlineSeconds" in late:
            _fail(spec, status, "PreRunningDeadlineExceeded")
        elif before == "Initializing" and self.nodes:
            # The operator sees its own Jobs only: creating one of another's name is AlreadyExists, again and again.
            if self.jobs.setdefault(name, (f"submitter of {name}", OPERATOR))[1] == OPERATOR:
                status["jobDeploymentStatus"] = "Running"
        elif before == "Running":
            self._look(name, spec, status)
        elif before == "Retrying":
            if self.jobs.get(name, ("", ""))[1] == OPERATOR:
                del self.jobs[name]
            rayjob["status"] = {"failed": status["failed"]}

    def _look(self, name: str, spec: Mapping[str, Any], status: dict[str, Any]) -> None:
        """What became of the Ray job."""
        ray = self.ray.pop(0) if self.ray else "RUNNING"
        if ray == "DELETED":  # the RayJob, by somebody; its submitter goes with it
            del self.rayjobs[name], self.jobs[name]
            return
        status["jobStatus"] = ray
        if ray == "FAILED":
            _fail(spec, status, "AppFailed")
        elif ray in ("SUCCEEDED", "STOPPED"):
            status["jobDeploymentStatus"] = "Complete"


def _fail(spec: Mapping[str, Any], status: dict[str, Any], reason: str) -> None:
    """Ends one try. Another begins, on a new cluster, unless it was the last or out of time."""
    status["failed"] = status.get("failed", 0) + 1
    again = status["failed"] <= spec.get("backoffLimit", 0) and reason != "DeadlineExceeded"
    status.update(jobDeploymentStatus="Retrying" if again else "Failed", reason=reason)


def _field(value: Any, path: str) -> str:
    """A field by its dotted name; empty where it is missing."""
    for name in path.split("."):
        value = value.get(name, {})
    return str(value or "")


def merged(target: Any, patch: Any) -> Any:
    """`target` after a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        target[name] = merged(target.get(name), value)
    return {name: value for name, value in target.items() if value is not None}
