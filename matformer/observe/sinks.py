"""Where rows of numbers go: metrics.jsonl always, wandb by choice."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from matformer.files import write_whole

log = logging.getLogger(__name__)

Row = dict[str, Any]


class Sink(Protocol):
    """Takes the rows of a run; global rank 0 alone has any."""

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Write what is left; twice is harmless."""
        ...


class MetricsFile:
    """metrics.jsonl: one JSON object a line with its `step`, on disk as soon as it is written.

    A number that is not finite is written as null, which is JSON where NaN is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        _cut_torn_line(self.path)
        self._file: IO[str] | None = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row."""
        assert self._file is not None, "a row came after close()"
        values = {name: _finite(value) for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Forget rows of later steps: a resumed run writes them again. The file is replaced whole."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self.close()
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        """See Sink."""
        if self._file is not None:
            self._file.close()
            self._file = None


class WandbSink:
    """Weights & Biases, its folder inside the run's; whatever goes wrong there is one warning and no more rows."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        config: Mapping[str, Any],
        mode: Literal["offline", "online", "disabled"] = "offline",
    ) -> None:
        self._run = None if mode == "disabled" else _begin_wandb(folder, name=name, config=config, mode=mode)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """See Sink; rows of one step that follow each other become one."""
        if self._run is not None:
            self._try(lambda run: run.log(dict(row), step=step))

    def close(self) -> None:
        """See Sink."""
        if self._run is not None:
            self._try(lambda run: run.finish())
            self._run = None

    def _try(self, action: Callable[[Any], object]) -> None:
        """wandb's own process may be gone at any time: a signal to the whole job ends it, too."""
        trouble = _wandb_trouble()
        try:
            action(self._run)
        except trouble as error:
            self._run = None
            log.warning("wandb gets no more rows, it failed: %s", _said(error))
            import wandb  # noqa: PLC0415

            with suppress(*trouble):  # what it would do when the program ends, with a traceback
                wandb.teardown()


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics file in their order; a line that is no row (torn by a crash) is left out and named."""
    rows: list[Row] = []
    if not path.is_file():
        return rows
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            log.warning("line %d of %s is no row of metrics; it is left out", number, path)
    return rows


def _lines(path: Path) -> Iterable[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.split("\n") if line]


def _cut_torn_line(path: Path) -> None:
    """Drop what stands after the last line's end, so that the next row begins on a line of its own."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        log.warning("the last line of %s is torn; it is left out", path)
        os.truncate(path, whole)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _begin_wandb(folder: Path, *, name: str, config: Mapping[str, Any], mode: Literal["offline", "online"]) -> Any:
    """A wandb run, or None after one warning: the numbers are in metrics.jsonl all the same."""
    try:
        import wandb  # noqa: PLC0415 - takes a second, and a run with it disabled needs none of it
    except ImportError as error:
        log.warning("wandb is not used, it cannot be imported: %s", error)
        return None
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", init_timeout=60)
    try:
        return wandb.init(
            project="matformer", name=name, dir=str(folder), config=dict(config), mode=mode, settings=settings
        )
    except _wandb_trouble() as error:
        log.warning("wandb is not used, it did not start: %s", _said(error))
        return None


def _wandb_trouble() -> tuple[type[Exception], ...]:
    """What wandb raises when it fails: its own errors, and those of the socket and the mailbox of its process."""
    import wandb  # noqa: PLC0415
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # noqa: PLC0415

    return (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
