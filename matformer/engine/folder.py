"""The run folder: who owns it, and whether a run begins, goes on, or was finished. Only global rank 0 opens one."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from matformer.config.load import changed_keys, load_run, save_resolved
from matformer.config.schema import RunConfig
from matformer.errors import ConfigError

log = logging.getLogger(__name__)

KEYS_WITHOUT_EFFECT_ON_NUMBERS = "run."


class State(StrEnum):
    """What `RunFolder.open` found. CHANGED: the config differs and run.resume=branch lets it go on here."""

    NEW = "new"
    RESUME = "resume"
    FINISHED = "finished"
    CHANGED = "changed"


@dataclass
class RunFolder:
    """A run's files; a context manager that holds the folder's lock until `close`.

    The lock is the kernel's (flock), so that a killed owner leaves none behind.
    """

    path: Path
    state: State
    changed: tuple[str, ...] = ()
    _lock: IO[str] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, config: RunConfig) -> RunFolder:
        """Own folder/name of this config and say where it stands.

        Raises ConfigError where another live process owns it, where the config changed in a key other than run.*
        without run.resume=branch, or where the folder cannot be written.
        """
        path = Path(config.run.folder, config.name)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path / "lock")
        except OSError as error:
            raise _unwritable(path, error=error) from None
        folder = cls(path, State.NEW, _lock=lock)
        try:
            folder._settle(config)
        except OSError as error:
            folder.close()
            raise _unwritable(path, error=error) from None
        except ConfigError:
            folder.close()
            raise
        return folder

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def report_file(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of samples."""
        return self.path / "samples"

    @property
    def finished_marker(self) -> Path:
        """Stands when the last step is done and everything is written."""
        return self.path / "finished"

    def mark_finished(self) -> None:
        """Say that nothing is left to do; the next `open` with the same config is FINISHED."""
        self.finished_marker.touch()

    def close(self) -> None:
        """Give the folder back; twice is harmless."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _settle(self, config: RunConfig) -> None:
        """Compare with the config that stands here, then write this one."""
        if self.config_file.exists():
            self._compare(config)
        if self.state is not State.FINISHED:
            self.checkpoints.mkdir(exist_ok=True)
            self.samples.mkdir(exist_ok=True)
            save_resolved(config, self.config_file)

    def _compare(self, config: RunConfig) -> None:
        changed = [
            key
            for key in changed_keys(load_run(self.config_file), config)
            if not key.startswith(KEYS_WITHOUT_EFFECT_ON_NUMBERS)
        ]
        if not changed:
            self.state = State.FINISHED if self.finished_marker.exists() else State.RESUME
            return
        if config.run.resume != "branch":
            raise ConfigError(
                f"{self.path} must go on with the config it began with, got other values for {', '.join(changed)}; "
                "take them back, change name, or set run.resume=branch"
            )
        log.warning("%s goes on with other values for %s", self.path, ", ".join(changed))
        self.state, self.changed = State.CHANGED, tuple(changed)
        self.finished_marker.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """The open lock file, held by this process. Raises ConfigError while another process holds it."""
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"{path.parent} must have one owner, got a second while {owner} is running; wait for it, or change name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _unwritable(path: Path, *, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} must be a folder that can be written, got: {error.strerror or error}; change run.folder"
    )
