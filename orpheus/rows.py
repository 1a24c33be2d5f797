"""Clips → codes, and the cache of them → rows of ids; the held-out split, packing arithmetic."""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from orpheus.audio import ClipError, Sound, measure_clip
from orpheus.clips import Clip, Clips, printable
from orpheus.codec import CODEC_FILES, encode, load_codec
from orpheus.doctor import Measures, Report, check_leave_out
from orpheus.files import fetch, make_folder, write_text
from orpheus.models import device
from orpheus.settings import Settings, UserError, read_json
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    SpeechIds,
    check_row,
    codes_to_ids,
    prompt_ids,
    read_codes,
    read_prompt,
    read_speech_ids,
    split_row,
)

# ---------------------------------------------------------------- rows


def make_rows(
    clips: Clips, settings: Settings, tokenizer, codec=None
) -> tuple[list[dict], list[dict], Report]:
    """Makes the rows that a run trains on, those that it holds out, and the report on the data.

    A row has `input_ids` and `labels`, (tokens,) int64, its `text` and its `voice`. A clip that
    cannot be used is left out, and the report names it. `codec` is settings.codec, if it is loaded
    already. Raises `UserError` where no row is left, or for a broken dataset, codec or tokenizer.
    """
    check_leave_out(settings)
    ids = read_speech_ids(tokenizer, read_codebook_size(settings.codec))
    rows, report = [], Report(printable(settings.dataset), note=clips.note)
    for clip, encoded in encode_clips(clips, settings, ids, tokenizer, codec):
        report.clips += 1
        try:
            row, measures, length = build_row(clip, encoded, tokenizer, ids, settings)
        except UserError as error:
            report.add_left_out(clip.source, error)
            continue
        report.cached += encoded.cached
        if check_length(row, measures, length, report, ids, settings.max_length):
            report.measures.append(measures)
            rows.append(row)
    if rows:
        kept = report.add_findings(settings.leave_out, tokenizer)
        rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    check_any_left(rows, report, settings)
    report.digest = digest_rows(rows)
    train, held_out = split_rows(rows, settings)
    report.held_out = len(held_out)
    report.held_out_texts = sorted({row["text"] for row in held_out})
    lengths = [len(row["input_ids"]) for row in train]
    report.slots_used = slots_used(lengths, settings)
    report.steps_per_epoch = steps_per_epoch(lengths, settings)
    return train, held_out, report


def build_row(
    clip: Clip, encoded, tokenizer, ids: SpeechIds, settings: Settings
) -> tuple[dict, Measures, int]:
    """The row of an `EncodedClip`, its measures, and its length in tokens before it may be cut.

    Raises the `UserError` that may be in a clip's place.
    """
    if isinstance(encoded, UserError):
        raise encoded
    text, voice = row_text(clip, settings)
    row = encoded.row
    if row:
        length = len(row["input_ids"])
        spoken, voice = split_prompt(encoded.prompt, voice)
        text = text.removeprefix(f"{voice}: ") or spoken
    else:
        prompt = prompt_ids(tokenizer, ids, text, voice)
        length = len(prompt) + SLOTS * encoded.sound.frames + 2
        row = make_row(prompt, encoded.codes, ids, settings)
    measures = Measures(clip.source, voice, text, encoded.sound, len(row["input_ids"]))
    return row | {"text": text, "voice": voice}, measures, length


def check_length(
    row: dict, measures: Measures, length: int, report: Report, ids: SpeechIds, max_length: int
) -> bool:
    """Whether a row is trained on. One that is cut or dropped for its length is reported."""
    report.lengths.append(length)
    if length <= max_length:
        return True
    # A truncated row has no end token. A prompt may fill it by itself: then there is no speech.
    truncated = ids.eos not in row["input_ids"] and row["input_ids"][-1] != ids.sos
    clips = report.truncated if truncated else report.dropped
    clips.append(f"{measures.source}: {length:,} tokens, {measures.sound.seconds:.1f} s")
    if not truncated:
        report.reasons["too long"] += 1
    return truncated


def check_any_left(rows: list[dict], report: Report, settings: Settings) -> None:
    """`UserError` where every clip was left out, with the reason of the first."""
    if rows:
        return
    first = (report.left_out + report.dropped + ["no clips"])[0]
    remedy = "see data/README.md"
    if report.dropped and not report.left_out:
        remedy = f"raise max_length, which is {settings.max_length}"
    fault = f"no rows left of {report.clips} clips; the first: {first}"
    raise UserError(f"{settings.dataset}: {fault}; {remedy}")


