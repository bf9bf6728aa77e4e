"""A share of the processor, as a slower board would have it: Linux control groups."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgeke.device.errors import DeviceError

__all__ = ["cpu_quota"]

# Microseconds. Short periods slow a call down rather than stop and go; less quota Linux refuses.
_PERIOD = 5000
_LEAST = 1000
_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def cpu_quota(share: float | None, root: Path = _ROOT) -> Iterator[None]:
    """Hold this process to `share` of one core's time while inside; None changes nothing.

    Errors: DeviceError where the machine does not permit it (Linux, and root or a delegated control
    group, are needed).
    """
    if share is None:
        yield
        return
    second = (root / "cgroup.controllers").is_file()
    above = root if second else root / "cpu"
    group = above / f"edgeke-{os.getpid()}"
    try:
        group.mkdir()
        try:
            period = max(_PERIOD, round(_LEAST / share))
            quota = round(share * period)
            if second:
                (group / "cpu.max").write_text(f"{quota} {period}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        raise DeviceError(
            f"a processor quota is not permitted here ({error}); run as root on Linux, or leave "
            "the quota out of evaluate.tiers"
        ) from error
    try:
        yield
    finally:
        (above / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):  # empty groups vanish with the container
            group.rmdir()
