"""From texts to speech: batches, streams, long texts, the best of several candidates."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor

from orpheus.audio import audio_file, concat_with_pauses, streamed_audio
from orpheus.codec import decode_stream
from orpheus.sampling import speak_frames, start_batch
from orpheus.scoring import (
    BY_ITSELF,
    CUT_OFF,
    Judge,
    Utterance,
    choose_best,
    detect_failure,
    format_end,
    format_scores,
    measure,
)
from orpheus.settings import Settings, UserError
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    SpeechIds,
    ids_to_codes,
    parts_of,
    prompt_ids,
    read_speech_ids,
)


def make_utterance(
    config, tokenizer, ids: SpeechIds, text: str, settings: Settings, voice: str | None, candidate=0
) -> Utterance:
    """Builds the prompt of `text`; raises `UserError` if no frame of speech fits behind it.

    `config` is the model's, which has the length of its context.
    """
    prompt = prompt_ids(tokenizer, ids, text, voice)
    wanted = int(settings.max_seconds * SAMPLE_RATE / FRAME_SAMPLES)  # frames
    room = (config.max_position_embeddings - len(prompt) - 1) // SLOTS
    if wanted < 1:
        fault = f"max_seconds {settings.max_seconds} is less than a frame of speech; raise it"
        raise UserError(f"{text[:40]!r}: {fault}")
    if room < 1:
        fault = f"a text of {len(prompt)} tokens leaves no room for a frame of speech; shorten it"
        raise UserError(f"{text[:40]!r}: {fault}")
    return Utterance(text, prompt, min(wanted, room), candidate)


class SlotProcessor(LogitsProcessor):
    """Allows only the ids that may come next in a frame, for `generate` of transformers.

    Slot s takes the codes of codebook s; the end token may come after each whole frame.
    """

    def __init__(self, ids: SpeechIds, prompt_length: int):
        self.ids = ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        """Takes (batch, length) ids and (batch, vocabulary) scores; the forbidden become −inf."""
        frame, slot = divmod(input_ids.shape[1] - self.prompt_length, SLOTS)
        start = self.ids.audio + slot * self.ids.codebook_size
        codes = slice(start, start + self.ids.codebook_size)
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, codes] = scores[:, codes]
        if slot == 0 and frame > 0:
            allowed[:, self.ids.eos] = scores[:, self.ids.eos]
        return allowed


def generate_with_transformers(
    model, rows: list[Utterance], ids: SpeechIds, settings: Settings
) -> None:
    """Generates `rows` by `model.generate`, for models that Unsloth has patched.

    Greedy codes are the same as those of `speak_frames`. Sampled codes are not, since torch draws
    the random numbers, but the same seed gives the same codes again.
    """
    batch = start_batch(model, rows, ids, settings.seed, static=False)
    length = batch.tokens.shape[1]
    sampling = {"do_sample": settings.temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    torch.manual_seed(settings.seed)
    generated = model.generate(
        input_ids=batch.tokens,
        attention_mask=batch.mask[:, :length].long(),
        max_new_tokens=max(row.max_frames for row in rows) * SLOTS + 1,  # one for the end token
        max_length=None,  # Unsloth's models have one, and transformers would warn of it
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=ids.eos,
        pad_token_id=ids.eos,
        use_cache=True,
        logits_processor=[SlotProcessor(ids, length)],
        **sampling,
    )
    for row, speech in zip(rows, generated[:, length:].cpu().numpy(), strict=True):
        end = next(iter(np.flatnonzero(speech == ids.eos)), len(speech))
        frames = min(end // SLOTS, row.max_frames)
        row.end = BY_ITSELF if frames * SLOTS == end < len(speech) else CUT_OFF
        row.frames = list(ids_to_codes(speech[: frames * SLOTS], ids))


def generate_batch(
    model, rows: list[Utterance], ids: SpeechIds, settings: Settings, pace: float | None = None
) -> None:
    """Generates `rows` to their ends in one batch; with `best_of`, failed candidates end early."""
    if type(model.get_decoder()).forward.__module__.startswith("unsloth"):
        generate_with_transformers(model, rows, ids, settings)  # no cache of ours works there
        return
    for frame, _ in enumerate(speak_frames(model, rows, ids, settings)):
        if settings.best_of > 1 and frame % 6 == 5:  # twice a second
            for row in rows:
                row.end = row.end or detect_failure(row, pace)


def speak_best(
    groups: list[list[Utterance]], model, codec, ids: SpeechIds, settings: Settings, pace, judges
) -> Iterator[Utterance]:
    """Generates groups of candidates of one text, in batches, and yields the best of each group."""
    size = max(1, settings.speak_batch_size // settings.best_of)
    for start in range(0, len(groups), size):
        batch = groups[start : start + size]
        rows = [row for group in batch for row in group]
        generate_batch(model, rows, ids, settings, pace)
        if settings.best_of == 1:
            yield from rows
            continue
        for row in rows:
            pieces = decode_stream(codec, row.frames, seed=settings.seed)
            row.audio = np.concatenate(list(pieces))
        yield from [choose_best(group, pace, judges) for group in batch]


def synthesize(
    texts: list[str],
    model,
    tokenizer,
    codec,
    settings: Settings,
    voice: str | None,
    pace: float | None = None,
    judges: list[Judge] | None = None,
    stream: bool = False,
) -> Iterator[tuple[list[Utterance], Iterator[np.ndarray]]]:
    """Yields for each text the Utterances of its parts, and its samples in pieces.

    Texts are generated in batches, when the first of a batch is asked for. In a stream, each part
    is generated while its pieces are taken, and `best_of` must be 1.
    """
    ids = read_speech_ids(tokenizer, codec.codebook_size)

    def make_candidates(part):
        common = model.config, tokenizer, ids, part, settings, voice
        return [make_utterance(*common, n) for n in range(settings.best_of)]

    def decode_part(row):
        if row.audio is not None:  # decoded already, for its scores
            return [row.audio]
        frames = row.frames
        if stream:
            frames = (row.frames[-1] for _ in speak_frames(model, [row], ids, settings))
        return decode_stream(codec, frames, seed=settings.seed)

    lines = [[make_candidates(part) for part in parts_of(text, settings)] for text in texts]
    groups = [group for line in lines for group in line]
    if stream:
        best = (group[0] for group in groups)
    else:
        best = speak_best(groups, model, codec, ids, settings, pace, judges)
    for line in lines:
        rows = list(islice(best, len(line)))
        yield rows, concat_with_pauses([decode_part(row) for row in rows])


def save_speech(
    lines: Iterator[tuple[list[Utterance], Iterable[np.ndarray]]],
    path: Path,
    stream: bool = False,
    keep: bool = True,
    quiet: bool = False,
) -> tuple[np.ndarray, list[Utterance]]:
    """Writes the next of `lines`, as `synthesize` yields them, and prints a line unless `quiet`.

    The file is opened first, so that one which cannot be written is reported before anything is
    generated.

    Returns:
        (samples,) of the speech, empty unless `keep`, and its Utterances.
    """
    started, length, first, kept = time.perf_counter(), 0, 0, [np.zeros(0, np.float32)]
    with (streamed_audio if stream else audio_file)(path) as write:
        rows, pieces = next(lines)
        for piece in pieces:
            write(piece)
            first = first or time.perf_counter() - started
            length += len(piece)
            kept += [piece] if keep else []
    seconds, spent = length / SAMPLE_RATE, time.perf_counter() - started
    message = f"{path}  {seconds:.2f} s of audio in {spent:.2f} s, {format_end(rows)}"
    if stream:
        message += f"; first audio after {first:.2f} s, real-time factor {spent / seconds:.2f}"
    if not quiet:
        print(message, flush=True)
    return np.concatenate(kept), rows


def speak(
    texts: list[str],
    paths: list[Path],
    model,
    tokenizer,
    codec,
    settings: Settings,
    voice: str | None,
    *,
    pace: float | None = None,
    judges: list[Judge] | None = None,
    stream: bool = False,
    keep: bool = True,
    quiet: bool = False,
) -> list[tuple[np.ndarray, bool]]:
    """Speaks each text to its path, and prints a line about it, unless `quiet`, and its scores.

    Args:
        pace: the voice's, in seconds a character, for the scores and to detect runaways.
        judges: as `load_judges` returns them; None prints no scores.
        stream: write each piece of audio as soon as it can be decoded.
        keep: return the samples.

    Returns:
        for each text its (samples,), empty unless `keep`, and whether it ended by itself.
    """
    lines = synthesize(texts, model, tokenizer, codec, settings, voice, pace, judges, stream)
    results = []
    for text, path in zip(texts, paths, strict=True):
        audio, rows = save_speech(lines, path, stream, keep, quiet)
        if judges is not None:
            print(f"        {format_scores(measure(audio, text, pace, judges))}")
        results.append((audio, all(row.end == BY_ITSELF for row in rows)))
    return results
