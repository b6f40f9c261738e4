"""The figures of a run: metrics.jsonl, and the same as events for TensorBoard in tensorboard/."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from astrolabe_jax.runtime import multihost
from astrolabe_jax.runtime.files import read_jsonl, write_atomic, writing

# protobuf makes these classes at run time, unseen by pyright
_Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
_SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class Metrics:
    """The records of a run, one JSON object a line.

    A record that was added is on the disk, so that a checkpoint that follows it never outlives it.
    Process 0 reads and writes. All processes call what is here, and have the same `records`.

    Attributes:
      records: in the order in which they were added; each has `kind` and `epoch`.
      dropped: how many records of epochs were there that are not kept.
    """

    def __init__(self, workdir: Path, epoch: int, keep: Callable[[dict], bool]):
        """Go on after `epoch` finished epochs, with the records for which `keep` is true.

        The others, of a piece of the run that was lost, are dropped.
        """
        self._path = workdir / "metrics.jsonl"
        self._events_path = workdir / "tensorboard"
        self._events: EventsWriter | None = None  # on process 0
        self.records: list[dict]
        self.dropped: int
        self.records, self.dropped = multihost.on_primary(lambda: self._open(epoch, keep))

    def _open(self, epoch: int, keep: Callable[[dict], bool]) -> tuple[list[dict], int]:
        there = [
            record
            for record in read_jsonl(self._path)
            if (type(record.get("kind")), type(record.get("epoch"))) == (str, int)
        ]
        records = list(filter(keep, there))
        dropped = sum(record["kind"] == "epoch" and not keep(record) for record in there)
        write_atomic(self._path, "".join(_line(record) for record in records).encode())
        with writing(self._events_path):
            self._events_path.mkdir(parents=True, exist_ok=True)
            # not SummaryWriter: on a full disk that hangs
            self._events = EventsWriter(str(self._events_path / "events"))
            # Events of an earlier piece are void from here on.
            start = _SessionLog(status=_SessionLog.START)
            self._events.write_event(
                _Event(wall_time=time.time(), step=epoch + 1, session_log=start)
            )
            self._events.flush()
        return records, dropped

    def add(self, record: dict[str, Any]) -> None:
        """Append a record.

        Its numbers become events of its epoch, those of a nested mapping under NAME/INNER. Raises
        ValueError for numbers that are not finite.
        """
        self.records.append(record)
        multihost.on_primary(lambda: self._write(record))

    def _write(self, record: dict[str, Any]) -> None:
        with writing(self._path), open(self._path, "ab") as file:
            file.write(_line(record).encode())
            file.flush()
            os.fsync(file.fileno())
        assert self._events is not None  # process 0 has opened it
        with writing(self._events_path):
            for name, value in _numbers(record):
                summary = scalar(f"{record['kind']}/{name}", value)
                self._events.write_event(
                    _Event(wall_time=time.time(), step=record["epoch"], summary=summary)
                )
            self._events.flush()

    def close(self) -> None:
        """Close the file of events."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # what could not be written has been reported
                self._events.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record with their names, but for its epoch."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and (prefix, name) != ("", "epoch"):
            yield prefix + name, value
