"""The manifests against the schemas of Kubernetes and KubeRay, and against rules that no schema states."""

import copy
import functools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.spec.job_spec import load_spec
from tests.k8s import kuberay_rules as rules
from tests.k8s.fake_cluster import CRON, FakeCluster, merged

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.34"

Manifest = dict[str, Any]


def documents(name: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all((K8S / name).read_text()) if document]


def rayjob() -> Manifest:
    (document,) = documents("rayjob.yaml")
    return document


def cronjob() -> Manifest:
    return next(document for document in documents("cronjob.yaml") if document["kind"] == "CronJob")


def cron_pod() -> Manifest:
    return cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]


# KubeRay


@functools.cache
def crd_schema(kind: str) -> Manifest:
    """The v1 schema of a KubeRay kind, made strict: a field it does not know is an error, as with kubectl."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's resource definitions are not in {CRDS}")
    crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Manifest) -> Manifest:
    if "properties" in schema:
        schema["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        # `metadata` is the API server's own: definitions leave it open
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if not open_ended:
            schema["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        strict(schema["additionalProperties"])
    if "items" in schema:
        strict(schema["items"])
    return schema


def crd_errors(manifest: Manifest) -> list[str]:
    validator = jsonschema.Draft202012Validator(crd_schema(manifest["kind"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def test_the_rayjob_fits_kuberays_definition():
    assert crd_errors(rayjob()) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entrypont"), "x"),
        (("spec", "backoffLimit"), "two"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "restartpolicy"), "Never"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3"),
    ],
)
def test_the_definition_refuses_what_is_wrong(path: tuple[str, ...], value: object):
    manifest = rayjob()
    functools.reduce(lambda inner, key: inner[key], path[:-1], manifest)[path[-1]] = value
    assert len(crd_errors(manifest)) == 1


def test_the_rayjob_keeps_the_rules_no_schema_states():
    assert rules.problems(rayjob()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job: job["metadata"].update(name="n" * 48), "longer than 47"),
        (lambda job: job["spec"].update(shutdownAfterJobFinishes=False), "ttlSecondsAfterFinished needs"),
        (lambda job: job["spec"].update(deletionStrategy={"deletionRules": [{}]}), "deletionRules exclude"),
        (
            lambda job: job["spec"].update(deletionStrategy={"onFailure": {"policy": "DeleteWorkers"}}),
            "DeleteWorkers excludes",
        ),
        (
            lambda job: job["spec"].update(submissionMode="SidecarMode", submitterConfig={}),
            "SidecarMode excludes",
        ),
        (lambda job: job["spec"].pop("entrypoint"), "entrypoint is missing"),
        (lambda job: job["spec"].update(preRunningDeadlineSeconds=0), "preRunningDeadlineSeconds is not"),
        (lambda job: job["metadata"].update(name="2am"), "no DNS label"),
        (
            lambda job: group(job).update(resources={"CPU": "1"}, rayStartParams={"num-cpus": "1"}),
            "sets both",
        ),
        (lambda job: job["spec"].update(submissionMode="InteractiveMode"), "InteractiveMode excludes"),
        (lambda job: cluster(job)["headGroupSpec"].update(rayStartParams={}), "head takes work"),
        (lambda job: group(job).update(maxReplicas=0), "not between"),
        (lambda job: group(job)["template"]["spec"].update(restartPolicy="Always"), "autoscaler v2 needs"),
        (lambda job: group(job)["template"]["spec"].pop("terminationGracePeriodSeconds"), "must exceed"),
    ],
)
def test_a_broken_rule_is_named(change: Callable[[Manifest], object], words: str):
    manifest = copy.deepcopy(rayjob())  # YAML's aliases are one object: a change must not reach its twins
    change(manifest)
    (problem,) = rules.problems(manifest)
    assert words in problem


def cluster(job: Manifest) -> Manifest:
    return job["spec"]["rayClusterSpec"]


def group(job: Manifest) -> Manifest:
    return cluster(job)["workerGroupSpecs"][-1]


def test_one_group_has_gpus_and_takes_their_taint():
    head, *workers = rules.pod_templates(rayjob())
    gpus = [pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) for pod in workers]
    assert gpus == [0, 1]
    assert workers[1]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]


# Kubernetes


def test_core_kinds_fit_kubernetes():
    kinds = [document["kind"] for document in documents("cronjob.yaml")]
    assert kinds == ["CronJob", "ServiceAccount", "Role", "RoleBinding"]
    for document in documents("cronjob.yaml"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_pods_of_the_rayjob_fit_kubernetes():
    for template in rules.pod_templates(rayjob()):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_runs_do_not_overlap_and_names_fit():
    cron = cronjob()
    assert cron["apiVersion"] == "batch/v1"
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert len(cron["metadata"]["name"]) <= 52  # its Jobs' names end in -<minutes>, 63 characters in all


# Secrets, references between files, versions


def walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything in a manifest."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner, path)


def test_secrets_are_references():
    manifests = [*documents("rayjob.yaml"), *documents("cronjob.yaml")]
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    for manifest in manifests:
        for _, value in walk(manifest):
            if isinstance(value, dict) and {"name", "value"} <= set(value):
                words = value["name"].upper().split("_")
                assert not {"KEY", "SECRET", "TOKEN", "PASSWORD"} & set(words), (
                    f"{value['name']} in plain text"
                )


def test_every_ray_container_gets_the_storage_credentials():
    for template in rules.pod_templates(rayjob()):
        (container,) = template["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "tessera-s3"}}]


def test_the_job_spec_is_one_and_is_where_the_entrypoint_looks():
    spec = load_spec(K8S / "job.yaml")
    assert spec.resources.generate.gpus == 1
    head = rules.pod_templates(rayjob())[0]["spec"]
    (volume,) = [volume for volume in head["volumes"] if "configMap" in volume]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert rayjob()["spec"]["entrypoint"] == f"python -m jobs.caption {mounts[volume['name']]}/job.yaml"
    generated = {
        item["name"]: item["files"] for item in documents("kustomization.yaml")[0]["configMapGenerator"]
    }
    assert generated == {volume["configMap"]["name"]: ["job.yaml"], "tessera-rayjob": ["rayjob.yaml"]}
    assert cron_pod()["volumes"][0]["configMap"]["name"] == "tessera-rayjob"


def test_the_job_spec_fits_the_worker_groups():
    spec = load_spec(K8S / "job.yaml").resources
    preprocess, generate = cluster(rayjob())["workerGroupSpecs"]
    cpus = int(preprocess["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert spec.preprocess.replicas[1] * spec.preprocess.cpus <= preprocess["maxReplicas"] * cpus
    assert spec.preprocess.replicas[0] * spec.preprocess.cpus <= preprocess["minReplicas"] * cpus
    assert spec.generate.replicas[1] * spec.generate.gpus <= generate["maxReplicas"]
    assert spec.generate.replicas[0] * spec.generate.gpus <= generate["minReplicas"]


def test_ray_is_the_pinned_one():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster(rayjob())['rayVersion']}" in pins


def test_kustomize_renders():
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(K8S)], capture_output=True, text=True, check=True, timeout=60
    )
    rendered = [document for document in yaml.safe_load_all(done.stdout) if document]
    for document in rendered:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert document["metadata"]["namespace"] == "tessera"
    maps = {d["metadata"]["name"]: d["data"] for d in rendered if d["kind"] == "ConfigMap"}
    assert yaml.safe_load(maps["tessera-rayjob"]["rayjob.yaml"]) == rayjob()
    assert yaml.safe_load(maps["tessera-job"]["job.yaml"])["name"] == load_spec(K8S / "job.yaml").name


# The script of the CronJob, run in a fake cluster (fake_cluster.py)

UID = "1a2b3c4d-5e6f-4a7b-8c9d-0e1f2a3b4c5d"
TONIGHT = "tessera-29540000"


def cron_script() -> str:
    (script,) = cron_pod()["containers"][0]["args"]
    return script


class Night:
    """A Job of the CronJob in a fake cluster. `pod` runs its pod, or one in its place, and returns the exit status."""

    def __init__(self, folder: Path, job: str = TONIGHT, **cluster: Any) -> None:
        (mount,) = cron_pod()["containers"][0]["volumeMounts"]
        self.cluster = FakeCluster(
            folder, {f"{mount['mountPath']}/rayjob.yaml": K8S / "rayjob.yaml"}, **cluster
        )
        self.job(job)

    def job(self, name: str, uid: str = UID) -> None:
        self.environment = {"JOB": name, "JOB_UID": uid}
        self.cluster.jobs[name] = uid, CRON

    def pod(self, script: str | None = None) -> int:
        command = [*cron_pod()["containers"][0]["command"], script or cron_script()]
        status, self.said = self.cluster.run(command, self.environment)
        return status


def failed_for_good() -> int:
    """The exit status after which the Job starts no other pod."""
    (rule,) = cronjob()["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    (status,) = rule["onExitCodes"]["values"]
    return status


@pytest.mark.parametrize("job", [TONIGHT, "tessera-now", "t" * 63])
def test_the_cron_script_creates_a_rayjob_and_waits_for_it(tmp_path: Path, job: str):
    night = Night(tmp_path, job, ray=["RUNNING", "FAILED", "RUNNING", "SUCCEEDED"])
    assert night.pod() == 0, night.said
    ((name, created),) = night.cluster.rayjobs.items()
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": UID}
    assert created["metadata"] == {"name": name, "ownerReferences": [owner]}
    assert created["spec"] == rayjob()["spec"]
    assert name.startswith(job[:38]) and len(name) <= rules.MAX_RAYJOB_NAME
    assert set(night.cluster.jobs) == {job, name} and name != job, (
        "the submitter is beside the CronJob's own Job"
    )


def test_a_rayjob_named_after_its_own_job_is_never_submitted(tmp_path: Path):
    """The submitter's name is taken: only the deadline before Running ends the two tries."""
    script, replaced = re.subn(r"(?m)^rayjob=.*$", "rayjob=$JOB", cron_script())
    assert replaced == 1
    night = Night(tmp_path, pace=80)
    assert night.pod(script) == failed_for_good()
    assert "ended as Failed/ PreRunningDeadlineExceeded" in night.said
    assert night.cluster.rayjobs[TONIGHT]["status"]["failed"] == 2
    assert set(night.cluster.jobs) == {TONIGHT}


