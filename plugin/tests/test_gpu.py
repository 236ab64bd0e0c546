"""GPUs as the NVIDIA driver lists them, from made-up listings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkgauge import gpu
from sparkgauge.errors import MachineError

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
