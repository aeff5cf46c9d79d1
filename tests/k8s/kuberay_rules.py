"""KubeRay's rules for a RayJob that its definition does not express; the operator enforces them at run time.

Read in KubeRay's ray-operator/controllers/ray/utils/validation.go. Each rule is a sentence for whoever breaks
it. The last two are Tessera's own: a head that takes no work, pods that outlive Ray's drain.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_RAYJOB_NAME = 47  # leaves room for the suffixes of the RayCluster and its pods within 63 characters
DEADLINES = ("activeDeadlineSeconds", "preRunningDeadlineSeconds")  # of each try, from its start
DRAIN_SECONDS = 30  # Ray's own, on SIGTERM


def problems(rayjob: Mapping[str, Any]) -> list[str]:
    """Every broken rule, in words; empty for a RayJob that KubeRay accepts and that survives losing nodes."""
    return [*_job(rayjob["metadata"], rayjob["spec"]), *_cluster(rayjob["spec"].get("rayClusterSpec", {}))]


def pod_templates(rayjob: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The head's pod template, then each worker group's."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]


def _job(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    if len(metadata["name"]) > MAX_RAYJOB_NAME:
        yield f"the name is longer than {MAX_RAYJOB_NAME} characters"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"]):
        yield "the name is no DNS label that begins with a letter"
    if "rayClusterSpec" not in spec and "clusterSelector" not in spec:
        yield "one of rayClusterSpec and clusterSelector is needed"
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    for name in DEADLINES:
        if spec.get(name, 1) <= 0:
            yield f"{name} is not positive"
    if spec.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend excludes clusterSelector"
    deletion = spec.get("deletionStrategy", {})
    if "deletionRules" in deletion and shutdown:
        yield "deletionStrategy.deletionRules exclude shutdownAfterJobFinishes"
    policies = {rule.get("policy") for rule in deletion.get("deletionRules", ())}
    policies |= {deletion.get(name, {}).get("policy") for name in ("onSuccess", "onFailure")}
    if "DeleteWorkers" in policies and spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"):
        yield "the policy DeleteWorkers excludes autoscaling"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode excludes backoffLimit"
    if spec.get("submissionMode") == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if name in spec:
                yield f"SidecarMode excludes {name}"
    if spec.get("submissionMode") != "InteractiveMode" and not spec.get("entrypoint"):
        yield "an entrypoint is missing"


def _cluster(cluster: Mapping[str, Any]) -> Iterator[str]:
    groups = cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    for group in (cluster.get("headGroupSpec", {}), *groups):
        if group.get("resources") and {"num-cpus", "num-gpus", "memory"} & set(
            group.get("rayStartParams", {})
        ):
            yield "a group sets both resources and rayStartParams"
    if len(set(names)) != len(names):
        yield "two worker groups have the same name"
    for group in groups:
        if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas are not between minReplicas and maxReplicas"
    if cluster.get("headGroupSpec", {}).get("rayStartParams", {}).get("num-cpus") != "0":
        yield "the head takes work: set rayStartParams num-cpus to the string 0"
    version_2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    templates = [("head", cluster.get("headGroupSpec", {})), *zip(names, groups, strict=True)]
    for name, group in templates:
        pod = group.get("template", {}).get("spec", {})
        if version_2 and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 needs restartPolicy Never, or none"
        if pod.get("terminationGracePeriodSeconds", DRAIN_SECONDS) <= DRAIN_SECONDS:
            yield f"{name}: terminationGracePeriodSeconds must exceed Ray's {DRAIN_SECONDS} s drain"
