"""What a job needs at once, and what is told of one that waits or stands still."""

from collections.abc import Mapping

from pipeline.run.cluster import Capacity, bundles, required
from pipeline.run.placement import Standing, lacking, room_needed
from pipeline.spec.job_spec import ResourcesSpec

JOB = ResourcesSpec.model_validate(
    {"preprocess": {"replicas": [2, 4], "cpus": 0.5}, "generate": {"replicas": [2, 8], "gpus": 0, "cpus": 3}}
)
NEEDED = (
    "the job needs at least 8 CPUs and 0 GPUs; the cluster has 16 CPUs and 0 GPUs, "
    "of which 3.5 CPUs and 0 GPUs are free"
)


def standing(
    waiting: Mapping[str, int] | None = None,
    restarting: Mapping[str, int] | None = None,
    dead: int = 1,
    free: float = 3.5,
) -> Standing:
    return Standing(Capacity(16, 0, 16, 0, free, 0), waiting or {}, restarting or {}, dead)


def test_what_must_fit_at_once_is_what_the_preflight_counts():
    pieces = bundles(JOB)
    assert pieces.count({"CPU": 0.5}) == pieces.count({"CPU": 3}) == 2
    assert sum(piece["CPU"] for piece in pieces) == required(JOB)[0] == 8
    gpus = bundles(ResourcesSpec.model_validate({"generate": {"replicas": [3, 3], "gpus": 0.5}}))
    assert gpus.count({"GPU": 0.5}) == 3  # Ray refuses a bundle with a zero in it


def test_what_is_needed_there_and_free_is_told():
    assert room_needed(JOB, standing().found) == NEEDED


def test_nothing_lacks_where_all_is_in_place():
    assert lacking(JOB, standing(), dead_before=1) == ""


def test_actors_that_wait_and_nodes_that_went_are_told():
    assert lacking(JOB, standing({"Generate": 2}), 1) == f"2 Generate actors wait for a place; {NEEDED}"
    told = lacking(JOB, standing(restarting={"Preprocess": 1}, dead=3), 1)
    assert told == f"1 Preprocess actor is starting again; {NEEDED}; 2 nodes died since the run began"


def test_reads_without_a_cpu_are_told():
    assert lacking(JOB, standing(free=0), 1).startswith("reads and writes may wait for a CPU; the job needs")
