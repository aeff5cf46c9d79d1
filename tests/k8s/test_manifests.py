"""The manifests against the schemas of Kubernetes and KubeRay, and against rules that no schema states."""

import copy
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.spec import load_spec
from tests.k8s import kuberay_rules as rules

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
    assert len(cron["metadata"]["name"]) + rules.CRON_SUFFIX <= rules.MAX_RAYJOB_NAME


def test_the_cron_account_may_do_what_its_script_does_and_nothing_else():
    account, role, binding = documents("cronjob.yaml")[1:]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"] == cron_pod()["serviceAccountName"]
    (script,) = cron_pod()["containers"][0]["args"]
    verbs = {line.split("kubectl ")[1].split()[0] for line in script.splitlines() if "kubectl " in line}
    assert verbs == {"get", "create", "patch"}
    assert "kubectl patch --local" in script


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


# The script of the CronJob, run against a kubectl that answers from files

FAKE_KUBECTL = """#!/bin/sh
cd "$FAKE"
case "$*" in
  "get rayjob"*--ignore-not-found*) [ ! -e created ] || echo "rayjob.ray.io/$JOB" ;;
  "get rayjob"*jobDeploymentStatus*) head -n 1 states; sed -i 1d states ;;
  "get rayjob"*status.message*) echo "because" ;;
  patch*) printf '%s' "$*" > patched; echo manifest ;;
  create*) cat > created ;;
  *) exit 9 ;;
esac
"""


def run_cron(folder: Path, states: str, created: bool = False) -> int:
    for name, text in {"kubectl": FAKE_KUBECTL, "sleep": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "states").write_text(states)
    if created:
        (folder / "created").write_text("earlier")
    container = cron_pod()["containers"][0]
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE": str(folder),
        "JOB": "tessera-1",
        "JOB_UID": "u-1",
    }
    return subprocess.run([*container["command"], *container["args"]], env=environment, timeout=60).returncode


def test_the_cron_script_creates_a_rayjob_and_waits_for_it(tmp_path: Path):
    assert (
        run_cron(
            tmp_path,
            "/\nInitializing/\nRunning/RUNNING\nRetrying/FAILED\nRunning/RUNNING\nComplete/SUCCEEDED\n",
        )
        == 0
    )
    assert (tmp_path / "created").read_text() == "manifest\n"
    patch = yaml.safe_load((tmp_path / "patched").read_text().partition("--patch ")[2])
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "tessera-1", "uid": "u-1"}
    assert patch == {"metadata": {"name": "tessera-1", "ownerReferences": [owner]}}


@pytest.mark.parametrize("state", ["Failed/FAILED", "Complete/STOPPED", "ValidationFailed/"])
def test_the_cron_script_reports_failure_for_good(tmp_path: Path, state: str):
    (rule,) = cronjob()["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert run_cron(tmp_path, f"Running/RUNNING\n{state}\n") in rule["onExitCodes"]["values"]


def test_a_replaced_cron_pod_waits_for_the_rayjob_it_finds(tmp_path: Path):
    assert run_cron(tmp_path, "Complete/SUCCEEDED\n", created=True) == 0
    assert (tmp_path / "created").read_text() == "earlier"
    assert not (tmp_path / "patched").exists()


def test_the_dockerfile_copies_what_is_there():
    lines = (K8S / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"pipeline", "actors", "jobs", "pyproject.toml", "constraints.txt", "README.md"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