def test_a_job_created_again_does_not_take_its_predecessors_rayjob(tmp_path: Path):
    night = Night(tmp_path, "tessera-now", ray=["SUCCEEDED", "FAILED", "FAILED"])
    assert night.pod() == 0
    night.cluster.jobs["kept"] = night.cluster.jobs["tessera-now"]  # the garbage collector is not there yet
    night.job("tessera-now", uid="9f8e7d6c-5b4a-4392-8170-6f5e4d3c2b1a")
    assert night.pod() == failed_for_good()
    assert len(night.cluster.rayjobs) == 2


@pytest.mark.parametrize(
    ("ray", "words"),
    [
        (["RUNNING", "FAILED", "FAILED"], "ended as Failed/FAILED AppFailed"),
        (["RUNNING", "STOPPED"], "ended as Complete/STOPPED"),
        (["RUNNING", "DELETED"], "was deleted before it had ended"),
    ],
)
def test_the_cron_script_reports_failure_for_good(tmp_path: Path, ray: list[str], words: str):
    night = Night(tmp_path, ray=ray)
    assert night.pod() == failed_for_good()
    assert words in night.said
    assert len(night.cluster.created) == 1


def test_the_cron_script_says_what_kuberay_refuses(tmp_path: Path):
    night = Night(tmp_path, job="by.hand")
    assert night.pod() == failed_for_good()
    assert "ended as ValidationFailed/  the name is no DNS label" in night.said


