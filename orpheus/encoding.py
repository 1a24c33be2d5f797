"""A clip → its codes, and the cache of them."""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from orpheus.audio import ClipError, Sound, measure_clip
from orpheus.clips import Clip, Clips
from orpheus.codec import CODEC_FILES, encode, load_codec
from orpheus.files import make_folder, write_text
from orpheus.hub import fetch
from orpheus.models import device
from orpheus.settings import Settings, UserError, read_json
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    SpeechIds,
    check_row,
    read_codes,
    read_prompt,
    split_row,
)


@dataclass
class EncodedClip:
    """A clip's sound and codes. Until it is encoded it has samples in place of codes."""

    sound: Sound
    codes: np.ndarray | None = None  # (frames, 7)
    audio: np.ndarray | None = None  # (samples,) at 24 kHz
    row: dict | None = None  # input_ids and labels that were tokenised elsewhere
    prompt: str = ""  # of that row
    cache_file: Path | None = None
    cached: bool = False  # its codes came from the cache


def read_codebook_size(codec: str) -> int:
    """The codes of each of a codec's levels, from its config alone."""
    config = fetch(codec, CODEC_FILES) / "config.json"
    size = read_json(config).get("codebook_size")
    if not isinstance(size, int):
        raise UserError(f"{config}: no codebook_size: not a SNAC codec")
    return size


# ---------------------------------------------------------------- the cache


def open_cache(settings: Settings) -> Path | None:
    """The cache's folder for this codec and this way of trimming; None without a cache.

    It has one file for each clip, named after the SHA-256 of its audio file and written atomically:
    runs may share it, and a run that was killed goes on where it was.
    """
    if settings.cache_dir is None:
        return None
    make_folder(settings.cache_dir, "cache_dir")
    trimming = settings.keep_silence, settings.silence_db
    digest = hashlib.sha256(repr((trimming, Sound._fields)).encode())
    folder = fetch(settings.codec, CODEC_FILES)
    try:
        for name in CODEC_FILES:
            digest.update((folder / name).read_bytes())
    except OSError as error:
        remedy = "set --codec to a SNAC codec's folder"
        raise UserError(f"{error.filename}: {error.strerror}; {remedy}") from None
    return Path(settings.cache_dir, digest.hexdigest()[:16])


def find_cache_file(audio: Path | bytes, cache: Path | None) -> Path | None:
    """The file of a recording in the cache, which need not exist yet.

    None without a cache, or for a recording that cannot be read, which read_audio reports.
    """
    if cache is None or not (isinstance(audio, bytes) or os.path.isfile(audio)):
        return None
    try:
        with io.BytesIO(audio) if isinstance(audio, bytes) else open(audio, "rb") as file:
            return cache / f"{hashlib.file_digest(file, 'sha256').hexdigest()}.json"
    except OSError:
        return None


def read_cached(path: Path, max_frames: int, ids: SpeechIds) -> EncodedClip | None:
    """A clip from the cache.

    None where it has to be encoded: there is no such file, it is damaged or has another shape, or
    it holds fewer frames than a row can take.
    """
    try:
        values = json.loads(path.read_bytes())
        codes = read_codes(values.pop("codes"), ids)
        sound = Sound(**values)
        typed = {name: type(value) for name, value in values.items()} == Sound.__annotations__
        finite = all(math.isfinite(value) for value in sound if not isinstance(value, str))
        enough = min(sound.frames, max_frames) <= len(codes) <= sound.frames
    except (OSError, RecursionError, ValueError):  # no such file, or not JSON
        return None
    except (ArithmeticError, AttributeError, LookupError, TypeError):  # JSON of another shape
        return None
    return EncodedClip(sound, codes, cached=True) if typed and finite and enough else None


# ---------------------------------------------------------------- clips


def load_clip(
    clip: Clip, settings: Settings, cache: Path | None, ids: SpeechIds, tokenizer
) -> list[EncodedClip | UserError]:
    """Loads a clip: its codes from its row or from the cache, else its samples.

    The samples end four frames after the longest row, which is as far as the encoder looks ahead.
    A clip that cannot be used gives its error, since the others go on without it. A row into which
    several clips were chained gives all of them.
    """
    max_frames = settings.max_length // SLOTS
    try:
        if clip.error:
            return [clip.error]
        if "input_ids" in (clip.pretokenized or {}):
            return [load_row(row, ids, tokenizer) for row in split_row(clip.pretokenized, ids)]
        if not (clip.text or "").strip():
            raise ClipError("the text is empty", "no text")
        if clip.pretokenized:
            return [load_codes(clip.pretokenized, ids)]
        if not clip.audio:
            raise ClipError("no sound is named", "no sound")
        path = find_cache_file(clip.audio, cache)
        if path and (cached := read_cached(path, max_frames, ids)):
            return [cached]
        audio, sound = measure_clip(clip.audio, settings)
    except UserError as error:
        return [error]
    return [EncodedClip(sound, audio=audio[: (max_frames + 4) * FRAME_SAMPLES], cache_file=path)]


