"""The file of a machine: there and back, broken in every way, and what a replay and the cost model make of it."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ssmcache import AttentionLayerConfig, BufferConfig, GpuCacheTierConfig, HostCacheTierConfig, KVCacheManagerConfig
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache.models import load_model
from ssmcache_sim.cost import prefill_cost
from ssmcache_sim.device_profile import H100, with_copies_of
from ssmcache_sim.errors import OutputError, ProfileError
from ssmcache_sim.machine_profile import MachineProfile, check_profile_place, profile_json, read_profile, write_profile
from ssmcache_sim.replay import replay
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

# as it stands in a file, so that the reader is not tested against the writer alone
WRITTEN = {
    "tool": "ssmcache",
    "kind": "machine profile",
    "format": 1,
    "device": "Some GPU",
    "bandwidths": {
        "gpu_bytes_per_second": 2000,
        "gpu_to_host_bytes_per_second": 300.5,
        "host_to_gpu_bytes_per_second": 500,
        "to_disk_bytes_per_second": 70,
        "from_disk_bytes_per_second": 110,
    },
    "software": {"python": "3.11.2"},
    "measurements": [],
}


def changed(**bandwidths: Any) -> dict[str, Any]:
    return {**WRITTEN, "bandwidths": {**WRITTEN["bandwidths"], **bandwidths}}  # type: ignore[dict-item]


def without(name: str) -> dict[str, Any]:
    return {**WRITTEN, "bandwidths": {key: value for key, value in changed()["bandwidths"].items() if key != name}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "machine.json"


def test_a_file_is_read_as_it_is_written_here(path: Path) -> None:
    path.write_text(json.dumps(WRITTEN))
    assert read_profile(path) == MachineProfile("Some GPU", BandwidthProfile(2000, 300.5, 500, 70, 110), ())


def test_a_profile_comes_back_as_it_was(path: Path) -> None:
    stated = {field.name: 1e9 / (index + 3) for index, field in enumerate(fields(BandwidthProfile))}
    write_profile(path, profile_json("GPU", stated, {"python": "3"}, [{"way": "gpu"}]))
    assert read_profile(path) == MachineProfile("GPU", BandwidthProfile(**stated), ())
    first = path.read_bytes()
    write_profile(path, profile_json("GPU", stated, {"python": "3"}, [{"way": "gpu"}]))
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_was_not_measured_is_named_and_has_the_default(path: Path) -> None:
    write_profile(
        path, profile_json(None, {"to_disk_bytes_per_second": 5.0, "from_disk_bytes_per_second": 7.0}, {}, [])
    )
    assert json.loads(path.read_bytes())["bandwidths"]["gpu_bytes_per_second"] is None
    machine = read_profile(path)
    assert machine.device is None
    assert machine.not_measured == (
        "gpu_bytes_per_second",
        "gpu_to_host_bytes_per_second",
        "host_to_gpu_bytes_per_second",
    )
    assert machine.bandwidths == BandwidthProfile(to_disk_bytes_per_second=5.0, from_disk_bytes_per_second=7.0)
    assert machine.bandwidths.gpu_bytes_per_second == DEFAULT_BANDWIDTHS.gpu_bytes_per_second


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "got no JSON"),
        (b"{", "got no JSON"),
        (b"\xff\xfe\x00", "got no JSON"),
        (b"[" * 100_000, "got no JSON"),
        (b"9" * 5000, "got no JSON"),
        (b" " * (1 << 20) + b"{}", "got more than 1048576 bytes"),
        (b"[]", "got JSON of something else"),
        (b'{"tool": "ssmcache", "command": "replay"}', "got JSON of something else"),
        ({**WRITTEN, "tool": "other"}, "got JSON of something else"),
        ({**WRITTEN, "format": 2}, "format: expected 1, got 2"),
        ({**WRITTEN, "format": True}, "format: expected 1, got true"),
        ({**WRITTEN, "device": 7}, "device: expected a name or null, got 7"),
        ({**WRITTEN, "bandwidths": [1, 2]}, r"bandwidths: expected an object, got \[1, 2\]"),
        ({**WRITTEN, "bandwidths": None}, "bandwidths: expected an object, got null"),
        (without("to_disk_bytes_per_second"), "got none of to_disk_bytes_per_second"),
        (changed(link_bytes_per_second=1), 'got also "link_bytes_per_second"'),
        (changed(gpu_bytes_per_second=0), "gpu_bytes_per_second: expected a positive number or null, got 0"),
        (changed(gpu_bytes_per_second=-1), "got -1"),
        (changed(gpu_bytes_per_second="fast"), 'got "fast"'),
        (changed(gpu_bytes_per_second=True), "got true"),
        (changed(gpu_bytes_per_second=float("nan")), "got NaN"),
        (changed(gpu_bytes_per_second=float("inf")), "got Infinity"),
        (changed(gpu_bytes_per_second=10**400), "got 1000000"),
        (changed(gpu_bytes_per_second=1e-300), "expected 1 to 1e.18 bytes a second or null, got 1e-300"),
        (changed(gpu_bytes_per_second=1e300), "got 1e.300"),
        ({**WRITTEN, "device": "\ud800"}, 'device: expected a name or null, got "'),
        (changed(gpu_bytes_per_second=[0] * 1000), r"got \[0, 0.*\.\.\.$"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(path: Path, content: Any, said: str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ProfileError, match=said) as error:
        read_profile(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250


def test_a_file_that_is_missing_or_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json: cannot be read: No such file"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        read_profile(tmp_path)


def test_a_profile_replaces_profiles_of_any_format_alone(path: Path) -> None:
    check_profile_place(path)
    path.write_text(json.dumps({**WRITTEN, "format": 99}))
    check_profile_place(path)
    path.write_text("my notes")
    for place in (path, path.parent):
        with pytest.raises(OutputError, match="expected a new file or a profile to replace, got something else"):
            check_profile_place(place)
    with pytest.raises(OutputError, match="cannot write here: No such file or directory"):
        check_profile_place(path.parent / "none" / "machine.json")
    assert path.read_text() == "my notes"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_replay_takes_the_time_that_follows_from_its_moves(trace_of: Callable[..., Trace]) -> None:
    # pages of 2 tokens and 20 bytes, three on the GPU, and each prompt with its next token needs three. The second
    # pushes two full pages down (the third was empty); the third brings them up and pushes two others down.
    layers = (AttentionLayerConfig(0, (BufferConfig("key", 20),)),)
    config = KVCacheManagerConfig(2, layers, (GpuCacheTierConfig(60), HostCacheTierConfig(400)))
    trace = trace_of([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4, 9]], 2)
    totals = replay(trace, config, bandwidths=BandwidthProfile(7, 8, 16, 1, 1)).totals
    assert totals.usable_hit_tokens == 4
    moves = [
        (each.source_tier, each.tier, each.num_slots, each.seconds) for each in totals.moved or () if each.num_slots
    ]
    assert sorted(moves) == [("gpu", "host", 4, 80 / 8), ("host", "gpu", 2, 40 / 16)]
    assert ReplayTotals.from_json(totals.to_json()) == totals


def test_the_cost_model_copies_as_fast_as_the_profile_says() -> None:
    machine = MachineProfile("Some GPU", BandwidthProfile(gpu_bytes_per_second=1e9), ())
    cost = prefill_cost(load_model("nemotron-h-8b"), device=with_copies_of(H100, machine))
    assert cost.device.name == "H100 SXM with the copies of Some GPU"
    assert cost.copy_seconds == pytest.approx(10e-6 + 0.102137856)  # 102,137,856 bytes at 1 GB/s, after the launch
    assert cost.write_seconds == pytest.approx(0.051068928)


@pytest.mark.parametrize("device", [None, "Some GPU whose copies failed"])
def test_without_copies_on_a_gpu_in_the_profile_the_device_stays_as_it_is(device: str | None) -> None:
    machine = MachineProfile(device, BandwidthProfile(to_disk_bytes_per_second=1.0), ("gpu_bytes_per_second",))
    assert with_copies_of(H100, machine) == H100
