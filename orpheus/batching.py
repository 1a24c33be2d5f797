"""Rows of ids, held-out split, and the arithmetic of packing and padding."""

from bisect import bisect_left, insort

import numpy as np

from orpheus.settings import Settings
from orpheus.tokens import SLOTS, codes_to_ids


def make_row(prompt: list[int], codes: np.ndarray, ids, settings: Settings) -> dict:
    """Builds one row: `input_ids` (prompt, audio, EOS, EOA), and `labels`, −100 where no loss is.

    With `too_long` "truncate", a row is cut at the end of a frame. Truncated rows get no end
    token, so the model does not learn to stop early.
    """
    ends = [ids.eos, ids.eoa]
    room = (settings.max_length - len(prompt) - len(ends)) // SLOTS  # frames
    if len(codes) > room and settings.too_long == "truncate":
        codes, ends = codes[: max(settings.max_length - len(prompt), 0) // SLOTS], []
    input_ids = np.concatenate([prompt, codes_to_ids(codes, ids), ends]).astype(np.int64)
    labels = input_ids.copy()
    if settings.train_on == "audio":
        labels[: len(prompt)] = -100
    return {"input_ids": input_ids, "labels": labels}


def split_rows(rows: list[dict], settings: Settings) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows held out): a text stands on one side alone, whoever speaks it."""
    texts = sorted({row["text"] for row in rows})
    count = min(round(settings.held_out * len(texts)), len(texts) - 1)
    chosen = np.random.default_rng(settings.seed).permutation(len(texts))[:count]
    aside = {texts[n] for n in chosen}
    held = [row for row in rows if row["text"] in aside]
    return [row for row in rows if row["text"] not in aside], held


def length_batches(lengths: list[int], size: int, seed: int) -> list[int]:
    """Row numbers in an order in which every `size` neighbours are of like length.

    Rows are shuffled, sorted by length within pools of 32 batches, and the batches shuffled again;
    all of it from `seed` alone, so that a resumed run meets the same batches.
    """
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(lengths)).tolist()
    pools = [order[n : n + 32 * size] for n in range(0, len(order), 32 * size)]
    ordered = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
    batches = [ordered[n : n + size] for n in range(0, len(ordered), size)]
    last = batches.pop() if len(batches[-1]) < size else []  # a short batch stays at the end
    draw.shuffle(batches)
    if batches:  # the longest first: what does not fit in memory shows in the first step
        longest = max(range(len(batches)), key=lambda n: lengths[batches[n][-1]])
        batches.insert(0, batches.pop(longest))
    return [row for batch in batches for row in batch] + last


def count_packed(lengths: list[int], room: int) -> int:
    """How many rows of `room` tokens TRL's packing makes: the longest first, each where it fits
    best. (A test asks TRL; importing it here would take seconds.)
    """
    left = []  # of the rows begun, ascending
    for length in sorted(lengths, reverse=True):
        best = bisect_left(left, length)
        insort(left, (left.pop(best) if best < len(left) else room) - length)
    return len(left)


def count_padded(lengths: list[int], size: int, seed: int) -> int:
    """The slots of one epoch's batches of `size` rows, each padded to its longest."""
    order = length_batches(lengths, size, seed)
    batches = [[lengths[row] for row in order[n : n + size]] for n in range(0, len(order), size)]
    return sum(len(batch) * max(batch) for batch in batches)


def slots_used(lengths: list[int], settings: Settings) -> dict[str, float]:
    """Share of the slots of a run's batches that hold a token of a row, by `batching`."""
    longest, size = settings.max_length, settings.per_device_train_batch_size
    slots = {
        "pack": count_packed(lengths, longest) * longest,
        "pad": count_padded(lengths, size, settings.seed),
        "pad_to_max": len(lengths) * longest,
    }
    return {name: sum(lengths) / count for name, count in slots.items()}