def load_row(row: dict[str, np.ndarray], ids: SpeechIds, tokenizer) -> EncodedClip | UserError:
    """A clip whose ids were made elsewhere, or what is wrong with them."""
    try:
        codes = check_row(row, ids)
        prompt = read_prompt(row["input_ids"], tokenizer, ids)
    except UserError as error:
        return error
    return EncodedClip(measure_codes(codes), codes, row=row, prompt=prompt)


def load_codes(columns: dict, ids: SpeechIds) -> EncodedClip:
    """A clip whose codes were made elsewhere; `UserError` for codes that are not Orpheus's."""
    codes = read_codes(columns.get("codes", columns.get("codes_list")), ids)
    return EncodedClip(measure_codes(codes), codes)


def measure_codes(codes: np.ndarray) -> Sound:
    """What is known of a clip of which there are only the codes."""
    digest = hashlib.sha256(codes.tobytes()).hexdigest()
    return Sound(digest, seconds=len(codes) * FRAME_SAMPLES / SAMPLE_RATE)


def prefetch(
    clips: Iterable[Clip], load: Callable, threads: Executor, size: int = 64
) -> Iterator[tuple[list[Clip], list]]:
    """Yields `size` clips and what `load` returns for each, while threads load the next ones."""
    clips, loading = iter(clips), None
    while batch := list(itertools.islice(clips, size)):
        previous, loading = loading, (batch, threads.map(load, batch))
        if previous:
            yield previous[0], list(previous[1])
    if loading:
        yield loading[0], list(loading[1])


def encode_clips(
    clips: Clips, settings: Settings, ids: SpeechIds, tokenizer, codec=None
) -> Iterator[tuple[Clip, EncodedClip | UserError]]:
    """Yields every clip with its codes, or with the error for which it is left out, in order.

    The clips of a chained row are yielded one by one.

    At most two batches of samples are in memory. The codec is loaded, unless one is given, when
    the first clip has to be encoded.
    """
    cache, hours, started = open_cache(settings), 0.0, time.monotonic()
    load = functools.partial(
        load_clip, settings=settings, cache=cache, ids=ids, tokenizer=tokenizer
    )
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        tqdm(total=clips.count, unit=" clips", delay=1, disable=None) as bar,
    ):
        for batch, loaded in prefetch(clips, load, threads):
            new = [clip for parts in loaded for clip in parts]
            new = [clip for clip in new if isinstance(clip, EncodedClip) and clip.codes is None]
            bar.update(len(batch) - len(new))
            if new:
                codec = codec or load_codec(settings.codec, device())
                for clip in encode_new(new, codec, settings.max_length // SLOTS, threads):
                    hours += clip.sound.seconds / 3600
                    speed = 60 * hours / (time.monotonic() - started)
                    bar.set_postfix_str(f"{speed:.2f} hours of audio a minute", refresh=False)
                    bar.update()
            for clip, clips_in_row in zip(batch, loaded, strict=True):
                for number, part in enumerate(clips_in_row, 1):
                    named = f"{clip.source} clip {number}" if len(clips_in_row) > 1 else clip.source
                    yield clip._replace(source=named), part


def encode_new(
    clips: list[EncodedClip], codec, max_frames: int, threads: Executor
) -> Iterator[EncodedClip]:
    """Puts at most `max_frames` frames of codes into each clip and into the cache; yields it."""
    sounds = [clip.audio for clip in clips]
    for clip, codes in zip(clips, encode_sounds(codec, sounds, threads), strict=True):
        clip.codes, clip.audio = codes[:max_frames], None
        if clip.cache_file:
            entry = clip.sound._asdict() | {"codes": clip.codes.ravel().tolist()}
            write_text(clip.cache_file, json.dumps(entry))
        yield clip


def encode_sounds(
    codec, sounds: list[np.ndarray], threads: Executor, size: int = 16
) -> Iterator[np.ndarray]:
    """(frames, 7) codes of each (samples,), in order.

    On a GPU they are encoded in batches of like length. On a CPU batches bring nothing, and one
    thread for each sound is quicker than several for one.
    """
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
