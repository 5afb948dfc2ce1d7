"""What comes with the program: the sources' sums, graphs in order, and clusters that anybody can copy and break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import networkx as nx
import pytest

from planner.basis.errors import ARTEFACT, USAGE, PlanError
from planner.cli.main import invoke
from planner.placement import strategies
from planner.search import ranking
from planner.values import cluster, cluster_file
from planner.values.profile import Profile, decode
from profiles import shipped
from tests import factory

# Of the source's graph.txt files: forward and backward milliseconds without the inputs', and bytes of parameters.
SUMS = {
    "alexnet": (44.801, 40.520, 244_403_360),
    "vgg16": (233.902, 438.633, 553_430_176),
    "resnet50": (182.488, 260.931, 102_228_128),
    "resnet101": (197.306, 213.786, 178_196_640),
    "inception_v3": (289.269, 399.769, 108_645_056),
    "densenet121": (177.404, 148.751, 31_915_424),
    "gnmt": (33.533, 55.883, 775_063_808),
    "gnmt_large": (182.563, 337.890, 1_110_870_272),
}


def load(name: str) -> Profile:
    return shipped.read(shipped.profiles()[name])


def layer(profile: Profile, name: str) -> int:
    return [layer.name for layer in profile.layers].index(name)


def test_all_are_there() -> None:
    assert set(shipped.profiles()) == set(SUMS)
    assert len(shipped.clusters()) == 12
    assert sum(path.stat().st_size for path in shipped.profiles().values()) < 100_000


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_the_sources(name: str) -> None:
    profile = load(name)
    times = [layer.times[0] for layer in profile.layers]
    forward, backward, parameters = SUMS[name]
    assert 1e3 * sum(t.forward[0].median_s for t in times) == pytest.approx(forward, abs=1e-9)
    assert 1e3 * sum(t.backward[0].median_s for t in times) == pytest.approx(backward, abs=1e-9)
    assert sum(layer.parameter_bytes for layer in profile.layers) == parameters
    halves = sum(t.backward_input[0].median_s + t.backward_weight[0].median_s for t in times)
    assert 1e3 * halves == pytest.approx(backward, abs=1e-9)


@pytest.mark.parametrize("name", SUMS)
def test_graphs_are_in_order_and_in_one_piece(name: str) -> None:
    profile = load(name)
    assert all(source < target for source, target in profile.graph.edges)
    assert nx.is_weakly_connected(profile.graph)
    assert [n for n, out in profile.graph.out_degree if not out] == [len(profile.layers) - 1]
    assert len({layer.name for layer in profile.layers}) == len(profile.layers)


@pytest.mark.parametrize("name", SUMS)
def test_concatenations_are_as_large_as_their_parts(name: str) -> None:
    """The source says so too, but for GNMT, where it counts one part only."""
    profile = load(name)
    rows = [line.split(",") for line in shipped.profiles()[name].read_text().splitlines() if line.startswith("Concat")]
    own = [layer.sizes[0].output_bytes for layer in profile.layers if "Concat" in layer.name]
    factor = 2 if name.startswith("gnmt") else 1
    assert own == [factor * int(row[3]) for row in rows]


@pytest.mark.parametrize("name", SUMS)
def test_batches_follow_from_bytes(name: str) -> None:
    """Logits of 1,000 classes; of GNMT the last state of 1,024 units."""
    table = shipped.profiles()[name].read_text()
    if name.startswith("gnmt"):
        line = next(line for line in table.splitlines() if line.startswith('"LSTM(2048, 1024)"'))
        state = line.split(",")[-3].split()[1]
        assert load(name).batch == int(state) / (4 * 1024)
    else:
        assert load(name).batch == int(table.splitlines()[-1].split(",")[-3]) / (4 * 1000)


def test_a_residual_block() -> None:
    """node5 is read by the block and by its shortcut, whose sum is node16."""
    profile = load("resnet50")
    pooled = layer(profile, "node5-MaxPool2d")
    assert {profile.layers[t].name for t in profile.graph.successors(pooled)} == {"node6-Conv2d", "node14-Conv2d"}
    added = layer(profile, "node16-Add")
    assert {profile.layers[s].name for s in profile.graph.predecessors(added)} == {
        "node13-BatchNorm2d",
        "node15-BatchNorm2d",
    }


def test_what_is_kept_for_the_backward() -> None:
    """A convolution's output by the batch norm behind it, a batch norm's by nobody: the ReLU overwrites it."""
    profile = load("resnet50")
    kept = {name: profile.layers[layer(profile, name)] for name in ("node2-Conv2d", "node3-BatchNorm2d", "node4-ReLU")}
    assert [part.output_saved for part in kept.values()] == [True, False, True]
    assert kept["node4-ReLU"].sizes[0].forward_peak_bytes == 0
    assert kept["node3-BatchNorm2d"].buffer_bytes == 512 + 8
    assert profile.layers[layer(profile, "node5-MaxPool2d")].sizes[0].saved_bytes == 2 * 102_760_448


def test_items_and_tokens_of_gnmt() -> None:
    """The attention goes to all later LSTMs, as large as the decoder's output; tokens are 64-bit integers."""
    profile = load("gnmt")
    values = {value.name: value for value in profile.values}
    assert values["node23[3]"].bytes_at == ((32, 47 * 32 * 1024 * 4),)
    assert [profile.layers[t].name for t in values["node23[3]"].targets] == [
        "node29-Concat",
        "node35-Concat",
        "node42-Concat",
    ]
    assert "node7[1]" not in values, "nobody reads the last state"
    assert values["node1"].bytes_at == ((32, 48 * 32 * 8),)
    assert profile.batch_bytes == ((32, 2 * 48 * 32 * 8, 47 * 32 * 8),)


