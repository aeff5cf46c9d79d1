"""Whatever is killed, and wherever: after restarts the output is that of an undisturbed run, row for row."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.local import is_temporary
from tests.blocks import picture
from tests.chaos.faults import Manner, armed
from tests.chaos.ground import VICTIMS, Ground, ground
from tests.chaos.scene import Rows, Scene, audit, poisons, write_input, write_poisoned
from tests.chaos.storm import POINTS, forecast, weather
from tests.checkpoints import untrained
from tests.commands import tessera

pytestmark = pytest.mark.timeout(900)  # each starts processes a dozen times

SEEDS = (1,)
ROWS = 320


@pytest.fixture
def here(tmp_path) -> Iterator[Ground]:
    """Two nodes, of which one dies."""
    with ground(tmp_path / "ground") as two:
        yield two


@pytest.fixture(scope="module")
def one_node(tmp_path_factory) -> Iterator[Ground]:
    with ground(tmp_path_factory.mktemp("ground"), nodes=1) as one:
        yield one


@pytest.fixture
def alone(one_node) -> Iterator[Ground]:
    """One node, since a process that starts again on another does not find its predecessor's last words."""
    yield one_node
    one_node.calm()


@pytest.fixture
def job(tmp_path, here) -> tuple[Scene, Rows]:
    """A job, and what an undisturbed run of it captions."""
    write_input(tmp_path / "in", rows=ROWS, shards=3, seed=11)
    scene = Scene(str(tmp_path), untrained("llava_onevision"))
    done = tessera(*scene.run(f"{tmp_path}/undisturbed"), RAY_ADDRESS=here.cluster.address)
    assert done.code == 0, done.err
    expected, _ = scene.captions(f"{tmp_path}/undisturbed")
    assert len(expected) == ROWS
    return scene, expected


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_once_whatever_dies(job, here, tmp_path, seed):
    scene, expected = job
    output = str(tmp_path / "out")
    kills = forecast(seed, len(VICTIMS) + len(POINTS), ROWS)
    survived = weather(here, scene.run(output), kills, seed)
    assert not armed(here.folder), "somebody died at every point of publishing and sealing"
    result = audit(scene, expected, output)
    assert result.clean, result
    assert survived.kills["driver"] == survived.kills["node"] == 1
    assert tessera("verify", "--deep", *scene.arguments(output)).code == 0
    # Of files, only hidden ones may stay, of writers killed inside a put: a sweep deletes them after an hour.
    # (Each lies in the folder of its shard, and those have names like parts here.)
    left = [path.name for path in Path(output, "_tessera/journal").rglob("*") if path.is_file()]
    assert all(is_temporary(name) for name in left), left
    assert len(left) <= sum(survived.kills.values())


def test_rows_that_kill_their_process_become_crash_rows_and_nothing_else_does(alone, tmp_path):
    places: dict[int, tuple[str, Manner]] = {
        3: ("preprocess", "segfault"),
        40: ("preprocess", "kill"),
        10: ("generate", "lost"),
        11: ("generate", "exit"),
    }
    write_poisoned(tmp_path / "in", 64, poisons(places, picture), lambda row: picture(40 + row % 7, 50))
    scene = Scene(str(tmp_path), untrained("llava_onevision"))
    survived = weather(alone, scene.run(), [], seed=0)
    found, _ = scene.captions()
    crashed = {int(name): row[-1] for name, row in found.items() if "'crash'" in row[-1]}
    assert set(crashed) == set(places) and len(found) == 64
    for row, (stage, _) in places.items():
        assert f"'stage': '{stage}'" in crashed[row] and "kills its process" in crashed[row]
    assert "Segmentation fault" in crashed[3] and "device-side assert" in crashed[10]
    assert all(row[0] != "None" for name, row in found.items() if int(name) not in places)
    # Two blocks of 32. The first is generated up to row 10 twice, then once more for each death of row 11; what the
    # second has by the first death may have to be made again.
    assert survived.captions <= 62 + 10 * 5 + 30


def test_a_model_that_kills_whoever_loads_it_ends_the_job(alone, tmp_path):
    write_poisoned(tmp_path / "in", 4, {}, lambda row: picture())
    scene = Scene(str(tmp_path), untrained("llava_onevision"))
    (alone.folder / "no-loading").touch()
    assert alone.start(scene.run()).wait(240) == 1
    last = alone.said().splitlines()[-1]
    assert last.startswith("tessera: ") and "generate process died 6 times" in last
    assert "before its first row" in last and "Segmentation fault" in last
