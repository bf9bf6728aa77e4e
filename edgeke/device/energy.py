"""Energy counters, where the machine has them: Intel's and AMD's RAPL through Linux powercap."""

from pathlib import Path

__all__ = ["Counter"]

_ROOT = Path("/sys/class/powercap")


class Counter:
    """Joules that all processor packages used; `available` says whether they are counted."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._files = [folder / "energy_uj" for folder in sorted(root.glob("intel-rapl:?"))]
        self.available = self._read() is not None

    def joules(self) -> float:
        """The counter now. It wraps after minutes to hours: take differences of short spans."""
        return self._read() or 0.0

    def _read(self) -> float | None:
        try:
            return sum(int(file.read_text()) for file in self._files) / 1e6 if self._files else None
        except (OSError, ValueError):  # newer kernels let only root read it
            return None