def test_the_auxiliary_classifier_reaches_the_loss() -> None:
    profile = load("inception_v3")
    assert list(profile.graph.successors(layer(profile, "node239-Linear"))) == [len(profile.layers) - 1]


def test_flop_of_a_convolution() -> None:
    profile = load("vgg16")
    assert profile.layers[layer(profile, "node4-Conv2d")].sizes[0].flop == 2 * 128 * 224 * 224 * 64 * 64 * 9


@pytest.mark.parametrize("name", SUMS)
def test_every_profile_simulates(name: str) -> None:
    """GPipe on four V100s: within the sum of all work on one device and a quarter of it."""
    profile = load(name)
    found = ranking.rank(
        profile, profile.machine, k=4, m=4, batch=profile.batch, name=name, strategies=[strategies.get("gpipe")]
    )
    forward, backward, _ = SUMS[name]
    assert (forward + backward) / 4e3 < found.outcomes[0].step_s < 2 * (forward + backward) / 1e3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failing(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> dict[str, str]:
    assert invoke([*arguments, "--json"]) == code
    error: dict[str, str] = json.loads(capsys.readouterr().out)["error"]
    return error


def test_an_empty_folder_is_enough(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ("simulate", "--profile", "resnet50", "--k", "8", "--m", "32", "--strategy", "gpipe", "--json")
    assert invoke([*question, "--cluster", "dgx-a100"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["cluster"] == "dgx-a100"
    assert invoke([*question]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["cluster"], data["profile"]) == ("dgx1-v100", "resnet50")
    error = failing(capsys, ARTEFACT, "run", "gpipe-k8-m32")
    assert "no model file" in error["why"]
    assert error["fix"].startswith("plan run best --rehearse")
    assert "plan profile model.py" in error["fix"]


def test_names_that_nobody_knows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'vgg16'" in failing(capsys, ARTEFACT, "simulate", "--profile", "vgg61")["why"]
    error = failing(capsys, USAGE, "simulate", "--profile", "vgg16", "--cluster", "dgxa100")
    assert error["what"] == "unknown cluster 'dgxa100'"
    assert "did you mean 'dgx-a100'" in error["why"]


def test_a_table_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shipped.profiles()["alexnet"].read_text()
    Path("mine.csv").write_text(text)
    assert invoke(["simulate", "--profile", "mine.csv", "--m", "4", "--strategy", "gpipe"]) == 0
    capsys.readouterr()
    for wrong, why in (
        (text.replace("# batch = 256\n", ""), "there is no 'batch'"),
        (text.replace("# batch = 256\n", "# batch = 0\n"), "must be positive"),
        (text.replace(",22.316,", ",nan,"), "finite"),
        (text.replace(",22.316,", ",-1,"), "not negative"),
        (text.replace(",93184,3", ",93184,2"), "must be later"),
        (text.replace(",93184,3", ",93184,"), "reads no value"),
        (text[: text.index("op,")], "no node is a layer"),
        ("\x00", "'batch'"),
    ):
        Path("wrong.csv").write_text(wrong)
        error = failing(capsys, ARTEFACT, "simulate", "--profile", "wrong.csv")
        assert why in error["why"]
        assert error["where"] == "wrong.csv"


def chain(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(msgspec.json.encode(factory.profile([1.0] * 4, message_bytes=10)))
    return data | changes


def values(*edges: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"name": f"{s}", "source": s, "targets": [t], "bytes_at": [[1, 1]], "gradient": True} for s, t in edges]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"noise": float("nan")}, "malformed"),
        ({"values": values((0, 1), (1, 2), (2, 1), (2, 3))}, "cannot feed"),
        ({"values": values((0, 1), (1, 1), (1, 2), (2, 3))}, "cannot feed"),
        ({"values": values((0, 1), (2, 3), (1, 3))}, "layers[2] 'layer2': it reads no value"),
        ({"values": values((0, 1), (0, 2), (2, 3))}, "layers[1] 'layer1': nothing reads what it makes"),
        ({"values": []}, "layers[0] 'layer0': nothing reads what it makes"),
    ],
)
def test_profiles_that_cannot_be(here: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match="cannot be read") as caught:
        decode(json.dumps(chain(**changes)).encode(), "p.json")
    assert caught.value.code == ARTEFACT
    assert why in caught.value.why


