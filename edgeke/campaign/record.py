"""results.json: what a campaign was asked, has measured and has finished; kept up every epoch."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeke.campaign.settings import Settings
from edgeke.campaign.steps import Costs
from edgeke.errors import InputError
from edgeke.files import read_json, write_json

__all__ = ["Record"]


class Record:
    """The content of `folder/results.json`; every change is on disk when the call returns.

    Time used adds up over all calls with the same folder. Errors: InputError when the folder holds
    the results of other settings.
    """

    def __init__(self, folder: Path, settings: Settings, begun: dict[str, Any]) -> None:
        self.path = folder / "results.json"
        asked = asdict(settings)
        fresh = {"settings": asked, **begun, "seconds_used": 0.0, "measured": None, "planned": {}}
        fresh |= {"running": None, "steps": {}, "left_out": {}}
        self.content: dict[str, Any] = read_json(self.path) if self.path.exists() else fresh
        before = self.content["settings"]
        for key, value in asked.items():
            if before.get(key) != value:
                raise InputError(
                    f"{self.path} was begun with {key} = {before.get(key)!r}, now {value!r}; give "
                    "the same command to go on, or another --out to begin anew"
                )
        self.before, self.started = self.content["seconds_used"], time.monotonic()

    @property
    def used(self) -> float:
        """Seconds of all calls so far."""
        return float(self.before + time.monotonic() - self.started)

    @property
    def planned(self) -> dict[str, int]:
        """Epochs given to each step, once decided."""
        planned: dict[str, int] = self.content["planned"]
        return planned

    @property
    def steps(self) -> dict[str, Any]:
        """Results by finished step."""
        steps: dict[str, Any] = self.content["steps"]
        return steps

    @property
    def costs(self) -> Costs | None:
        """What was measured, None before."""
        measured = self.content["measured"]
        return measured and Costs(measured["seconds_per_epoch"], measured["seconds_to_start"])

    def write(self, **changes: Any) -> None:
        """Change top-level keys and write everything."""
        self.content |= {**changes, "seconds_used": round(self.used, 3)}
        write_json(self.path, self.content)

    def plan(self, epochs: dict[str, int]) -> None:
        """Fix the epochs of steps."""
        self.write(planned={**self.planned, **epochs})

    def leave_out(self, names: list[str], reason: str) -> None:
        """Say which steps are not run, and why."""
        self.write(left_out={**self.content["left_out"], **dict.fromkeys(names, reason)})

    def begin(self, step: str) -> float:
        """Note the step in progress; returns the seconds it has used in calls before."""
        running = self.content["running"]
        if not running or running["step"] != step:
            self.write(running={"step": step, "seconds": 0.0, "epoch": 0, "row": {}})
        return float(self.content["running"]["seconds"])

    def progress(self, epoch: int, row: dict[str, float], seconds: float) -> None:
        """Note an epoch of the step in progress."""
        running = self.content["running"]
        self.write(running={**running, "seconds": seconds, "epoch": epoch, "row": row})

    def finish(self, step: str, result: dict[str, Any]) -> None:
        """Note a finished step."""
        self.write(running=None, steps={**self.steps, step: result})
