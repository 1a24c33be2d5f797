"""The speech language of Orpheus: special tokens, the prompt, slots ↔ codes ↔ ids."""

import re
from collections import namedtuple
from pathlib import Path

import numpy as np

from orpheus.settings import UserError, read_text

SAMPLE_RATE = 24_000  # Hz
FRAME_SAMPLES = 2_048  # samples in one frame of 7 ids, 85.3 ms
SLOTS = 7
# In Orpheus `<custom_token_N>` is 128256 + N; BOS and EOT are Llama 3's (github.com/canopyai).
TOKEN_NAMES = {
    "bos": "<|begin_of_text|>",
    "eot": "<|eot_id|>",
    "sos": "<custom_token_1>",
    "eos": "<custom_token_2>",
    "soh": "<custom_token_3>",
    "eoh": "<custom_token_4>",
    "soa": "<custom_token_5>",
    "eoa": "<custom_token_6>",
    "pad": "<custom_token_7>",
    "audio": "<custom_token_10>",  # the first of 7 × codebook_size audio ids
}
SpeechIds = namedtuple("SpeechIds", [*TOKEN_NAMES, "codebook_size"])


def read_speech_ids(tokenizer, codebook_size: int = 4096) -> SpeechIds:
    """The ids, by name; `UserError` for a tokenizer that lacks one of them."""
    vocabulary = tokenizer.get_vocab()
    last = f"<custom_token_{9 + SLOTS * codebook_size}>"
    missing = [name for name in [*TOKEN_NAMES.values(), last] if name not in vocabulary]
    if missing:
        where = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise UserError(f"{where}: no token {missing[0]}: not an Orpheus model for this codec")
    ids = {field: vocabulary[name] for field, name in TOKEN_NAMES.items()}
    if vocabulary[last] != ids["audio"] + SLOTS * codebook_size - 1:
        where = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise UserError(f"{where}: its audio tokens are not in order: not an Orpheus model")
    return SpeechIds(**ids, codebook_size=codebook_size)


def prompt_ids(tokenizer, ids: SpeechIds, text: str, voice: str | None = None) -> list[int]:
    """SOH BOS "voice: text" EOT EOH SOA SOS: the one prompt of training and of speaking.

    White space is folded. What looks like a special token in `text` stays text.
    """
    line = " ".join(text.split())
    if not line:
        raise UserError("the text is empty")
    if voice:
        line = f"{voice}: {line}"
    keys = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    words = tokenizer(line, **keys)["input_ids"]
    return [ids.soh, ids.bos, *words, ids.eot, ids.eoh, ids.soa, ids.sos]


def codes_to_ids(codes: np.ndarray, ids: SpeechIds) -> np.ndarray:
    """(frames, 7) codes in slot order → (frames × 7,) ids: audio + code + codebook_size × slot."""
    codes = np.asarray(codes, dtype=np.int64).reshape(-1, SLOTS)
    assert codes.size == 0 or 0 <= codes.min() <= codes.max() < ids.codebook_size, codes.max()
    return (codes + ids.audio + ids.codebook_size * np.arange(SLOTS)).reshape(-1)


def ids_to_codes(speech: np.ndarray, ids: SpeechIds) -> np.ndarray:
    """(frames × 7,) ids → (frames, 7) codes; `UserError` names the first id in a wrong slot."""
    speech = np.asarray(speech, dtype=np.int64)
    if speech.size % SLOTS:
        raise UserError(f"{speech.size} audio ids are no whole frames of {SLOTS}")
    codes = speech.reshape(-1, SLOTS) - ids.audio - ids.codebook_size * np.arange(SLOTS)
    wrong = np.flatnonzero((codes < 0) | (codes >= ids.codebook_size))
    if wrong.size:
        at = int(wrong[0])
        slot = (int(speech[at]) - ids.audio) // ids.codebook_size
        fault = f"belongs in slot {slot}" if 0 <= slot < SLOTS else "is no audio id"
        place = f"position {at} (frame {at // SLOTS}, slot {at % SLOTS})"
        raise UserError(f"id {speech[at]} at {place} {fault}")
    return codes


# SNAC's three levels side by side, (frames, 1 + 2 + 4), are slots 0 to 6 in this order, and back.
LEVELS_TO_SLOTS = [0, 1, 3, 4, 2, 5, 6]
SLOTS_TO_LEVELS = [0, 1, 4, 2, 3, 5, 6]


def levels_to_slots(levels: list[np.ndarray]) -> np.ndarray:
    """SNAC's three levels, (…, T), (…, 2T) and (…, 4T) → (…, T, 7) codes in slot order."""
    side = [level.reshape(*levels[0].shape, -1) for level in levels]
    return np.concatenate(side, axis=-1)[..., LEVELS_TO_SLOTS]


def slots_to_levels(codes):
    """A (batch, T, 7) tensor of codes in slot order → SNAC's levels, (batch, T), 2T and 4T."""
    parts = codes[..., SLOTS_TO_LEVELS].split([1, 2, 4], dim=-1)
    return [part.flatten(1) for part in parts]


