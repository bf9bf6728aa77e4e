import os
import time
from pathlib import Path

import pytest

from edgeke.device.energy import Counter
from edgeke.device.errors import DeviceError
from edgeke.device.quota import cpu_quota


def test_no_quota_changes_nothing(tmp_path: Path):
    with cpu_quota(None, tmp_path / "missing"):
        pass


def test_a_machine_without_control_groups_says_so(tmp_path: Path):
    with (
        pytest.raises(DeviceError, match="quota is not permitted here"),
        cpu_quota(0.5, tmp_path / "x"),
    ):
        pass


@pytest.mark.parametrize("second", [False, True])
def test_what_is_written(tmp_path: Path, second):
    if second:
        (tmp_path / "cgroup.controllers").touch()
    above = tmp_path if second else tmp_path / "cpu"
    above.mkdir(exist_ok=True)
    group = above / f"edgeke-{os.getpid()}"
    with cpu_quota(0.5, tmp_path):
        assert (group / "cgroup.procs").read_text() == str(os.getpid())
        if second:
            assert (group / "cpu.max").read_text() == "2500 5000"
        else:
            assert (group / "cpu.cfs_quota_us").read_text() == "2500"
    assert (above / "cgroup.procs").read_text() == str(os.getpid())


def test_a_small_quota_keeps_its_share(tmp_path: Path):
    """Linux takes no quota below a millisecond: the period grows instead."""
    (tmp_path / "cgroup.controllers").touch()
    with cpu_quota(0.1, tmp_path):
        written = (tmp_path / f"edgeke-{os.getpid()}" / "cpu.max").read_text()
    assert written == "1000 10000"


def test_a_quota_holds_the_process_to_its_share():
    try:
        with cpu_quota(0.25):
            started, used = time.perf_counter(), time.process_time()
            while time.perf_counter() - started < 1:
                pass
            share = (time.process_time() - used) / (time.perf_counter() - started)
    except DeviceError as error:
        pytest.skip(str(error))
    assert share < 0.5


def test_energy_is_counted_where_there_is_a_counter(tmp_path: Path):
    assert not Counter(tmp_path).available
    for number in range(2):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "energy_uj").write_text("1500000\n")
    assert Counter(tmp_path).available
    assert Counter(tmp_path).joules() == 3.0
