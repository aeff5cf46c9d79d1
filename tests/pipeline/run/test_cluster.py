"""The preflight: what can never be placed is refused in one sentence, what the autoscaler may bring is not."""

import pytest

from pipeline.run.cluster import (
    Capacity,
    ClusterError,
    bundles,
    connect,
    fitted,
    on_machine,
    preflight,
    required,
    with_generate_cpus,
)
from pipeline.spec.job_spec import ResourcesSpec


def resources(
    preprocess=(1, 4), cpus=1.0, generate=(1, 8), gpus=1.0, generate_cpus=None, cores=1
) -> ResourcesSpec:
    spec = ResourcesSpec.model_validate(
        {
            "preprocess": {"replicas": preprocess, "cpus": cpus},
            "generate": {"replicas": generate, "gpus": gpus, "cpus": generate_cpus},
        }
    )
    return with_generate_cpus(spec, cores)


def test_a_gpu_actor_takes_no_cpu_and_a_cpu_one_all_it_can_get():
    assert required(resources()) == (2, 1)
    assert required(resources(gpus=0)) == (3, 0)
    assert required(resources(preprocess=(3, 3), cpus=2, generate=(2, 2), gpus=0.5)) == (7, 1)
    assert required(resources(gpus=0, cores=16)) == (18, 0)
    assert required(resources(generate=(3, 3), gpus=0, cores=16)) == (2 + 3 * 5, 0)
    assert required(resources(generate=(3, 3), gpus=0, cores=-1)) == (2 + 3, 0)


def test_what_the_spec_says_of_cpus_holds():
    assert required(resources(generate_cpus=2, cores=16)) == (4, 1)
    assert required(resources(gpus=0, generate_cpus=4, cores=16)) == (6, 0)


def test_what_fits_passes():
    preflight(resources(), Capacity(2, 1, 2, 1))
    preflight(resources(gpus=0), Capacity(3, 0, 3, 0))


def test_missing_gpus_are_refused_with_the_way_out():
    with pytest.raises(
        ClusterError, match=r"needs 1 GPU and the cluster has 0 .*resources\.generate\.gpus=0"
    ) as error:
        preflight(resources(), Capacity(64, 0, 64, 0))
    assert "\n" not in str(error.value)


def test_missing_cpus_are_refused_with_the_arithmetic():
    with pytest.raises(
        ClusterError, match=r"needs 5 CPUs, 1 of them for reads and writes, and the cluster has 2"
    ):
        preflight(resources(preprocess=(2, 2), cpus=2), Capacity(2, 1, 2, 1))


def test_what_the_autoscaler_may_bring_counts():
    preflight(resources(generate=(8, 8)), Capacity(1, 0, 64, 8))


@pytest.mark.parametrize(
    ("nodes", "preprocess", "cpus"),
    [
        ([16], 1, 14),
        ([2, 2], 1, 2),
        ([8, 8], 1, 8),
        ([4, 1, 1, 1, 1], 2, 2),  # or no node were left for preprocessing
        ([3, 3], 1, 3),
        ([1], 1, 1),  # fits nowhere: the preflight tells
        ([], 1, 1),
    ],
)
def test_a_replica_leaves_the_others_their_places(nodes, preprocess, cpus):
    open_spec = ResourcesSpec.model_validate({"preprocess": {"cpus": preprocess}, "generate": {"gpus": 0}})
    assert fitted(open_spec, nodes).generate.cpus == cpus


@pytest.mark.parametrize(
    ("nodes", "cpus", "replicas", "result"),
    [
        ([32, 32], 64, (1, 8), (2, 32)),  # a replica a socket
        ([8] * 8, 64, (1, 4), (4, 8)),  # no more than the spec allows
        ([32, 30], 62, (1, 8), (2, 30)),
        ([32, 4], 36, (1, 8), (1, 36)),  # a scrap of a node is none
        ([32, 32], 16, (1, 8), (1, 16)),  # OMP_NUM_THREADS says what the job may use
        ([32, 32], 64, (2, 2), (2, 32)),
        ([32, 32], 64, (4, 4), (4, 16)),
        ([32, 32], 64, (1, 1), (1, 64)),
        ([2], 2, (1, 8), (1, 2)),
        ([], 2, (1, 8), (1, 2)),
        ([2], 2, (3, 3), (3, 1)),
    ],
)
def test_a_machine_of_several_numa_nodes_gets_a_replica_each(nodes, cpus, replicas, result):
    spec = ResourcesSpec.model_validate({"generate": {"gpus": 0, "replicas": replicas}})
    generate = on_machine(spec, cpus, nodes).generate
    assert (generate.replicas[0], generate.cpus) == result
    assert generate.replicas[1] == replicas[1]


def test_nodes_are_no_matter_where_the_spec_or_a_gpu_decides():
    asked = ResourcesSpec.model_validate({"generate": {"gpus": 0, "cpus": 4}})
    assert on_machine(asked, 64, [32, 32]) == asked
    assert on_machine(ResourcesSpec(), 64, [32, 32]) == with_generate_cpus(ResourcesSpec(), 64)


def test_a_ray_that_does_not_start_is_told_in_one_sentence(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.\nand more")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(
        ClusterError, match=r"Ray did not start on this machine .*timed out during startup\.$"
    ):
        connect(resources())


def test_the_reads_share_is_one_piece():
    """Splitting a block takes a whole CPU: quarters on four nodes would be reserved, and no block ever split."""
    assert {"CPU": 1} in bundles(resources())[2:]