def read_tokens(path: Path, tokenizer=None, codebook_size: int = 4096) -> np.ndarray:
    """(frames, 7) codes from a JSON list, ids between white space, or `<custom_token_N>` text.

    Plain ids need the tokenizer that made them; without one they are Orpheus's own. Every whole
    frame counts, after an end token, too. Other ids are reported, but for prompt and control ids.
    """
    text = read_text(path)
    named = re.findall(r"<custom_token_(\d+)>", text)
    first = 128_256  # <custom_token_0> of Orpheus
    ids = SpeechIds(128_000, 128_009, *range(first + 1, first + 8), first + 10, codebook_size)
    if tokenizer is not None and not named:
        ids = read_speech_ids(tokenizer, codebook_size)
    words = named or re.sub(r"[\[\],]", " ", text).split()
    if not all(re.fullmatch(r"-?\d+", word) for word in words):
        raise UserError(f"{path}: neither a list of ids nor <custom_token_N> text")
    numbers = [int(word) if len(word) < 10 else -1 for word in words]  # no id is that large
    numbers = np.array(numbers, dtype=np.int64) + (first if named else 0)
    codes, left_out = whole_frames(numbers, ids)
    if not len(codes):
        raise UserError(f"{path}: no whole frame of {SLOTS} audio ids in it")
    prompt = np.argmax(numbers == ids.sos)  # the length of what stands before SOS; 0 without one
    control = np.isin(numbers[left_out], ids[:-2])
    left_out = left_out[(left_out >= prompt) & ~control]
    if left_out.size:
        places = ", ".join(map(str, left_out[:10])) + (", …" if left_out.size > 10 else "")
        print(f"{path}: left out {left_out.size} ids that belong to no whole frame, at {places}")
    return codes


def whole_frames(speech: np.ndarray, ids: SpeechIds) -> tuple[np.ndarray, np.ndarray]:
    """The whole frames among ids that a model wrote without constraint.

    Args:
        speech: (n,) ids.

    Returns:
        (frames, 7) codes of every run of seven ids of slots 0 to 6, and the positions in `speech`
        of all other ids.
    """
    slots = (speech - ids.audio) // ids.codebook_size  # no id but those of audio is in 0 to 6
    if len(slots) < SLOTS:
        return np.empty((0, SLOTS), dtype=np.int64), np.arange(len(slots))
    windows = np.lib.stride_tricks.sliding_window_view(slots, SLOTS)
    starts = np.flatnonzero((windows == np.arange(SLOTS)).all(axis=1))  # these cannot overlap
    inside = starts[:, None] + np.arange(SLOTS)
    return ids_to_codes(speech[inside].ravel(), ids), np.setdiff1d(np.arange(len(slots)), inside)


def whole_numbers(values) -> np.ndarray:
    """An int64 array; a ValueError for anything that is not a whole number, or a ragged list."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(array.dtype)
    return array.astype(np.int64)


def read_codes(codes, size: int) -> np.ndarray:
    """(frames, 7) codes in slot order from three SNAC levels of 1:2:4, or from a list in order."""
    try:
        if len(codes) == 3 and [len(level) for level in codes] == [
            len(codes[0]) * n for n in (1, 2, 4)
        ]:
            codes = levels_to_slots([np.asarray(level) for level in codes])
        codes = whole_numbers(codes).reshape(-1, SLOTS)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"codes are neither frames of {SLOTS} nor levels of 1:2:4") from None
    wrong = np.argwhere((codes < 0) | (codes >= size))
    if len(wrong) or not len(codes):
        told = f"code {codes[tuple(wrong[0])]} in frame {wrong[0][0]}" if len(wrong) else "no frame"
        raise UserError(f"{told}: codes go from 0 to {size - 1}")
    return codes


def check_row(made: dict, ids) -> dict:
    """input_ids and labels as arrays; without labels, the loss is on all that follows SOS."""
    try:
        row = whole_numbers(made["input_ids"]).reshape(-1)
        labels = made.get("labels")
        labels = None if labels is None else whole_numbers(labels).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise UserError("input_ids or labels are not a list of whole numbers") from None
    most = ids.audio + SLOTS * ids.codebook_size
    if (wrong := np.flatnonzero((row < 0) | (row >= most))).size:
        place = f"id {row[wrong[0]]} at position {wrong[0]} of its input_ids"
        raise UserError(f"{place}: ids go from 0 to {most - 1}")
    for name, wanted in (("SOS", ids.sos), ("EOS", ids.eos)):
        if wanted not in row:
            raise UserError(f"no {name} (id {wanted}) among its input_ids")
    if labels is None:
        labels = np.where(np.arange(len(row)) <= np.argmax(row == ids.sos), -100, row)
    if len(labels) != len(row):
        raise UserError(f"{len(labels)} labels for {len(row)} input_ids")
    return {"input_ids": row, "labels": labels}


def check_labels(input_ids: np.ndarray, labels: np.ndarray) -> None:
    """`UserError` for a label that is neither −100 nor the id at its place, or if all are −100."""
    if (wrong := np.flatnonzero((labels != -100) & (labels != input_ids))).size:
        place = f"label {labels[wrong[0]]} at position {wrong[0]}"
        raise UserError(f"{place} is neither -100 nor the input id there, {input_ids[wrong[0]]}")
    if (labels == -100).all():
        raise UserError("every label is -100: the row trains nothing")
