"""The speech language of Orpheus: special tokens, the prompt, slots ↔ codes ↔ ids."""

import re
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from unicodedata import category, east_asian_width

import numpy as np
import sentencex

from orpheus.settings import SpeakingSettings, UserError, read_text

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
    """Look up the ids by their names; raises a UserError if the tokenizer lacks one of them."""
    vocabulary = tokenizer.get_vocab()
    source = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
    last = f"<custom_token_{9 + SLOTS * codebook_size}>"
    missing = [name for name in [*TOKEN_NAMES.values(), last] if name not in vocabulary]
    if missing:
        raise UserError(f"{source}: no token {missing[0]}: not an Orpheus model for this codec")
    ids = {field: vocabulary[name] for field, name in TOKEN_NAMES.items()}
    if vocabulary[last] != ids["audio"] + SLOTS * codebook_size - 1:
        raise UserError(f"{source}: its audio tokens are not in order: not an Orpheus model")
    return SpeechIds(**ids, codebook_size=codebook_size)


TAG = re.compile(r"<\w+>")  # an emotion tag, as <laugh>
# Seconds that a slow voice takes for a character: an alphabet's, and one that is a syllable or
# more, as in Chinese, Japanese and Korean. A voice that is known can be 1.4 times as slow.
SLOW, SLOW_WIDE, SLOWER = 0.1, 0.3, 1.4


