"""A clip → trimmed samples → codes, and their cache."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orpheus.audio import make_folder, read_audio, write_text
from orpheus.clips import Clip, Clips
from orpheus.codec import CODEC_FILES, encode, load_codec
from orpheus.hub import fetch
from orpheus.models import device
from orpheus.settings import Settings, UserError
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    check_labels,
    check_row,
    ids_to_codes,
    read_codes,
)


class Measures(NamedTuple):
    """What the doctor looks at, one clip each."""

    where: str
    voice: str
    text: str
    digest: str = ""  # SHA-256 of the sound as it is encoded
    rate: int = SAMPLE_RATE  # Hz, before resampling
    channels: int = 1
    seconds: float = 0.0  # after trimming
    silence: float = 0.0  # seconds cut off at both ends
    level: float = -20.0  # dB, RMS of full scale
    clipped: float = 0.0  # share of samples at full scale
    offset: float = 0.0  # mean of the samples
    tokens: int = 0  # in its row

    def told(self) -> str:
        return f"{self.where}: {self.seconds:.1f} s, {self.level:.0f} dB, {self.text[:50]!r}"


def edges(audio: np.ndarray, threshold: float) -> tuple[int, int]:
    """(first, last) sample of speech: 10 ms steps within `threshold` dB of the loudest one."""
    step = SAMPLE_RATE // 100
    steps = np.pad(audio, (0, -len(audio) % step)).reshape(-1, step)
    power = (steps.astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-threshold / 10))
    return (0, len(audio)) if not len(loud) else (loud[0] * step, (loud[-1] + 1) * step)


def trim(audio: np.ndarray, settings: Settings) -> np.ndarray:
    """The clip with at most `keep_silence` seconds of silence at either end; null keeps all."""
    if settings.keep_silence is None:
        return audio
    first, last = edges(audio, settings.silence_db)
    keep = int(settings.keep_silence * SAMPLE_RATE)
    return audio[max(first - keep, 0) : last + keep]


def measure_clip(source: Path | bytes, settings: Settings) -> tuple[np.ndarray, dict]:
    """(trimmed samples, what Measures says of them); `UserError` for a sound of no use."""
    whole, rate, channels = read_audio(source)
    audio = trim(whole, settings)
    rms = float(np.sqrt((audio.astype(np.float64) ** 2).mean()))
    if rms < 1e-4:  # -80 dB
        raise UserError(
            f"{'its audio' if isinstance(source, bytes) else source}: silent throughout"
        )
    return audio, {
        "digest": hashlib.sha256(audio.tobytes()).hexdigest(),
        "rate": rate,
        "channels": channels,
        "seconds": len(audio) / SAMPLE_RATE,
        "silence": (len(whole) - len(audio)) / SAMPLE_RATE,
        "level": 20 * np.log10(rms),
        "clipped": float((np.abs(whole) >= 0.999).mean()),
        "offset": float(whole.mean()),
    }


@dataclass
class EncodedClip:
    """What is known of a clip's sound once it is read, and its codes as soon as they are made."""

    sound: dict  # fields of Measures
    codes: np.ndarray | None = None  # (frames, 7)
    audio: np.ndarray | None = None  # (samples,), as long as there are no codes
    row: dict | None = None  # input_ids and labels that were made elsewhere
    entry: Path | None = None  # its file in the cache
    cached: bool = False


def open_cache(settings: Settings) -> Path | None:
    """The folder for what this codec makes of sounds trimmed in this way.

    A file a clip, named by the bytes of its sound and renamed into place once it is whole: runs
    side by side do not hurt each other, and one that was killed goes on where it was.
    """
    if settings.cache_dir is None:
        return None
    make_folder(settings.cache_dir, "cache_dir")
    trimming = settings.keep_silence, settings.silence_db
    digest = hashlib.sha256(repr((trimming, Measures._fields)).encode())
    folder = fetch(settings.codec, CODEC_FILES)
    try:
        for name in CODEC_FILES:
            digest.update((folder / name).read_bytes())
        home = Path(settings.cache_dir, digest.hexdigest()[:16])
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set --cache_dir, or --codec to a SNAC codec's folder"
        raise UserError(f"{error.filename}: {error.strerror}; {remedy}") from None
    return home


def find_entry(audio: Path | bytes, home: Path | None) -> Path | None:
    """Where the cache keeps a sound; None without a cache, or for a file that cannot be read."""
    if home is None or not (isinstance(audio, bytes) or os.path.isfile(audio)):
        return None
    try:
        with io.BytesIO(audio) if isinstance(audio, bytes) else open(audio, "rb") as file:
            return home / f"{hashlib.file_digest(file, 'sha256').hexdigest()}.json"
    except OSError:  # read_audio tells it
        return None


SOUND_TYPES = {name: type(value) for name, value in Measures._field_defaults.items()}


def read_entry(entry: Path, room: int, size: int) -> EncodedClip | None:
    """What the cache has of a sound; None where that is of no use, and is made again.

    It has no file, or one that is torn or of another shape, or fewer frames than a row could take.
    """
    try:
        sound = json.loads(entry.read_bytes())
        codes = read_codes(sound.pop("codes"), size)
        if {name: type(value) for name, value in sound.items()} != SOUND_TYPES:
            return None
        frames = frames_of(sound["seconds"])
    except (OSError, ValueError, OverflowError, RecursionError):
        return None
    except (AttributeError, KeyError, TypeError):  # JSON, but no object with a list of codes
        return None
    finite = all(math.isfinite(v) for v in sound.values() if not isinstance(v, str))
    whole = min(frames, room) <= len(codes) <= frames
    return EncodedClip(sound, codes, cached=True) if finite and whole else None


