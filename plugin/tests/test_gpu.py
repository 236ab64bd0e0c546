"""GPUs as the NVIDIA driver and its library list them, from made-up listings; who has which of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plugin.tests.played_nvml import Card, PlayedNvml
from sparkgauge import discovery, gpu, lease, nvml
from sparkgauge.errors import ConfigurationError, MachineError
from sparkgauge.gpu import Gpu

INFORMATION = """Model: \t\t {model}
IRQ:   \t\t 112
GPU UUID: \t {uuid}
Video BIOS: \t 84.02.8b.00.01
Bus Type: \t PCIe
Bus Location: \t {bus}
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a driver that knows two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for bus, model, uuid in (("0000:5e:00.0", "NVIDIA L4", "GPU-bbbb-2"), ("0000:3b:00.0", "Tesla M60", "GPU-aaaa-1")):
        folder = tmp_path / "gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text(INFORMATION.format(model=model, uuid=uuid, bus=bus))
    return tmp_path


def test_gpus_are_listed_in_the_order_of_their_bus(driver: Path) -> None:
    assert gpu.detect(driver) == (
        gpu.Gpu(0, "Tesla M60", "GPU-aaaa-1", "0000:3b:00.0"),
        gpu.Gpu(1, "NVIDIA L4", "GPU-bbbb-2", "0000:5e:00.0"),
    )


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        (" 1 , 0 ", [0, 1]),
        ("GPU-bbbb", [1]),
        ("GPU-aaaa-1,GPU-bbbb-2", [0, 1]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("2,0", []),
        ("01", []),
        ("MIG-cccc", []),
        ("NoDevFiles", []),
        ("0,,1", [0]),
    ],
)
def test_cuda_visible_devices_hides_what_it_does_not_name(
    visible: str, indices: list[int], driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [one.index for one in gpu.detect(driver)] == indices


def test_a_listing_without_names_still_counts(driver: Path) -> None:
    (driver / "gpus" / "0000:3b:00.0" / "information").write_bytes(b"\xff\xfe nothing known\n")
    assert gpu.detect(driver)[0] == gpu.Gpu(0, "unknown", "", "0000:3b:00.0")


def test_why_there_is_none(tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.why_none(tmp_path / "missing") == "no NVIDIA driver is loaded (/proc/driver/nvidia is missing)"
    (tmp_path / "empty" / "gpus").mkdir(parents=True)
    assert gpu.why_none(tmp_path / "empty") == "the NVIDIA driver lists no GPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu.why_none(driver) == "CUDA_VISIBLE_DEVICES='-1' hides all GPUs"


@pytest.mark.parametrize(("wanted", "enough"), [(1, True), (2, True), (3, False)])
def test_every_executor_needs_a_gpu(wanted: int, enough: bool, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.detect(driver)
    monkeypatch.setattr(gpu, "detect", lambda: found)
    if enough:
        gpu.require(wanted)
    else:
        with pytest.raises(MachineError, match="expected 3 GPUs, got 2"):
            gpu.require(wanted)


def test_without_any_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "detect", lambda: ())
    monkeypatch.setattr(gpu, "why_none", lambda: "there is a reason")
    with pytest.raises(MachineError, match="expected 1 GPU, got none: there is a reason"):
        gpu.require(1)


Play = Callable[..., PlayedNvml]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return a function that puts cards into this machine."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def play(*cards: Card, init_error: int = 0) -> PlayedNvml:
        played = PlayedNvml(*cards, init_error=init_error)
        monkeypatch.setitem(sys.modules, "pynvml", played)
        return played

    return play


def test_the_library_tells_memory_driver_and_who_is_on_it(play: Play) -> None:
    played = play(Card(), Card(uuid="GPU-bbbb-2", name="NVIDIA L4", used=70 * 2**30, processes=2, mig=[]))
    first, second = gpu.detect()
    assert (first.index, first.name, first.uuid, first.mig) == (0, "NVIDIA H100 80GB HBM3", "GPU-aaaa-1", None)
    assert (first.memory_bytes, first.driver, first.cuda) == (80 * 2**30, "580.159.04", "13.0")
    assert (second.index, second.mig, second.process_count) == (1, False, 2)
    assert gpu.busy(first) == "" and gpu.busy(second) == "1: NVIDIA L4, 70.0 of 80.0 GiB in use by 2 processes"
    assert gpu.describe(first) == "0: NVIDIA H100 80GB HBM3, 80 GiB, driver 580.159.04"
    assert played.opened == 0


def test_of_a_card_in_parts_only_the_parts_are_there(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Card(uuid=f"MIG-{n}", name="NVIDIA H100 MIG 1g.10gb", total=10 * 2**30) for n in "cd"]
    play(Card(), Card(uuid="GPU-bbbb-2", mig=parts))
    assert [(one.index, one.uuid, one.mig) for one in gpu.detect()] == [
        (0, "GPU-aaaa-1", None),
        (1, "MIG-c", True),
        (1, "MIG-d", True),
    ]
    for visible, uuids in (("MIG-d", ["MIG-d"]), ("1", ["MIG-c"]), ("GPU-a,MIG-d", ["GPU-aaaa-1", "MIG-d"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [one.uuid for one in gpu.detect()] == uuids == list(gpu.visible_uuids())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (12, "the driver's library libnvidia-ml.so is not installed"),
        (9, "the NVIDIA driver is installed but not loaded"),
        (4, "this user may not talk to the NVIDIA driver"),
        (18, "the NVIDIA driver was updated, its old module is still loaded"),
        (999, "NVIDIA's management library says: error 999"),
    ],
)
def test_why_the_library_cannot_be_asked(error: int, reason: str, play: Play) -> None:
    play(init_error=error)
    with pytest.raises(nvml.NvmlError, match=f"^{reason}"):
        nvml.devices()


def test_the_real_library_without_a_driver_says_so() -> None:
    pytest.importorskip("pynvml")
    if gpu.DRIVER_FOLDER.exists():
        pytest.skip("there is a driver here")
    with pytest.raises(nvml.NvmlError, match=r"libnvidia-ml\.so is not installed"):
        nvml.devices()


def test_without_the_package_the_drivers_files_tell(monkeypatch: pytest.MonkeyPatch, driver: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(gpu, "DRIVER_FOLDER", driver)
    with pytest.raises(nvml.NvmlError, match="nvidia-ml-py is not installed"):
        nvml.devices()
    assert [one.name for one in gpu.detect(driver)] == ["Tesla M60", "NVIDIA L4"]
    assert gpu.address(gpu.detect(driver)[0]) == "GPU-aaaa-1"
    for folder in (driver / "gpus").iterdir():  # a container shows the driver whole, and gives no device file
        file = folder / "information"
        file.write_text(file.read_text() + "Device Minor: \t 4711\n")
    assert gpu.detect(driver) == ()
    assert gpu.why_none(driver) == (
        "the NVIDIA driver has GPUs, but this container has no /dev/nvidia0: start it with --gpus all"
    )


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"sys/bus/pci/devices/0/class": "0x030200", "sys/bus/pci/devices/0/vendor": "0x10de"}, "an NVIDIA GPU is on"),
        ({"sys/bus/pci/devices/0/class": "0x038000", "sys/bus/pci/devices/0/vendor": "0x1002"}, "an AMD GPU is here"),
        ({"dev/kfd": ""}, "an AMD GPU is here"),
        ({"sys/class/drm/card0/device/vendor": "0x8086"}, "no NVIDIA driver is loaded .*; the Intel GPU is not supp"),
        (
            {"sys/bus/pci/devices/0/class": "0x020000", "sys/bus/pci/devices/0/vendor": "0x10de"},
            r"no NVIDIA driver .* is missing\)$",
        ),
    ],
)
def test_what_there_is_in_place_of_a_driver(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert re.match(reason, gpu.why_none(tmp_path / "missing", tmp_path))


@pytest.mark.parametrize(
    ("executors", "per_executor", "gpus", "shares", "needed", "fitting"),
    [
        (1, 1.0, "ab", ["a"], 1, 1),
        (2, 1.0, "ab", ["a", "b"], 2, 2),
        (2, 1.0, "a", ["a", "a"], 2, 1),
        (2, 2.0, "abcd", ["ab", "cd"], 4, 2),
        (2, 0.5, "a", ["a", "a"], 1, 2),
        (4, 0.5, "ab", ["a", "a", "b", "b"], 2, 4),
        (3, 0.34, "ab", ["a", "a", "b"], 2, 3),
    ],
)
def test_shares(executors: int, per_executor: float, gpus: str, shares: list[str], needed: int, fitting: int) -> None:
    assert gpu.plan(list(gpus), executors, per_executor) == tuple(tuple(share) for share in shares)
    assert gpu.needed(executors, per_executor) == needed
    assert gpu.fitting(executors, len(gpus), per_executor) == fitting


def test_a_process_is_shown_its_own_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    gpu.expose(["GPU-b"])
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("GPU-b", "PCI_BUS_ID")
    gpu.expose([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


def test_every_worker_finds_a_share_of_its_own(tmp_path: Path) -> None:
    script = discovery.write_script(tmp_path / "gpus", [["GPU-a"], ["GPU-b"]], sys.executable)
    said = [json.loads(subprocess.check_output([str(script)], cwd="/")) for _ in range(3)]
    assert [one["name"] for one in said] == ["gpu"] * 3
    assert [one["addresses"] for one in said] == [["GPU-a"], ["GPU-b"], []]


def test_discovery_without_a_plan_prints_what_is_visible(
    play: Play, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play(Card(), Card(uuid="GPU-bbbb-2"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert discovery.main([]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "gpu", "addresses": ["GPU-bbbb-2"]}


def test_played_gpus_stand_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listing = tmp_path / "gpus.json"
    monkeypatch.setenv(nvml.PLAYED_VARIABLE, str(listing))
    listing.write_text('[{"name": "A card", "power_watts": 250.0}, {"uuid": "GPU-x", "used_bytes": 5}]')
    assert [(one.index, one.uuid, one.used_bytes) for one in gpu.detect()] == [
        (0, "GPU-played-0", None),
        (1, "GPU-x", 5),
    ]
    assert nvml.probe("GPU-played-0").read().power_watts == 250.0
    for bad in ("{", "[1]", '[{"colour": "red"}]'):
        listing.write_text(bad)
        with pytest.raises(ConfigurationError, match="Bad file in SPARKGAUGE_FAKE_GPUS"):
            gpu.detect()


def two(*, used: int = 0) -> tuple[Gpu, ...]:
    return tuple(Gpu(n, "A card", f"GPU-{n}", memory_bytes=100, used_bytes=used) for n in range(2))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "detect", two)


@pytest.mark.usefixtures("cards")
def test_a_leased_gpu_is_nobody_elses_until_it_is_given_back(tmp_path: Path) -> None:
    first = lease.lease(1, folder=tmp_path, wait_seconds=0)
    second = lease.lease(1, folder=tmp_path, wait_seconds=0)
    assert (first.addresses, second.addresses) == (["GPU-0"], ["GPU-1"])
    with pytest.raises(
        MachineError, match=f"All GPUs are busy: expected 1 idle GPU, got 0: A card, leased by process {os.getpid()}"
    ):
        lease.lease(1, folder=tmp_path, wait_seconds=0)
    first.release()
    first.release()
    with pytest.raises(MachineError, match="Too few idle GPUs: expected 2 idle GPUs"):
        lease.lease(2, folder=tmp_path, wait_seconds=0)
    assert lease.lease(1, folder=tmp_path, wait_seconds=0).addresses == ["GPU-0"]


@pytest.mark.usefixtures("cards")
def test_a_killed_owner_loses_its_gpus(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sparkgauge import gpu, lease\n"
        "from plugin.tests.test_gpu import two\n"
        "gpu.detect = two\n"
        "held = lease.lease(2, folder=Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner, owner.stdout:
        assert owner.stdout.readline() == "held\n"
        said: list[str] = []
        with pytest.raises(MachineError, match=f"leased by process {owner.pid}"):
            lease.lease(1, folder=tmp_path, wait_seconds=0.1, say=said.append)
        assert len(said) == 1 and said[0].startswith("waiting for a GPU: 0: A card")
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert len(lease.lease(2, folder=tmp_path, wait_seconds=0).gpus) == 2


def test_busy_gpus_are_left_alone_unless_sharing_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "detect", lambda: two(used=90))
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"All GPUs are busy: .*0: A card, 0\.0 of 0\.0 GiB in use; 1: A card"):
        lease.lease(1, folder=tmp_path, wait_seconds=0)
    assert time.monotonic() - began < 5
    together = [lease.lease(1, shared=True, folder=tmp_path, wait_seconds=0) for _ in range(2)]
    assert [one.addresses for one in together] == [["GPU-0"]] * 2