def split_text(text: str, settings: SpeakingSettings, pace: float | None = None) -> list[str]:
    """Split a text into parts that take at most `max_seconds`, and fold its white space.

    Parts are whole sentences, by the rules of `language`. A sentence that is too long is split
    between words or after commas of full width, and where there are none, anywhere. `pace` is the
    voice's, in seconds a character, if it is known. Raises a UserError for a text without a letter
    or digit.
    """
    text = " ".join(text.split())
    if not any(map(str.isalnum, text)):
        raise UserError(f"{text[:40]!r}: nothing to speak: no letter or digit")
    wide = sum(east_asian_width(character) in "WF" for character in text) / len(text)
    slow = pace * SLOWER if pace else SLOW + (SLOW_WIDE - SLOW) * wide
    most = max(20, int(settings.max_seconds / slow))  # characters
    sentences = sentencex.segment(settings.language, text) if len(text) > most else []
    ends = [0, *(len(text[:end].rstrip()) for end in accumulate(map(len, sentences)))]
    breaks = [0, *(match.start() for match in re.finditer(r" |(?<=[、，；：])", text))]
    parts, start = [], 0
    while len(text) - start > most:
        limit = start + most
        cuts = [cuts[bisect_right(cuts, limit) - 1] for cuts in (ends, breaks)]
        cut = next((cut for cut in cuts if cut > start), limit)
        while category(text[cut])[0] == "M" and cut > start + 1:  # an accent stays with its letter
            cut -= 1
        parts.append(text[start:cut])
        start = cut + (text[cut] == " ")
    return [part for part in [*parts, text[start:]] if any(map(str.isalnum, part))]


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file: its paragraphs if empty lines separate any, otherwise its lines.

    Prints which. Raises a UserError for a file that is empty or a table.
    """
    if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        raise UserError(f"{path}: a table; give a text file, or see python -m orpheus.evaluate")
    text, kind = read_text(path).strip(), "paragraphs"
    texts = re.split(r"\n\s*\n", text)
    if len(texts) == 1:
        texts, kind = text.split("\n"), "lines"
    if not texts[0]:
        raise UserError(f"{path}: the text is empty; give some to say")
    print(f"texts    {path}: {len(texts)} {kind}, each a text of its own")
    return texts


def prompt_ids(tokenizer, ids: SpeechIds, text: str, voice: str | None = None) -> list[int]:
    """Return the prompt of training and of generation: SOH BOS "voice: text" EOT EOH SOA SOS.

    White space is folded. Text that looks like a special token is tokenised as text. Raises a
    UserError if the text is empty.
    """
    return prompts_ids(tokenizer, ids, [(text, voice)])[0]


def prompts_ids(tokenizer, ids: SpeechIds, texts: list[tuple[str, str | None]]) -> list[list[int]]:
    """Return the prompts of (text, voice) pairs, as `prompt_ids` makes them, but faster."""
    texts = [(" ".join(text.split()), voice) for text, voice in texts]
    if not all(text for text, _ in texts):
        raise UserError("the text is empty")
    named = [f"{voice}: {text}" if voice else text for text, voice in texts]
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    tokenised = tokenizer(named, return_attention_mask=False, **options)["input_ids"]
    start, end = [ids.soh, ids.bos], [ids.eot, ids.eoh, ids.soa, ids.sos]
    return [[*start, *text, *end] for text in tokenised]


def count_pieces(texts: Iterable[str], tokenizer) -> dict[str, int]:
    """Return the characters for which the tokenizer has no token of their own, and their tokens.

    The bytes of a letter of another alphabet are then learnt from the clips alone.
    """
    characters = sorted({c for text in texts if not text.isascii() for c in text})
    pieces = {c: len(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in characters}
    return {character: count for character, count in pieces.items() if count > 1}


def codes_to_ids(codes: np.ndarray, ids: SpeechIds) -> np.ndarray:
    """Return the (frames × 7,) ids of (frames, 7) codes: audio + code + codebook_size × slot."""
    codes = np.asarray(codes, dtype=np.int64).reshape(-1, SLOTS)
    assert codes.size == 0 or 0 <= codes.min() <= codes.max() < ids.codebook_size, codes.max()
    return (codes + ids.audio + ids.codebook_size * np.arange(SLOTS)).reshape(-1)


def ids_to_codes(speech: np.ndarray, ids: SpeechIds) -> np.ndarray:
    """Return the (frames, 7) codes of (frames × 7,) ids; a UserError names one out of its slot."""
    speech = np.asarray(speech, dtype=np.int64)
    if speech.size % SLOTS:
        raise UserError(f"{speech.size} audio ids are not whole frames of {SLOTS}")
    codes = speech.reshape(-1, SLOTS) - ids.audio - ids.codebook_size * np.arange(SLOTS)
    wrong = np.flatnonzero((codes < 0) | (codes >= ids.codebook_size))
    if wrong.size:
        position = int(wrong[0])
        frame, slot = divmod(position, SLOTS)
        own_slot = (int(speech[position]) - ids.audio) // ids.codebook_size
        fault = f"belongs in slot {own_slot}" if 0 <= own_slot < SLOTS else "is not an audio id"
        place = f"position {position} (frame {frame}, slot {slot})"
        raise UserError(f"id {speech[position]} at {place} {fault}")
    return codes


# The order in which SNAC's three levels, laid side by side as (frames, 1 + 2 + 4), become slots 0
# to 6, and the inverse permutation.
LEVELS_TO_SLOTS = [0, 1, 3, 4, 2, 5, 6]
SLOTS_TO_LEVELS = [0, 1, 4, 2, 3, 5, 6]


def levels_to_slots(levels: list[np.ndarray]) -> np.ndarray:
    """Return SNAC's levels, (…, T), (…, 2T) and (…, 4T), as (…, T, 7) codes in slot order."""
    levels = [level.reshape(*levels[0].shape, -1) for level in levels]
    return np.concatenate(levels, axis=-1)[..., LEVELS_TO_SLOTS]


def slots_to_levels(codes):
    """Return a (batch, T, 7) tensor in slot order as SNAC's levels, (batch, T), 2T and 4T."""
    levels = codes[..., SLOTS_TO_LEVELS].split([1, 2, 4], dim=-1)
    return [level.flatten(1) for level in levels]


FIRST_CUSTOM_TOKEN = 128_256  # the id of <custom_token_0> in Orpheus


def orpheus_ids(codebook_size: int = 4096) -> SpeechIds:
    """Return the ids of Orpheus's own tokenizer, for use without it."""
    first = FIRST_CUSTOM_TOKEN
    return SpeechIds(128_000, 128_009, *range(first + 1, first + 8), first + 10, codebook_size)


