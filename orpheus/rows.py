"""Clips → codes, kept in a cache → rows in Arrow files; the held-out split, packing arithmetic.

Clips and rows are streamed: nothing here holds all samples, rows or texts.
"""

import atexit
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tempfile
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm

from orpheus.audio import ClipError, Sound, measure_clip
from orpheus.clips import Clip, Clips, printable, read_clips, split_prefix
from orpheus.codec import CODEC_FILES, encode, load_codec
from orpheus.doctor import COLUMNS, MeasuredClips, Report, check_leave_out
from orpheus.files import atomic_file, fetch, make_folder
from orpheus.models import device
from orpheus.runs import RANK, WORLD_SIZE
from orpheus.settings import Settings, UserError
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    SpeechIds,
    check_row,
    codes_to_ids,
    prompts_ids,
    read_codes,
    read_prompt,
    read_speech_ids,
    split_row,
)

WINDOW = 64  # clips that are loaded, encoded and written together
IDS = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())}
SCHEMA = pa.schema(IDS | COLUMNS)


class Rows(Sequence):
    """Rows of a mapped Arrow file.

    `rows[0]` is a dict of `input_ids` and `labels`, (tokens,) int64, the latter −100 where there is
    no loss, and of `text` and `voice`; `rows[:2]` is a list of them.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset.select_columns([*IDS, "text", "voice"]).with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, n):
        if isinstance(n, slice):
            return [self.dataset[m] for m in range(len(self))[n]]
        return self.dataset[n]


def make_rows(clips: Clips, settings: Settings, tokenizer, codec=None) -> tuple[Rows, Rows, Report]:
    """Return the rows that a run trains on, those that it holds out, and the report on the data.

    Each rank encodes its share into the cache; then the first one makes the rows for all of them.
    A clip that cannot be used is left out, and the report names it; a UserError says if none is
    left. `codec` is settings.codec, if it is loaded already.
    """
    check_leave_out(settings)
    codec = codec or load_codec(settings.codec, device())
    ids = read_speech_ids(tokenizer, codec.codebook_size)
    if settings.cache_dir:
        make_folder(settings.cache_dir, "cache_dir")
    if WORLD_SIZE == 1 or settings.cache_dir is None:
        written = write_rows(clips, settings, tokenizer, ids, codec)
        return choose_rows(*written, settings, tokenizer)
    ranks = PartialState(cpu=not torch.cuda.is_available())
    share = Clips(itertools.islice(read_clips(settings), RANK, None, WORLD_SIZE), None)
    for _ in encode_clips(share, settings, tokenizer, ids, codec):
        pass
    ranks.wait_for_everyone()
    made = [None if RANK else write_rows(clips, settings, tokenizer, ids, codec)]
    path, report = broadcast_object_list(made)[0]
    if not path.exists():  # on another machine, which does not share the cache
        path, report = write_rows(clips, settings, tokenizer, ids, codec)
    return choose_rows(path, report, settings, tokenizer)


def write_rows(clips: Clips, settings: Settings, tokenizer, ids, codec) -> tuple[Path, Report]:
    """Return an Arrow file of all rows, which lasts as long as this process, and a report."""
    report = Report(printable(settings.dataset), note=clips.note)
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=settings.cache_dir))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "rows.arrow"
    with atomic_file(path) as part, pa.ipc.new_stream(str(part), SCHEMA) as file:
        for window in encode_clips(clips, settings, tokenizer, ids, codec):
            if rows := build_rows(window, report, settings, tokenizer, ids):
                file.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
    return path, report


def choose_rows(path: Path, report: Report, settings: Settings, tokenizer) -> tuple:
    """Return the rows of a file that are trained on, and held out, and the complete report."""
    dataset = Dataset.from_file(str(path))
    report.measures = MeasuredClips(dataset.data.table.select([*COLUMNS]))
    kept = report.add_findings(settings.leave_out, tokenizer) if len(dataset) else []
    if not any(kept):
        first = (report.left_out + report.dropped + ["no clips"])[0]
        long = report.dropped and not report.left_out
        remedy = f"raise max_length, {settings.max_length}" if long else "see data/README.md"
        fault = f"no rows left of {report.clips} clips; the first: {first}"
        raise UserError(f"{settings.dataset}: {fault}; {remedy}")
    dataset = dataset.select(np.flatnonzero(kept))
    report.digest = digest_rows(dataset)
    texts = report.measures.table["text"]
    held_out = choose_held_out(texts, settings)
    report.held_out = int(held_out.sum())
    report.held_out_texts = sorted(texts.filter(pa.array(held_out)).unique().to_pylist())
    lengths = report.measures.array("tokens")[~held_out].tolist()
    report.slots_used = slots_used(lengths, settings)
    report.steps_per_epoch = steps_per_epoch(lengths, settings)
    sides = [Rows(dataset.select(np.flatnonzero(side))) for side in (~held_out, held_out)]
    return *sides, report


def build_rows(window: list, report: Report, settings: Settings, tokenizer, ids) -> list[dict]:
    """Return the rows of a window of clips, with their measures; report the clips left out."""
    texts = [(clip.text, clip.voice) for clip in window if not clip.error and not clip.row]
    prompts, rows = iter(texts and prompts_ids(tokenizer, ids, texts)), []
    for clip in window:
        report.clips += 1
        if clip.error:
            report.add_left_out(clip.source, clip.error)
            continue
        report.cached += clip.cached
        row, length = clip.row, len(clip.row["input_ids"]) if clip.row else 0
        if row is None:
            prompt = next(prompts)
            length = len(prompt) + SLOTS * clip.sound.frames + 2
            row = make_row(prompt, clip.codes, ids, settings)
        report.lengths.append(length)
        if length > settings.max_length:
            # A truncated row has no end. A prompt may fill it by itself: then there is no speech.
            truncated = ids.eos not in row["input_ids"] and row["input_ids"][-1] != ids.sos
            clips = report.truncated if truncated else report.dropped
            clips.append(f"{clip.source}: {length:,} tokens, {clip.sound.seconds:.1f} s")
            if not truncated:
                report.reasons["too long"] += 1
                continue
        if len(report.prompts) < 3:
            prompt = row["input_ids"][: np.argmax(row["input_ids"] == ids.sos) + 1]
            report.prompts.append(tokenizer.decode(prompt))
        row = {name: values.astype(np.int32) for name, values in row.items()}
        row |= {"source": clip.source, "voice": clip.voice, "text": clip.text}
        rows.append(row | {"tokens": len(row["input_ids"])} | clip.sound._asdict())
    return rows


def digest_rows(dataset: Dataset) -> str:
    """Return the SHA-256 over the rows' ids and labels: a resumed run has to have the same ones."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(WINDOW):
        ends = np.cumsum(batch["tokens"].to_numpy())[:-1]
        columns = [pc.list_flatten(batch[name]).to_numpy().astype(np.int64) for name in IDS]
        rows = zip(*(np.split(column, ends) for column in columns), strict=True)
        digest.update(np.concatenate([values for row in rows for values in row]))
    return digest.hexdigest()


