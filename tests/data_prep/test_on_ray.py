"""convert --ray on real local clusters: the same bytes, and mistakes in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from data_prep.convert import convert
from data_prep.on_ray import STARTS, ray_cluster

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def no_token(monkeypatch):
    """The environment as it was, also after --ray local has put a token there."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arguments(small, output, *ray):
    return (
        *("convert", "--images", small.images, "--annotations", small.annotations),
        *("--output", output, "--samples-per-shard", 2, "--workers", 1, "--ray", *ray),
    )


def test_a_cluster_of_two_nodes_writes_the_same_bytes(small, tmp_path, no_token):
    """Each node has one CPU. The second conversion continues what the first one left."""
    small(9)
    (small.images / "4.jpg").unlink()
    convert(*small.arguments, samples_per_shard=2)
    output = tmp_path / "from ray"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        inputs = (small.images, small.annotations, output)
        with pytest.raises(ValueError, match="--strict: 1 problems, the first: missing image"):
            convert(*inputs, samples_per_shard=2, ray=cluster.address, strict=True)
        before = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
        assert len(before) == 4
        convert(*inputs, samples_per_shard=2, ray=cluster.address)
        assert contents(output) == contents(small.output)
        assert before == {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
        with ray_cluster(cluster.address) as ordered:
            assert list(ordered(lambda n: n * n, range(50))) == [n * n for n in range(50)]
        with (
            pytest.raises(ValueError, match="invalid literal for int"),
            ray_cluster(cluster.address) as ordered,
        ):
            list(ordered(lambda text: int(text), ["1", "x"]))
    finally:
        cluster.shutdown()


def test_folders_by_relative_names_are_those_of_the_command(small, tmp_path, no_token, monkeypatch):
    """Ray's workers run where Ray was started, which is elsewhere."""
    small(3)
    convert(*small.arguments)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        monkeypatch.chdir(tmp_path)
        names = (small.images.name, small.annotations.name, "from ray")
        convert(*names, ray=cluster.address)
    finally:
        cluster.shutdown()
    assert contents(tmp_path / "from ray") == contents(small.output)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_bar_shows_how_far_the_cluster_is(small, terminal, tmp_path, no_token):
    small(5)
    shown = terminal(*arguments(small, tmp_path / "local", "local"))
    assert "convert:   0%|" in shown
    assert "convert: 100%|" in shown
    assert " 5/5 [" in shown


def test_the_command_starts_a_cluster_of_its_own_or_names_the_missing_one(
    small, command, tmp_path, no_token
):
    small(5)
    convert(*small.arguments, samples_per_shard=2)
    done = command(*arguments(small, tmp_path / "local", "local"))
    assert done.returncode == 0, done.stderr
    assert "5 images with 5 annotations in 3 shards" in done.stdout
    assert contents(tmp_path / "local") == contents(small.output)
    for address, message in (
        (("127.0.0.1:9",), "no Ray cluster answers at '127.0.0.1:9'"),
        (("a", "b"), "--ray takes one address, got a b"),
    ):
        done = command(*arguments(small, tmp_path / "other", *address))
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert message in done.stderr


# As Ray's node does where its first seconds take long.
GIVES_UP = """
import sys
from ray._private import services
from data_prep.cli import main
get_node, left = services.get_node, [None] * int(sys.argv[1])

def slow(*given):
    if left:
        left.pop()
        raise Exception("The current node timed out during startup.")
    return get_node(*given)

services.get_node = slow
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("times", [1, STARTS])
def test_a_node_that_gives_itself_up_is_started_again(small, tmp_path, no_token, times):
    small(3)
    command = [sys.executable, "-c", GIVES_UP, times, *arguments(small, tmp_path / "out", "local")]
    done = subprocess.run(
        [str(x) for x in command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if times < STARTS:
        assert done.returncode == 0, done.stderr
        assert "3 images with 3 annotations" in done.stdout
    else:
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "'local' (The current node timed out during startup.)" in line


def test_ray_is_loaded_only_when_it_is_asked_for(small):
    small(2)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from data_prep.convert import convert\n"
        "convert(*map(Path, sys.argv[1:]))\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *small.arguments], cwd=ROOT, timeout=600)
    assert done.returncode == 0