def read_tokens(path: Path, tokenizer=None, codebook_size: int = 4096) -> np.ndarray:
    """Return the (frames, 7) codes among the ids that another program printed.

    These are `<custom_token_N>`, escaped or not, or numbers: those of lists, tuples, arrays and
    tensors if there are any, else between white space or commas. Numbers are looked up in
    `tokenizer`; without it they are Orpheus's own. All whole frames are read, also those after an
    end token. The positions of other ids after the prompt are printed, but of control tokens.

    Raises:
        UserError: the file holds anything else or no whole frame.
    """
    text = read_text(path)
    names = re.findall(r"custom_token_(\d+)", text)
    lists = re.findall(r"[\[(]([-\d,\s]*\d[-\d,\s]*)[\])]", text)
    words = names or re.split(r"[\s,]+", " ".join(lists or [text]).strip(" ,\n"))
    if not all(re.fullmatch(r"-?\d+", word) for word in words):
        raise UserError(f"{path}: neither <custom_token_N> nor a list of ids without a gap")
    numbers = [int(word) if len(word) < 10 else -1 for word in words]  # no id is longer
    speech = np.array(numbers, dtype=np.int64) + (FIRST_CUSTOM_TOKEN if names else 0)
    own = tokenizer is not None and not names
    ids = read_speech_ids(tokenizer, codebook_size) if own else orpheus_ids(codebook_size)
    codes, left_out = whole_frames(speech, ids)
    if not len(codes):
        frame = f"{SLOTS} audio ids for a codec of {codebook_size} codes a slot"
        raise UserError(f"{path}: no whole frame of {frame}")
    left_out = left_out[left_out >= np.argmax(speech == ids.sos)]
    left_out = left_out[~np.isin(speech[left_out], ids[:-2])]
    if left_out.size:
        positions = ", ".join(map(str, left_out[:10])) + (", …" if left_out.size > 10 else "")
        count = f"{left_out.size} ids that belong to no whole frame"
        print(f"{path}: left out {count}, at positions {positions}")
    return codes


def whole_frames(speech: np.ndarray, ids: SpeechIds) -> tuple[np.ndarray, np.ndarray]:
    """Find the whole frames in (n,) ids that a model generated without constraints.

    Returns:
        (frames, 7) codes of every run of seven ids of slots 0 to 6, and the positions of all other
        ids.
    """
    slots = (speech - ids.audio) // ids.codebook_size  # only audio ids have a slot from 0 to 6
    if len(slots) < SLOTS:
        return np.empty((0, SLOTS), dtype=np.int64), np.arange(len(slots))
    windows = np.lib.stride_tricks.sliding_window_view(slots, SLOTS)
    starts = np.flatnonzero((windows == np.arange(SLOTS)).all(axis=1))  # these cannot overlap
    inside = starts[:, None] + np.arange(SLOTS)
    return ids_to_codes(speech[inside].ravel(), ids), np.setdiff1d(np.arange(len(slots)), inside)


def whole_numbers(name: str, values) -> np.ndarray:
    """Return the (n,) int64 values of a list, which a UserError names if they are none."""
    try:
        array = np.asarray(values).reshape(-1)
    except ValueError:  # a ragged list
        array = np.array([None])
    if array.size and array.dtype.kind not in "iu":
        raise UserError(f"{name} are not a list of whole numbers")
    return array.astype(np.int64)


def read_codes(codes, ids: SpeechIds) -> np.ndarray:
    """Return the (frames, 7) codes of a dataset's row, or raise a UserError that says what it is.

    They are SNAC's three levels of lengths 1:2:4, or in slot order, as codes or as ids.
    """
    levels = len(codes) == 3 and all(np.ndim(level) == 1 for level in codes)
    if levels and len(codes[2]) == 2 * len(codes[1]) == 4 * len(codes[0]):
        codes = levels_to_slots([np.asarray(level) for level in codes])
    codes = whole_numbers("codes", codes)
    if codes.size % SLOTS:
        raise UserError(f"codes are neither frames of {SLOTS} nor levels of 1:2:4")
    codes, bounds = codes.reshape(-1, SLOTS), f"codes go from 0 to {ids.codebook_size - 1}"
    if not len(codes):
        raise UserError(f"no frame: {bounds}")
    if ids.audio <= codes.min() and codes.max() < ids.audio + SLOTS * ids.codebook_size:
        return ids_to_codes(codes.ravel(), ids)
    wrong = np.argwhere((codes < 0) | (codes >= ids.codebook_size))
    if len(wrong):
        raise UserError(f"code {codes[tuple(wrong[0])]} in frame {wrong[0][0]}: {bounds}")
    return codes


