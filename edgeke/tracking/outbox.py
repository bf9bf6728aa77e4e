"""What a stage tells the store: sent at once, kept on disk while the store is away, sent later.

A message is a JSON object that may be sent twice without harm. `to` says whether it is for the
stage's own run (`child`) or the pipeline state's (`parent`):

    {"to": "child", "metrics": [[key, value, milliseconds, step], ...]}
    {"to": "parent", "tags": {key: value}}
    {"to": "child", "end": status, "at": milliseconds}

An outbox file holds one JSON object per line: the address first, then messages in their order.
"""

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeke.files import write_text
from edgeke.tracking import processes
from edgeke.tracking.store import folder, locked, reason, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Address", "Create", "Message", "Outbox", "resend"]

Message = Mapping[str, Any]

_RETRY_SECONDS = 30.0  # between attempts while a stage runs,
_RETRY_FACTOR = 20.0  # or this many times what the last one took: one that hangs takes a minute
_BATCH = 1000  # metrics, MLflow's limit for one call


@dataclass
class Address:
    """Where messages go: a store, and the runs in it; runs are None until they could be created.

    `process` is whose messages they are, `wanted` is what `create` needs to make the runs.
    """

    uri: str
    process: str
    parent: str | None
    child: str | None
    wanted: dict[str, Any]


Create = Callable[["MlflowClient", Address], None]


class Outbox:
    """The messages of one stage. Never raises for a store that is away; safe between threads.

    `client` None: the store was away from the start. `create` makes the runs of an address that has
    none, and writes their ids into it.
    """

    def __init__(
        self,
        client: "MlflowClient | None",
        address: Address,
        root: Path,
        create: Create,
    ) -> None:
        self.client, self.address, self.root, self.create = client, address, root, create
        self.path = _outbox(root) / f"{address.child or uuid.uuid4().hex}.jsonl"
        self.kept = 0
        self.lost = 0
        self._tried, self._took = time.monotonic(), 0.0
        self._lock = threading.Lock()

    def post(self, message: Message) -> None:
        """Send a message, or keep it while the store is away."""
        with self._lock:
            if self.client is not None and not self.kept:
                began = time.monotonic()
                try:
                    _deliver(self.client, self.address, message)
                    return
                except Exception as error:  # MLflow passes on whatever its store raises
                    self._failed(began)
                    _warn(
                        f"the tracking store stopped answering ({reason(error)}); the stage goes "
                        f"on, its messages are kept in {self.path} and sent when the store is back"
                    )
            self._keep(message)
            wait = max(_RETRY_SECONDS, _RETRY_FACTOR * self._took)
            if self.client is not None and time.monotonic() - self._tried > wait:
                self._flush()

    def close(self) -> None:
        """Try once more to send what was kept, and say what was not sent."""
        with self._lock:
            if self.kept and self.client is not None:
                self._flush()
            if self.kept:
                _warn(
                    f"{self.kept} messages to the tracking store are kept in {self.path}; the next "
                    "stage or `make resend` sends them"
                )
            if self.lost:
                _warn(
                    f"{self.lost} messages to the tracking store were lost: it does not answer, "
                    f"and {self.path} cannot be written"
                )

    def _keep(self, message: Message) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.kept:
                kept = {**asdict(self.address), "uri": redacted(self.address.uri)}
                write_text(self.path, json.dumps(kept) + "\n")
            with self.path.open("a") as file:
                file.write(json.dumps(message) + "\n")
            self.kept += 1
        except Exception as error:  # a full disk must not stop the training either
            if not self.lost:
                _warn(f"{self.path} cannot be written ({reason(error)})")
            self.lost += 1

    def _failed(self, began: float) -> None:
        self._tried = time.monotonic()
        self._took = self._tried - began

    def _flush(self) -> None:
        began = time.monotonic()
        assert self.client is not None
        try:
            _send_file(self.client, self.root, self.path, self.create)
            self.kept = 0
        except Exception:  # still away
            self._failed(began)
            self.kept = max(1, len(self.path.read_text().splitlines()) - 1)