def row_text(clip: Clip, settings: Settings) -> tuple[str, str]:
    """Return (text, voice) of a clip, white space folded; `settings.voice` is for those without."""
    texts = clip.text, clip.voice or settings.voice
    return tuple(" ".join((text or "").split()) for text in texts)


def make_row(prompt: list[int], codes: np.ndarray, ids: SpeechIds, settings: Settings) -> dict:
    """Return `input_ids` and `labels`, (tokens,) int64, of a prompt's ids and (frames, 7) codes.

    With `too_long` "truncate", a row that is too long is cut at the end of a frame, and gets no end
    token, so that the model does not learn to stop early.
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


def choose_held_out(texts: pa.ChunkedArray, settings: Settings) -> np.ndarray:
    """Return which rows are held out, (rows,): all rows of a text are on the same side."""
    unique = texts.unique()
    unique = unique.take(pc.sort_indices(unique))
    count = min(round(settings.held_out * len(unique)), len(unique) - 1)
    chosen = np.random.default_rng(settings.seed).permutation(len(unique))[:count]
    return pc.is_in(texts, value_set=unique.take(pa.array(chosen))).to_numpy()


def open_cache(settings: Settings) -> Path | None:
    """Return the cache's folder for this codec and this way of trimming; None without a cache.

    What is made of a clip lies there under the SHA-256 of its recording, and once more under the
    recording's path, size and times: a second start finds it without opening the recording. Files
    are written atomically, so that runs may share them, and a killed run goes on where it was.
    """
    if settings.cache_dir is None:
        return None
    digest = hashlib.sha256(repr((2, settings.keep_silence, settings.silence_db)).encode())
    for name in CODEC_FILES:
        digest.update((fetch(settings.codec, CODEC_FILES) / name).read_bytes())
    return Path(settings.cache_dir, digest.hexdigest()[:16])


def cache_file(cache: Path, clip: Clip, *key) -> str:
    """Return the name of a cached clip's file, in one of 256 folders."""
    key = repr((*key, clip.start, clip.duration)).encode(errors="surrogatepass")
    name = hashlib.sha256(key).hexdigest()
    return f"{cache}/{name[:2]}/{name[2:]}"