def load_clip(clip: Clip, settings: Settings, home: Path | None, ids) -> EncodedClip | UserError:
    """A clip with its codes from the cache or its own row; else with its samples.

    No more is encoded than a row can hold, and the four frames behind that the codec looks at.
    """
    room = settings.max_length // SLOTS  # frames
    try:
        if clip.fault:
            raise UserError(clip.fault)
        if clip.made:
            return load_pretokenized(clip.made, ids)
        if not clip.audio or not (clip.text or "").strip():
            raise UserError(
                "no sound is named" if (clip.text or "").strip() else "the text is empty"
            )
        entry = find_entry(clip.audio, home)
        if entry and (known := read_entry(entry, room, ids.codebook_size)):
            return known
        audio, sound = measure_clip(clip.audio, settings)
    except UserError as mistake:
        return mistake
    return EncodedClip(sound, audio=audio[: (room + 4) * FRAME_SAMPLES], entry=entry)


def prefetch(clips: Iterable[Clip], work: Callable, threads, size: int = 64) -> Iterator:
    """(clips, what `work` made of each), `size` at a time; threads are at the next ones already."""
    clips = iter(clips)
    parts = iter(lambda: list(itertools.islice(clips, size)), [])
    begun = ((part, threads.map(work, part)) for part in parts)
    for (part, made), _ in itertools.pairwise(itertools.chain(begun, [None])):
        yield part, list(made)


def encode_clips(
    clips: Clips, settings: Settings, ids, codec=None
) -> Iterator[tuple[Clip, EncodedClip | UserError]]:
    """Every clip with its codes, in order. Memory holds the sound of two windows.

    The codec is loaded, unless one is given, and a progress bar begun, for the first clip that has
    to be encoded.
    """
    from tqdm import tqdm

    home, bar, done, hours = open_cache(settings), None, 0, 0.0
    with contextlib.ExitStack() as closing:
        threads = closing.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0))))
        work = functools.partial(load_clip, settings=settings, home=home, ids=ids)
        for window, heard in prefetch(clips.each, work, threads):
            new = [one for one in heard if isinstance(one, EncodedClip) and one.codes is None]
            if new and bar is None:
                codec = codec or load_codec(settings.codec, device())
                bar = tqdm(total=clips.count, initial=done, unit=" clips", disable=None)
                closing.callback(bar.close)
                begun = time.monotonic()
            for one in encode_new(new, codec, settings.max_length // SLOTS, threads):
                hours += one.sound["seconds"] / 3600
                speed = 60 * hours / (time.monotonic() - begun)
                bar.set_postfix_str(f"{speed:.2f} hours of audio a minute", refresh=False)
                bar.update()
            done += len(window)
            if bar is not None:
                bar.update(done - bar.n)
            yield from zip(window, heard, strict=True)


def encode_new(new: list[EncodedClip], codec, room: int, threads) -> Iterator[EncodedClip]:
    """Puts at most `room` frames of codes into each, and into the cache; each as it is done."""
    if not new:
        return
    for one, codes in zip(
        new, encode_sounds(codec, [one.audio for one in new], threads), strict=True
    ):
        one.codes, one.audio = codes[:room], None
        if one.entry:
            text = json.dumps(one.sound | {"codes": one.codes.ravel().tolist()})
            write_text(one.entry, text)
        yield one


def encode_sounds(codec, sounds: list[np.ndarray], threads, size: int = 16) -> Iterator[np.ndarray]:
    """Codes of each, in order: on a GPU in batches of like length, on a CPU by a thread each.

    A batch gains nothing on a CPU, and several threads for one clip cost more than they bring.
    """
    import torch

    if next(codec.parameters()).device.type == "cuda":
        order, codes = sorted(range(len(sounds)), key=lambda n: len(sounds[n])), {}
        for batch in (order[n : n + size] for n in range(0, len(order), size)):
            codes |= zip(batch, encode(codec, [sounds[n] for n in batch]), strict=True)
        yield from (codes[n] for n in range(len(sounds)))
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from threads.map(lambda sound: encode(codec, [sound])[0], sounds)
    finally:
        torch.set_num_threads(before)


def load_pretokenized(made: dict, ids) -> EncodedClip:
    """A clip that was tokenised elsewhere, checked slot by slot."""
    row = None if "codes" in made else check_row(made, ids)
    if row:
        speech = row["input_ids"].tolist()
        codes = ids_to_codes(speech[speech.index(ids.sos) + 1 : speech.index(ids.eos)], ids)
        if not len(codes):
            raise UserError("no frame between its SOS and EOS")
        check_labels(**row)
    else:
        codes = read_codes(made["codes"], ids.codebook_size)
    digest = hashlib.sha256(codes.tobytes()).hexdigest()
    sound = {"digest": digest, "seconds": len(codes) * FRAME_SAMPLES / SAMPLE_RATE}
    return EncodedClip(sound, codes, row=row)


def frames_of(seconds: float) -> int:
    return -(-round(seconds * SAMPLE_RATE) // FRAME_SAMPLES)