def split_row(columns: dict, ids: SpeechIds) -> list[dict[str, np.ndarray]]:
    """Return arrays of `input_ids` and `labels` for each clip in a pre-tokenised row.

    A clip goes from SOH (or BOS) to EOS and EOA. What stands outside of clips is padding, or a part
    of one that was cut, and is left out, as is what an `attention_mask` hides. Without labels, the
    loss is computed on all ids after SOS.
    """
    names = ("input_ids", "labels", "attention_mask")
    row = {n: whole_numbers(n, columns[n]) for n in names if columns.get(n) is not None}
    size = len(row["input_ids"])
    for name, values in row.items():
        if len(values) != size:
            raise UserError(f"{len(values)} {name} for {size} input_ids")
    kept = (row["input_ids"] != ids.pad) & (row.pop("attention_mask", np.ones(size)) != 0)
    row = {name: values[kept] for name, values in row.items()}
    input_ids = row["input_ids"]
    clips, end = [], 0
    for sos in np.flatnonzero(input_ids == ids.sos):
        if sos < end:
            continue  # among the codes of a clip, where `check_row` finds it
        prompt = input_ids[end:sos]
        heads = np.flatnonzero(prompt == (ids.soh if ids.soh in prompt else ids.bos))
        start = end + (heads[-1] if len(heads) else 0)
        start -= start > end and input_ids[start - 1] == ids.bos
        length = np.argmax(input_ids[sos:] == ids.eos)
        end = sos + length + 1 if length else len(input_ids)
        end += end < len(input_ids) and input_ids[end] == ids.eoa
        clip = {name: values[start:end] for name, values in row.items()}
        masked = np.where(np.arange(start, end) <= sos, -100, clip["input_ids"])
        clips.append({"labels": masked} | clip)
    if not clips:
        raise UserError(f"no SOS (id {ids.sos}) among its input_ids")
    return clips


def check_row(row: dict[str, np.ndarray], ids: SpeechIds) -> np.ndarray:
    """Return the (frames, 7) codes of a clip that `split_row` found.

    Raises:
        UserError: ids that the base does not have, no whole frames or EOS, or labels that train
            something else or nothing.
    """
    input_ids, labels = row["input_ids"], row["labels"]
    end = ids.audio + SLOTS * ids.codebook_size
    if (wrong := np.flatnonzero((input_ids < 0) | (input_ids >= end))).size:
        place = f"id {input_ids[wrong[0]]} at position {wrong[0]} of its input_ids"
        raise UserError(f"{place}: ids go from 0 to {end - 1}")
    speech = input_ids[np.argmax(input_ids == ids.sos) + 1 :]
    if ids.eos not in speech:
        raise UserError(f"no EOS (id {ids.eos}) among its input_ids")
    codes = ids_to_codes(speech[: np.argmax(speech == ids.eos)], ids)
    if not len(codes):
        raise UserError("no frame between its SOS and EOS")
    if (wrong := np.flatnonzero((labels != -100) & (labels != input_ids))).size:
        place = f"label {labels[wrong[0]]} at position {wrong[0]}"
        raise UserError(f"{place} is neither -100 nor the input id there, {input_ids[wrong[0]]}")
    if (labels == -100).all():
        raise UserError("every label is -100: the row trains nothing")
    return codes


def read_prompt(input_ids: np.ndarray, tokenizer, ids: SpeechIds) -> str:
    """Return the text of a row's prompt, with the voice's name: no control token before SOS."""
    prompt = input_ids[: np.argmax(input_ids == ids.sos)]
    text = tokenizer.decode(prompt[~np.isin(prompt, ids[:-1])]).strip()
    if not text:
        raise UserError("no text in its prompt")
    return text