def resend(client: "MlflowClient", uri: str, root: Path, create: Create) -> tuple[int, int]:
    """Send what earlier stages left for the store `uri`; returns files sent and files that stay.

    Files of processes that still run are theirs to send.
    """
    sent = stay = 0
    for path in sorted(_outbox(root).glob("*.jsonl")):
        try:
            with path.open() as file:
                address = Address(**json.loads(file.readline()))
            if address.uri != redacted(uri) or processes.lives(address.process):
                continue
            _send_file(client, root, path, create)
            sent += 1
        except FileNotFoundError:  # another process was faster
            continue
        except Exception as error:  # the file stays as it is, for another time
            stay += 1
            _warn(f"{path} could not be sent ({reason(error)}); it is kept")
    return sent, stay


def _outbox(root: Path) -> Path:
    return folder(root) / "outbox"


def _send_file(client: "MlflowClient", root: Path, path: Path, create: Create) -> None:
    """Deliver a file's messages in their order and remove it; what remains is kept on failure."""
    with locked(root):
        lines = path.read_text().splitlines()
        address = Address(**json.loads(lines[0]))
        todo = lines[1:]
        try:
            if address.child is None:
                create(client, address)
            while todo:
                count = _joinable(todo)
                _deliver_or_refuse(client, address, todo[:count], path)
                del todo[:count]
        except Exception:
            write_text(path, "\n".join([json.dumps(asdict(address)), *todo]) + "\n")
            raise
        path.unlink()


def _joinable(lines: Sequence[str]) -> int:
    """How many messages at the front can go in one call: metrics of one run, a batch of them.

    A training that logged for a day without a store must not be sent epoch by epoch.
    """
    count = rows = 0
    for line in lines:
        message = _read(line)
        if message is None or set(message) != {"to", "metrics"}:
            break
        rows += len(message["metrics"])
        if count and (rows > _BATCH or message["to"] != json.loads(lines[0])["to"]):
            break
        count += 1
    return max(1, count)


def _deliver_or_refuse(
    client: "MlflowClient", address: Address, lines: Sequence[str], path: Path
) -> None:
    """Deliver joinable lines; one that is cut off or refused for good is set aside, and said so."""
    from mlflow.exceptions import MlflowException

    messages = [_read(line) for line in lines]
    first = messages[0]
    if first is None:  # the process died while it wrote its last line
        _set_aside(path, lines[0], "is cut off")
        return
    joined = dict(first)
    if len(messages) > 1:
        joined["metrics"] = [row for of in messages if of for row in of["metrics"]]
    try:
        _deliver(client, address, joined)
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):
            raise
        if len(lines) == 1:
            _set_aside(path, lines[0], f"is refused ({reason(error)})")
            return
        for line in lines:
            _deliver_or_refuse(client, address, [line], path)


def _read(line: str) -> Message | None:
    try:
        message: Message = json.loads(line)
        return message
    except json.JSONDecodeError:
        return None


def _set_aside(path: Path, line: str, why: str) -> None:
    refused = path.with_suffix(".refused")
    with refused.open("a") as file:
        file.write(line + "\n")
    _warn(f"a message to the tracking store {why}; it is kept in {refused}")


def _deliver(client: "MlflowClient", address: Address, message: Message) -> None:
    from mlflow.entities import Metric, RunTag

    run = address.child if message["to"] == "child" else address.parent
    assert run is not None
    metrics = [Metric(*row) for row in message.get("metrics", ())]
    tags = [RunTag(key, value) for key, value in message.get("tags", {}).items()]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[start : start + _BATCH])
    if tags:
        client.log_batch(run, tags=tags)
    if "end" in message:
        client.set_terminated(run, message["end"], message["at"])


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