def test_no_number_of_a_profile_may_be_nan() -> None:
    profile = factory.profile([1.0] * 4)
    with pytest.raises(ValueError, match="finite"):
        msgspec.structs.replace(profile, load=(msgspec.structs.replace(profile.load[0], high_s=float("nan")),))


PAIR = """
name = "pair"
[[hosts]]
name = "host"
count = 2
cores = 1
memory_bytes = 1
[[devices]]
name = "gpu"
count = 4
host = "host*"
memory_bytes = 1
[[switches]]
name = "fabric"
[[links]]
between = ["gpu*", "host*"]
latency_s = 0.0
bandwidth_bytes_per_s = 2.0
[[links]]
between = ["host*", "fabric"]
latency_s = 1.0
bandwidth_bytes_per_s = 1.0
"""


def written(text: str) -> cluster.Cluster:
    Path("c.toml").write_text(text)
    return cluster_file.read(Path("c.toml"))


def test_counts_and_stars(here: Path) -> None:
    """Four devices in two blocks, each on its own host; hosts join through the fabric."""
    pair = written(PAIR)
    assert [(d.name, d.host) for d in pair.devices] == [
        ("gpu0", "host0"),
        ("gpu1", "host0"),
        ("gpu2", "host1"),
        ("gpu3", "host1"),
    ]
    ends = [pair.link_of(i).between for i in pair.path("gpu0", "gpu3")]
    assert ends == [("gpu0", "host0"), ("host0", "fabric"), ("host1", "fabric"), ("gpu3", "host1")]
    assert [pair.link_of(i).between for i in pair.path("gpu0", "gpu1")] == [("gpu0", "host0"), ("gpu1", "host0")]


def test_devices_left_over_still_pass_messages_on(here: Path) -> None:
    mesh = cluster_file.read(shipped.clusters()["dgx1-v100"])
    few = mesh.take(6)
    assert few.switches == ("gpu6", "gpu7")
    assert [few.link_of(i).between for i in few.path("gpu0", "gpu5")] == [
        mesh.link_of(i).between for i in mesh.path("gpu0", "gpu5")
    ]
    one_host = written(PAIR).take(2)
    assert all("gpu2" not in link.between for link in one_host.links)


