"""Documents made fit for packing: markup off, exact duplicates out, long ones cut at a line end."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterable, Iterator

from data_prep.records import Document

MARKUP = re.compile(r"<!--.*?-->|<[^>]+>", re.DOTALL)
CREDITS = re.compile(r"<info\b.*?</info>", re.DOTALL)
GAPS = re.compile(r"[ \t]*\n\s*")
MAX_BYTES = 8192


def strip_markup(page: str) -> str:
    """Text of an XML page, a line a block; the `<info>` part with its authors' names and addresses goes."""
    bare = html.unescape(MARKUP.sub("", CREDITS.sub("", page)))
    return GAPS.sub("\n", bare).strip()


def without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """The first of every text, byte for byte; empty ones go too."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            yield document


def cut(text: bytes, *, max_bytes: int = MAX_BYTES) -> list[bytes]:
    """Parts of at most `max_bytes` whose concatenation is the text: after a line end, else between characters."""
    parts = []
    start = 0
    while len(text) - start > max_bytes:
        end = text.rfind(b"\n", start, start + max_bytes) + 1
        if end <= start:
            end = start + max_bytes
            while end > start + 1 and text[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                end -= 1
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