def read_cached(path: str, max_frames: int) -> tuple | None:
    """Return the (sound, codes, True) of a cached clip; None if it is damaged or too short."""
    try:
        with open(path, "rb", buffering=0) as file:
            head, _, codes = file.read().partition(b"\n")
        sound, codes = Sound(**json.loads(head)), np.frombuffer(codes, "<u2").reshape(-1, SLOTS)
    except (OSError, ValueError, TypeError):
        return None
    return (sound, codes, True) if min(sound.frames, max_frames) <= len(codes) else None


def write_cached(path: str, sound: Sound, codes: np.ndarray) -> None:
    """Write a clip into the cache: a line of JSON, then two bytes for each code."""
    head = json.dumps(sound._asdict()).encode()
    with atomic_file(Path(path)) as part:
        part.write_bytes(head + b"\n" + codes.astype("<u2").tobytes())


@dataclass
class EncodedClip:
    """A clip on its way to its row. One that cannot be used has an error."""

    source: str  # file and row, for messages
    text: str
    voice: str
    error: UserError | None = None
    sound: Sound | None = None
    audio: np.ndarray | None = None  # (samples,) at 24 kHz, until it is encoded
    codes: np.ndarray | None = None  # (frames, 7)
    row: dict | None = None  # input_ids and labels that were tokenised elsewhere
    files: tuple[str, ...] = ()  # where it belongs in the cache
    cached: bool = False  # its codes came from the cache


def read_clip(clip: Clip, settings: Settings, tokenizer, ids: SpeechIds) -> list[EncodedClip]:
    """Return a clip with what its dataset says of it; several for a row of chained clips."""
    made = EncodedClip(clip.source, *row_text(clip, settings), clip.error)
    tokens = clip.pretokenized or {}
    try:
        if clip.error:
            return [made]
        if "input_ids" in tokens:
            rows = split_row(tokens, ids)
            names = [f"{clip.source} clip {n + 1}" for n in range(len(rows))]
            parts = [replace(made, source=name) for name in names] if len(rows) > 1 else [made]
            return [read_row(*part, tokenizer, ids) for part in zip(parts, rows, strict=True)]
        if not made.text:
            raise ClipError("the text is empty", "no text")
        if tokens:
            made.codes = read_codes(tokens.get("codes", tokens.get("codes_list")), ids)
            made.sound = measure_codes(made.codes)
        elif not clip.audio:
            raise ClipError("no sound is named", "no sound")
    except UserError as error:
        made.error = error
    return [made]


def read_row(made: EncodedClip, row: dict, tokenizer, ids: SpeechIds) -> EncodedClip:
    """Fill in a clip from ids that were made elsewhere; text and voice are those of its prompt."""
    try:
        made.row, made.sound = row, measure_codes(check_row(row, ids))
        prompt = read_prompt(row["input_ids"], tokenizer, ids)
        name, text = split_prefix(prompt)
        if " " in name and name != made.voice:  # rather a sentence with a colon
            name, text = "", prompt
        made.voice, made.text = name, made.text.removeprefix(f"{name}: ") or text
    except UserError as error:
        made.error = error
    return made


def measure_codes(codes: np.ndarray) -> Sound:
    seconds = len(codes) * FRAME_SAMPLES / SAMPLE_RATE
    return Sound(hashlib.sha256(codes.tobytes()).hexdigest(), seconds=seconds)