def test_a_ring_of_hosts_without_a_switch() -> None:
    """Devices of a third host pass messages on where there is no other way: a line of three hosts."""
    line = factory.devices(1)
    hosts = tuple(msgspec.structs.replace(line.hosts[0], name=f"h{i}") for i in range(3))
    devices = tuple(cluster.Device(name=f"d{i}", memory_bytes=1, host=f"h{i}") for i in range(3))
    links = tuple(
        cluster.Link(between=(f"d{i}", f"d{i + 1}"), latency_s=1.0, bandwidth_bytes_per_s=1.0) for i in range(2)
    )
    assert cluster.Cluster(name="line", hosts=hosts, devices=devices, links=links).path("d0", "d2") == (0, 2)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("bandwidth_bytes_per_s = 2.0", "bandwidth_bytes_per_s = 0.0", "bandwidth must be positive"),
        ("bandwidth_bytes_per_s = 2.0", "bandwidth_bytes_per_s = -1.0", "bandwidth must be positive"),
        ("bandwidth_bytes_per_s = 2.0", "bandwidth_bytes_per_s = nan", "bandwidth must be positive"),
        ("bandwidth_bytes_per_s = 2.0", "bandwidth_bytes_per_s = inf", "bandwidth must be positive"),
        ("latency_s = 1.0", "latency_s = nan", "latency not negative"),
        ("latency_s = 1.0", "latency_s = 1.0\npoints = [[1, nan]]", "finite"),
        ("latency_s = 1.0", "latency_s = 1.0\npoints = [[2, 1.0], [1, 2.0]]", "must increase"),
        ("latency_s = 1.0", "latencies = 1.0", "latenc"),
        ('host = "host*"\nmemory_bytes = 1', 'host = "host*"\nmemory_bytes = 0', "memory_bytes"),
        ('host = "host*"\nmemory_bytes = 1', 'host = "host*"\nmemory_bytes = -1', "memory_bytes"),
        ('host = "host*"\nmemory_bytes = 1', 'host = "host*"\nmemory_bytes = nan', "memory_bytes"),
        ('host = "host*"', 'host = "host*"\nspeed = nan', "speed"),
        ('host = "host*"', 'host = "house"', "no host 'house'"),
        ('host = "host*"', 'host = "house*"', "no table 'house'"),
        ("count = 4", "count = 3", "dealt out evenly"),
        ("count = 4", "count = 0", ">= 1"),
        ("cores = 1", "cores = 0", "cores"),
        ('"fabric"]', '"fibre"]', "no device, host or switch 'fibre'"),
        ('name = "fabric"', 'name = "gpu0"', "gpu0"),
        ('between = ["host*", "fabric"]', 'between = ["host0", "fabric"]', "no link leads from gpu1 to gpu2"),
        ('name = "pair"', 'name = "pair"\nall_reduces = [{devices = 2, points = [[1, nan]]}]', "all_reduces"),
        ('name = "pair"', 'name = "pair"\nall_reduces = [{devices = 1, points = [[1, 1.0]]}]', "two devices"),
    ],
)
def test_clusters_that_cannot_be(
    here: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, field: str
) -> None:
    assert old in PAIR
    Path("c.toml").write_text(PAIR.replace(old, new))
    error = failing(capsys, USAGE, "simulate", "--profile", "alexnet", "--m", "4", "--cluster", "c.toml")
    assert field in error["what"] + error["why"]


@pytest.mark.parametrize("name", shipped.clusters())
def test_shipped_clusters(name: str) -> None:
    """Named as their file; every figure has its comment."""
    found = cluster_file.read(shipped.clusters()[name])
    assert found.name == name
    assert shipped.clusters()[name].read_text().startswith("# ")


def test_links_of_a_large_cluster() -> None:
    """PCIe, NVLink and NIC are apart: NVLink within a host, the NICs between two."""
    found = cluster_file.read(shipped.clusters()["h100x1024"])
    assert (len(found.devices), len(found.hosts), len(found.links)) == (1024, 128, 3 * 1024)
    assert [found.link_of(i).between for i in found.path("gpu0", "gpu7")] == [
        ("gpu0", "nvswitch0"),
        ("gpu7", "nvswitch0"),
    ]
    assert [found.link_of(i).between for i in found.path("gpu7", "gpu1023")] == [
        ("gpu7", "infiniband"),
        ("gpu1023", "infiniband"),
    ]