def digest_rows(rows: list[dict]) -> str:
    """SHA-256 over the rows' ids and labels: a resumed run has to have the same ones."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    return digest.hexdigest()


def row_text(clip, settings: Settings) -> tuple[str, str]:
    """(text, voice) of a clip, white space folded; the setting `voice` is for clips without one."""
    texts = clip.text, clip.voice or settings.voice
    return tuple(" ".join((text or "").split()) for text in texts)


def split_prompt(prompt: str, voice: str) -> tuple[str, str]:
    """(text, voice) of a prompt, `name: text` or the text alone.

    The name is `voice`, if the prompt begins with that, else one word before a colon.
    """
    if voice and prompt.startswith(f"{voice}: "):
        return prompt[len(voice) + 2 :].strip(), voice
    named = re.match(r"([^\s:]+): +(.+)", prompt, re.DOTALL)
    return (named[2], named[1]) if named else (prompt, "")


def make_row(prompt: list[int], codes: np.ndarray, ids: SpeechIds, settings: Settings) -> dict:
    """Builds a row from a prompt's ids and (frames, 7) codes.

    Returns `input_ids` (prompt, audio, EOS, EOA) and `labels`, (tokens,) int64 each; labels are
    −100 where there is no loss. With `too_long` "truncate", a row that is too long is cut at the
    end of a frame. Truncated rows get no end token, so the model does not learn to stop early.
    """
    end = [ids.eos, ids.eoa]
    max_frames = (settings.max_length - len(prompt) - len(end)) // SLOTS
    if len(codes) > max_frames and settings.too_long == "truncate":
        codes, end = codes[: max(settings.max_length - len(prompt), 0) // SLOTS], []
    input_ids = np.concatenate([prompt, codes_to_ids(codes, ids), end]).astype(np.int64)
    labels = input_ids.copy()
    if settings.train_on == "audio":
        labels[: len(prompt)] = -100
    return {"input_ids": input_ids, "labels": labels}


def split_rows(rows: list[dict], settings: Settings) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows held out). All rows of a text are on the same side."""
    texts = sorted({row["text"] for row in rows})
    count = min(round(settings.held_out * len(texts)), len(texts) - 1)
    chosen = np.random.default_rng(settings.seed).permutation(len(texts))[:count]
    held_out_texts = {texts[n] for n in chosen}
    held_out = [row for row in rows if row["text"] in held_out_texts]
    return [row for row in rows if row["text"] not in held_out_texts], held_out


# ---------------------------------------------------------------- clips


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


# ---------------------------------------------------------------- batches


def length_batches(lengths: list[int], size: int, seed: int) -> list[int]:
    """Row numbers in an order that puts rows of like length into the same batch of `size` rows.

    Rows are shuffled, sorted by length within pools of 32 batches, and the batches are shuffled.
    The order depends on `seed` alone, so that a resumed run has the same batches. The batch with
    the longest row comes first: if it does not fit in memory, the first step shows it.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(lengths)).tolist()
    pools = [order[n : n + 32 * size] for n in range(0, len(order), 32 * size)]
    ordered = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
    batches = [ordered[n : n + size] for n in range(0, len(ordered), size)]
    last = batches.pop() if len(batches[-1]) < size else []  # a short batch stays at the end
    random.shuffle(batches)
    if batches:
        longest = max(range(len(batches)), key=lambda n: lengths[batches[n][-1]])
        batches.insert(0, batches.pop(longest))
    return [row for batch in batches for row in batch] + last


def count_packed(lengths: list[int], max_length: int) -> int:
    """How many packed rows of `max_length` tokens TRL makes of rows (best fit, decreasing).

    A test compares it with TRL, which packs each thousand rows by itself.
    """
    packed = 0
    for first in range(0, len(lengths), 1000):
        space = []  # left in each packed row, ascending
        for length in sorted(lengths[first : first + 1000], reverse=True):
            best = bisect_left(space, length)
            insort(space, (space.pop(best) if best < len(space) else max_length) - length)
        packed += len(space)
    return packed


def count_padded(lengths: list[int], size: int, seed: int) -> int:
    """Tokens, padding included, of an epoch's batches of `size` rows padded to their longest."""
    order = length_batches(lengths, size, seed)
    batches = [[lengths[row] for row in order[n : n + size]] for n in range(0, len(order), size)]
    return sum(len(batch) * max(batch) for batch in batches)


def steps_per_epoch(lengths: list[int], settings: Settings) -> int:
    """Optimiser steps of one pass over rows of these lengths, on one GPU."""
    packed = settings.batching == "pack"
    rows = count_packed(lengths, settings.max_length) if packed else len(lengths)
    batches = math.ceil(rows / settings.per_device_train_batch_size)
    return math.ceil(batches / settings.gradient_accumulation_steps)


def slots_used(lengths: list[int], settings: Settings) -> dict[str, float]:
    """For each way of `batching`, the share of a batch's slots that hold a token, not padding."""
    max_length, size = settings.max_length, settings.per_device_train_batch_size
    slots = {
        "pack": count_packed(lengths, max_length) * max_length,
        "pad": count_padded(lengths, size, settings.seed),
        "pad_to_max": len(lengths) * max_length,
    }
    return {name: sum(lengths) / count for name, count in slots.items()}