def load_recording(made: EncodedClip, clip: Clip, settings: Settings, cache: Path | None) -> None:
    """Fill in a clip's codes from the cache, by its recording's SHA-256, else its samples.

    The samples end four frames after the longest row, which is as far as the encoder looks ahead.
    """
    max_frames, audio = settings.max_length // SLOTS, clip.audio
    try:
        if cache and (isinstance(audio, bytes) or os.path.isfile(audio)):
            with io.BytesIO(audio) if isinstance(audio, bytes) else open(audio, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            path = cache_file(cache, clip, digest)
            if found := read_cached(path, max_frames):
                made.sound, made.codes, made.cached = found
                for file in made.files:
                    write_cached(file, made.sound, made.codes)
                return
            made.files = (path, *made.files)
        audio, made.sound = measure_clip(audio, settings, clip.start, clip.duration)
        made.audio = audio[: (max_frames + 4) * FRAME_SAMPLES]
    except UserError as error:
        made.error = error


def encode_clips(clips: Clips, settings: Settings, tokenizer, ids, codec) -> Iterator[list]:
    """Yield all clips with their codes, in order; at most two windows of them are in memory."""
    cache, max_frames = open_cache(settings), settings.max_length // SLOTS

    def load_window(batch: list[Clip]) -> tuple[list[EncodedClip], list[Future]]:
        window, loading = [], []
        for clip in batch:
            first, *more = read_clip(clip, settings, tokenizer, ids)
            window += [first, *more]
            if first.error or first.sound:
                continue
            if cache and isinstance(clip.audio, Path) and os.path.isfile(clip.audio):
                path, stat = os.path.abspath(clip.audio), os.stat(clip.audio)
                times = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
                first.files = (cache_file(cache, clip, path, *times),)
                if found := read_cached(*first.files, max_frames):
                    first.sound, first.codes, first.cached = found
                    continue
            loading.append(threads.submit(load_recording, first, clip, settings, cache))
        return window, loading

    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with threads, tqdm(total=clips.count, unit=" clips", delay=1, disable=RANK > 0 or None) as bar:
        clips = iter(clips)
        batches = iter(lambda: list(itertools.islice(clips, WINDOW)), [])
        windows = itertools.chain(map(load_window, batches), [None])
        for (window, loading), _ahead in itertools.pairwise(windows):
            for future in loading:
                future.result()
            if new := [clip for clip in window if clip.audio is not None]:
                sounds = encode_sounds(codec, [clip.audio for clip in new], threads)
                for clip, codes in zip(new, sounds, strict=True):
                    clip.codes, clip.audio = codes[:max_frames], None
                    for file in clip.files:
                        write_cached(file, clip.sound, clip.codes)
            bar.update(len(window))
            yield window


def encode_sounds(codec, sounds: list[np.ndarray], threads: Executor) -> Iterator[np.ndarray]:
    """Yield the (frames, 7) codes of each (samples,), in order.

    A GPU takes batches of like length. A CPU is quicker with one thread for each sound.
    """
    if next(codec.parameters()).device.type == "cuda":
        order, codes = sorted(range(len(sounds)), key=lambda n: len(sounds[n])), {}
        for batch in (order[n : n + 16] for n in range(0, len(order), 16)):
            codes |= zip(batch, encode(codec, [sounds[n] for n in batch]), strict=True)
        yield from (codes[n] for n in range(len(sounds)))
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from threads.map(lambda sound: encode(codec, [sound])[0], sounds)
    finally:
        torch.set_num_threads(before)


def length_batches(lengths: list[int], size: int, seed: int) -> list[int]:
    """Return row numbers in an order that puts rows of like length into one batch of `size`.

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
    """Return how many packed rows TRL makes: best fit, decreasing, each thousand by itself."""
    packed = 0
    for first in range(0, len(lengths), 1000):
        space = []  # left in each packed row, ascending
        for length in sorted(lengths[first : first + 1000], reverse=True):
            best = bisect_left(space, length)
            insort(space, (space.pop(best) if best < len(space) else max_length) - length)
        packed += len(space)
    return packed


def count_padded(lengths: list[int], size: int, seed: int) -> int:
    """Return the tokens, padding included, of a pass in batches padded to their longest row."""
    order = [lengths[row] for row in length_batches(lengths, size, seed)]
    batches = (order[n : n + size] for n in range(0, len(order), size))
    return sum(len(batch) * max(batch) for batch in batches)


def steps_per_epoch(lengths: list[int], settings: Settings) -> int:
    """Return the optimiser steps of one pass over rows of these lengths, on one GPU."""
    packed = settings.batching == "pack"
    rows = count_packed(lengths, settings.max_length) if packed else len(lengths)
    batches = math.ceil(rows / settings.per_device_train_batch_size)
    return math.ceil(batches / settings.gradient_accumulation_steps)


def slots_used(lengths: list[int], settings: Settings) -> dict[str, float]:
    """Return, by `batching`, the share of a batch's slots that hold a token, not padding."""
    max_length, size = settings.max_length, settings.per_device_train_batch_size
    slots = {
        "pack": count_packed(lengths, max_length) * max_length,
        "pad": count_padded(lengths, size, settings.seed),
        "pad_to_max": len(lengths) * max_length,
    }
    return {name: sum(lengths) / count for name, count in slots.items()}
