"""Speech at 8 kHz with its words: recorded telephone prompts in five languages, and synthesised names of emoji."""

from __future__ import annotations

import ctypes
import gzip
import io
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float

from data_prep.archives import can_open, members
from data_prep.records import Picture, Sound, number_of
from matformer.autoencoders.sound import levelled, resampled, trimmed

log = logging.getLogger(__name__)

SAMPLE_RATE = 8000
SYNCHRONOUS = 2  # eSpeak hands the samples to a callback before its call returns
DIRECTION = re.compile(r"\s*\[[^\]]*\]\s*")
VOICES = {
    "en": "en-us",
    "fr": "fr",
    "de": "de",
    "es": "es",
    "it": "it",
    "pt": "pt",
    "ru": "ru",
    "zh": "cmn",
    "ja": "ja",
    "ko": "ko",
    "hi": "hi",
    "pl": "pl",
}
ENGLISH_CLIPS, OTHER_CLIPS, MAX_CHARACTERS = 1600, 2400, 48


def all_prompts(files: dict[str, Path]) -> Iterator[Sound]:
    """Recorded prompts of every language whose two packages (words, sounds) are there."""
    for spec in files:
        match = re.fullmatch(r"asterisk-core-sounds-(\w+)-gsm", spec)
        words = files.get(spec.removesuffix("-gsm"))
        if match and words and can_open(words):
            yield from prompts(words, sounds=files[spec], language=match.group(1))


def prompts(words: Path, *, sounds: Path, language: str) -> Iterator[Sound]:
    """One language's prompts; the same name in another language is the same concept."""
    texts: dict[str, str] = {}
    for _, data in members(words, suffix=f"/core-sounds-{language}.txt.gz"):
        texts |= _transcript(gzip.decompress(data).decode("utf-8-sig"))
    for path, data in members(sounds, suffix=".gsm"):
        voice, name = path.split("/sounds/", 1)[1].removesuffix(".gsm").split("/", 1)
        if texts.get(name):
            wave, _ = soundfile.read(
                io.BytesIO(data), format="RAW", subtype="GSM610", channels=1, samplerate=SAMPLE_RATE, dtype="float32"
            )
            wave = trimmed(wave)
            if not len(wave):
                continue
            yield Sound(
                key=f"asterisk-{language}-{re.sub('[^A-Za-z0-9-]', '_', name)}",
                concept=f"prompt:{name}",
                base=f"prompt:{name}",
                style=voice,
                group=f"prompt/{name.split('/')[0] if '/' in name else 'general'}",
                source=f"asterisk-core-sounds-{language}-gsm",
                texts={language: texts[name]},
                wave=levelled(wave),
            )


def spoken_names(pictures: Iterable[Picture]) -> Iterator[Sound]:
    """Names of pictures, spoken by a synthesiser in twelve languages; none without the package espeakng-loader."""
    try:
        import espeakng_loader  # noqa: PLC0415  an optional part: the demo goes on without it
    except ImportError:
        log.info("espeakng-loader is not installed here: doing without synthesised speech")
        return
    synthesiser = _Synthesiser(Path(espeakng_loader.get_library_path()), data=Path(espeakng_loader.get_data_path()))
    for picture, language in _to_be_spoken(pictures):
        second = bool(number_of(picture.concept + language) % 2)
        voice = VOICES[language] + ("+f3" if second else "")
        wave = trimmed(synthesiser.speak(picture.texts[language], voice=voice))
        if len(wave):
            yield Sound(
                key=f"spoken-{language}-{picture.concept.lower()}",
                concept=picture.concept,
                base=picture.base,
                style=f"espeak {voice}",
                group=picture.group,
                source="espeakng-loader",
                texts={language: picture.texts[language]},
                wave=levelled(resampled(wave, rate=synthesiser.sample_rate, to=SAMPLE_RATE)),
            )


def _to_be_spoken(pictures: Iterable[Picture]) -> list[tuple[Picture, str]]:
    """Short names, one a concept and language: a fixed number of English ones and of all others together."""
    concepts = {picture.concept: picture for picture in pictures}
    pairs = [
        (picture, language)
        for picture in concepts.values()
        for language, text in picture.texts.items()
        if language in VOICES and len(text) <= MAX_CHARACTERS
    ]
    pairs.sort(key=lambda pair: number_of(f"speak:{pair[0].concept}:{pair[1]}"))
    english = [pair for pair in pairs if pair[1] == "en"][:ENGLISH_CLIPS]
    return english + [pair for pair in pairs if pair[1] != "en"][:OTHER_CLIPS]


def _transcript(text: str) -> dict[str, str]:
    """`name: words` a line, `;` comments, `[stage directions]`."""
    lines = (line for line in text.splitlines() if ":" in line and not line.startswith(";"))
    pairs = (line.split(":", 1) for line in lines)
    return {name.strip(): DIRECTION.sub(" ", words).strip() for name, words in pairs}


class _Synthesiser:
    """eSpeak NG in this process. Its library speaks through a C callback; one instance a process."""

    def __init__(self, library: Path, *, data: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._chunks: list[np.ndarray] = []
        self.sample_rate: int = self._library.espeak_Initialize(SYNCHRONOUS, 0, str(data).encode(), 0)
        shape = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = shape(self._receive)  # kept alive: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, *, voice: str) -> Float[np.ndarray, " samples"]:
        """The words at full scale 1 and `sample_rate`; empty where the voice has no sound for them."""
        self._chunks.clear()
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # else its breath noise depends on who else draws numbers
        self._library.espeak_SetVoiceByName(voice.encode())
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, 1, None, None)  # 1, 1: characters, UTF-8
        self._library.espeak_Synchronize()
        return np.concatenate(self._chunks).astype(np.float32) / 32768 if self._chunks else np.zeros(0, np.float32)
