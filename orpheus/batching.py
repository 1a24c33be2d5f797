"""Rows of ids, the held-out split, and the arithmetic of packing and padding."""

import math
import re
from bisect import bisect_left, insort

import numpy as np

from orpheus.settings import Settings
from orpheus.tokens import SLOTS, SpeechIds, codes_to_ids

FEW_STEPS = 50  # a run of fewer optimiser steps prints a warning; our choice


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

    A test compares it with TRL, which takes seconds to import.
    """
    space = []  # left in each packed row, ascending
    for length in sorted(lengths, reverse=True):
        best = bisect_left(space, length)
        insort(space, (space.pop(best) if best < len(space) else max_length) - length)
    return len(space)


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