@pytest.mark.parametrize(
    ("nodes", "words"),
    [(True, "Failed/RUNNING DeadlineExceeded"), (False, "Failed/ PreRunningDeadlineExceeded")],
)
def test_a_rayjob_that_hangs_ends_by_its_deadline(tmp_path: Path, nodes: bool, words: str):
    night = Night(tmp_path, nodes=nodes, pace=80)
    assert night.pod() == failed_for_good()
    assert words in night.said
    assert night.cluster.clock < cronjob()["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]


def test_deadlines_leave_the_tries_their_time_and_the_next_night_its_own():
    job, run = cronjob()["spec"]["jobTemplate"]["spec"], rayjob()["spec"]
    hour, tries = 3600, run["backoffLimit"] + 1
    assert run["preRunningDeadlineSeconds"] < run["activeDeadlineSeconds"] <= 23 * hour
    # For what lies between
    assert job["activeDeadlineSeconds"] >= tries * run["activeDeadlineSeconds"] + hour


@pytest.mark.parametrize("began", [0, 45])
def test_ten_minutes_without_the_api_server_are_survived(tmp_path: Path, began: int):
    night = Night(tmp_path, away=(began, began + 600), ray=["RUNNING", "SUCCEEDED"])
    assert night.pod() == 0
    assert len(night.cluster.created) == 1


def test_a_pod_gives_up_on_the_api_server_and_the_next_one_finds_the_rayjob(tmp_path: Path):
    night = Night(tmp_path, away=(45, math.inf))
    assert night.pod() not in (0, failed_for_good())
    assert "60 requests in a row failed" in night.said
    assert night.cluster.clock < 3600
    night.cluster.away, night.cluster.ray = (0, 0), ["SUCCEEDED"]
    assert night.pod() == 0
    assert len(night.cluster.created) == 1


def test_lost_answers_are_asked_for_again(tmp_path: Path):
    night = Night(tmp_path, lost=["create", "get", "get"], ray=["SUCCEEDED"])
    assert night.pod() == 0
    assert len(night.cluster.created) == 1


def test_the_cron_account_may_do_what_its_script_does_and_nothing_else(tmp_path: Path):
    account, role, binding = documents("cronjob.yaml")[1:]
    (rule,) = role["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"] == cron_pod()["serviceAccountName"]
    for number, verb in enumerate(["none", *rule["verbs"]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        night = Night(folder, verbs=[other for other in rule["verbs"] if other != verb], ray=["SUCCEEDED"])
        assert (night.pod() == 0) == (verb == "none"), night.said


def test_the_fake_patches_as_kubectl_does(tmp_path: Path):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    patch = {"metadata": {"name": "other", "ownerReferences": [{"uid": UID}]}}
    options = ["--type", "merge", "--output", "yaml", "--patch", json.dumps(patch)]
    command = [kubectl, "patch", "--local", "--filename", str(K8S / "rayjob.yaml"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert yaml.safe_load(done.stdout) == merged(rayjob(), patch)


def test_the_dockerfile_copies_what_is_there():
    lines = (K8S / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"pipeline", "actors", "jobs", "pyproject.toml", "constraints.txt", "README.md"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
