"""Constrained sampling: batches, streams, long texts, the best of several candidates."""

import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from orpheus.audio import audio_file, streamed_audio
from orpheus.codec import decode_stream
from orpheus.scoring import (
    BY_ITSELF,
    CUT_OFF,
    Utterance,
    detect_failure,
    format_scores,
    measure,
    rank,
    rejection_reason,
)
from orpheus.settings import Settings, UserError
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    SpeechIds,
    ids_to_codes,
    prompt_ids,
    read_speech_ids,
)


def make_utterance(
    model, tokenizer, ids: SpeechIds, text: str, settings: Settings, voice, candidate=0
):
    """The Utterance of `text`, nothing spoken yet; `UserError` where a frame would not fit."""
    prompt = prompt_ids(tokenizer, ids, text, voice)
    frames = int(settings.max_seconds * SAMPLE_RATE / FRAME_SAMPLES)
    room = (model.config.max_position_embeddings - len(prompt) - 1) // SLOTS  # frames
    if min(frames, room) < 1:
        what = f"a text of {len(prompt)} tokens leaves no room for a frame of speech; shorten it"
        if frames < 1:
            what = f"max_seconds {settings.max_seconds} is less than a frame of speech; raise it"
        raise UserError(f"{text[:40]!r}: {what}")
    return Utterance(text, prompt, min(frames, room), candidate)


def make_slot_logits(model, ids: SpeechIds):
    """score(hidden, slot): (rows, width) → (rows, codebook_size + 1), the slot's codes and the end.

    Of a plain head only those rows are multiplied: 4,097 of Orpheus's 156,940.
    """
    import torch

    head, size, end = model.get_output_embeddings(), ids.codebook_size, slice(ids.eos, ids.eos + 1)
    plain = type(head) is torch.nn.Linear and head.bias is None  # else quantised or wrapped

    def score(hidden, slot: int):
        codes = slice(ids.audio + slot * size, ids.audio + (slot + 1) * size)
        if plain:
            parts = [torch.nn.functional.linear(hidden, head.weight[s]) for s in (codes, end)]
        else:
            whole = head(hidden)
            parts = [whole[:, s] for s in (codes, end)]
        return torch.cat(parts, dim=-1).float()

    return score


def sample_codes(scores, used, settings: Settings, chance):
    """(rows, choices) scores, the same of bool: drawn before; (rows,) chances under 1 → choices."""
    import torch

    if (penalty := settings.repetition_penalty) != 1:
        lower = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(used, lower, scores)
    if settings.temperature == 0:
        return scores.argmax(-1)
    shares, order = (scores / settings.temperature).softmax(-1).sort(descending=True)
    shares.masked_fill_(shares.cumsum(-1) - shares >= settings.top_p, 0)
    edges = shares.cumsum(-1)
    at = torch.searchsorted(edges, chance[:, None] * edges[:, -1:], right=True)
    at = at.minimum((shares > 0).sum(-1, keepdim=True) - 1)  # rounding may step past the last
    return order.gather(-1, at)[:, 0]


def start_batch(model, rows: list[Utterance], seed: int, static: bool):
    """Left-padded (rows, length) tokens, mask and positions; (rows, frames, 7) chances; the cache.

    A row's chances come from the seed and its `candidate` alone, whatever else is in the batch.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    longest = max(len(row.prompt) for row in rows)
    frames = max(row.max_frames for row in rows) + 1  # the end token, too
    pads = torch.tensor([longest - len(row.prompt) for row in rows])
    tokens = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows])
    length = longest + frames * SLOTS
    mask = torch.arange(length) >= pads[:, None]
    positions = (torch.arange(longest) - pads[:, None]).clamp(min=0)
    draws = [np.random.default_rng([seed, row.candidate]) for row in rows]
    chances = np.stack([source.random((frames, SLOTS), dtype=np.float32) for source in draws])
    cache = StaticCache(model.config, length) if static else DynamicCache(config=model.config)
    parts = (tokens, mask, positions, torch.from_numpy(chances))
    return *(part.to(model.device) for part in parts), cache


def speak_frames(model, rows: list[Utterance], ids: SpeechIds, settings: Settings, static=None):
    """Generates `rows` as one batch; yields after each frame that unfinished rows have received.

    A row whose `end` is set leaves the batch. With a static cache (on a GPU) it stays in the batch
    and is ignored, so that shapes stay static.
    """
    import torch

    static = torch.cuda.is_available() if static is None else static
    decoder, score, size = model.get_decoder(), make_slot_logits(model, ids), ids.codebook_size
    tokens, mask, positions, chances, cache = start_batch(model, rows, settings.seed, static)
    used = torch.zeros(len(rows), SLOTS, size + 1, dtype=torch.bool, device=model.device)

    def ending(row, code):
        return BY_ITSELF if code == size else CUT_OFF if frame == row.max_frames else ""

    def next_frame(tokens, positions, chances):
        """(rows, n) tokens and their places, (rows, 7) → (rows, 7) codes, next tokens, places."""
        drawn = []
        for slot in range(SLOTS):
            inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
            hidden = decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            scores = score(hidden[:, -1], slot)
            if not slot and not frame and not torch.isfinite(scores).all():
                raise UserError("the model computes NaN: its weights are damaged, or it diverged")
            if slot or not frame:
                scores[:, size] = float("-inf")  # an end is no part of a frame, and not the first
            drawn.append(codes := sample_codes(scores, used[:, slot], settings, chances[:, slot]))
            if not static and slot == 0 and all(map(ending, rows, codes.tolist())):
                break
            used[:, slot].scatter_(1, codes[:, None], True)
            tokens, positions = codes[:, None] + ids.audio + slot * size, positions[:, -1:] + 1
        return torch.stack(drawn, 1), tokens, positions

    for frame in range(chances.shape[1]):
        keep = [n for n, row in enumerate(rows) if not row.end]
        if not keep:
            return
        if len(keep) < len(rows) and not static:
            rows = [rows[n] for n in keep]
            parts = (tokens, mask, positions, chances, used)
            tokens, mask, positions, chances, used = (part[keep] for part in parts)
            cache.batch_select_indices(keep)
        inputs = tokens, positions, chances[:, frame]
        with torch.no_grad():
            if frame == 2 and static and settings.cuda_graph:
                next_frame = capture_cuda_graph(next_frame, inputs)
            codes, tokens, positions = next_frame(*inputs)
        for row, spoken in zip(rows, codes.cpu().numpy(), strict=True):
            row.end = row.end or ending(row, spoken[0])
            row.frames += [] if row.end else [spoken]
        if not all(row.end for row in rows):
            yield


def capture_cuda_graph(work, inputs):
    """`work` as a CUDA graph, one launch instead of thousands: work(*inputs), at this one shape.

    What it returns is overwritten by the next call.
    """
    import torch

    places, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work(*places)

    def replay(*inputs):
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return results

    return replay


class SlotProcessor:
    """A transformers logits processor: only ids that a frame allows next can be sampled.

    Slot s takes the codes of codebook s; the end comes at a frame's edge, never before frame one.
    """

    def __init__(self, ids: SpeechIds, prompt_length: int):
        self.ids = ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        """(batch, length), (batch, vocabulary) → scores, −inf where not allowed."""
        frame, slot = divmod(input_ids.shape[1] - self.prompt_length, SLOTS)
        start = self.ids.audio + slot * self.ids.codebook_size
        allowed = scores.new_full(scores.shape, float("-inf"))
        codes = slice(start, start + self.ids.codebook_size)
        allowed[:, codes] = scores[:, codes]
        if slot == 0 and frame > 0:
            allowed[:, self.ids.eos] = scores[:, self.ids.eos]
        return allowed


def generate_with_transformers(
    model, rows: list[Utterance], ids: SpeechIds, settings: Settings
) -> None:
    """The same by `model.generate`: what Unsloth's patched models can do, and the tests' reference.

    Seeds are torch's here, so that what is sampled is repeatable, but not what speak_frames draws.
    """
    import torch

    tokens, mask, *_ = start_batch(model, rows, settings.seed, static=False)
    sampling = {"do_sample": settings.temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    torch.manual_seed(settings.seed)
    speech = model.generate(
        input_ids=tokens,
        attention_mask=mask[:, : tokens.shape[1]].long(),
        max_new_tokens=max(row.max_frames for row in rows) * SLOTS + 1,  # the end token, too
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=ids.eos,
        pad_token_id=ids.eos,
        use_cache=True,
        logits_processor=[SlotProcessor(ids, tokens.shape[1])],
        **sampling,
    )[:, tokens.shape[1] :]
    for row, spoken in zip(rows, speech.cpu().numpy(), strict=True):
        ends = np.append(np.flatnonzero(spoken == ids.eos), len(spoken))[0]
        row.end = BY_ITSELF if ends < len(spoken) and ends <= row.max_frames * SLOTS else CUT_OFF
        whole = min(ends // SLOTS, row.max_frames) * SLOTS
        row.frames = list(ids_to_codes(spoken[:whole], ids))


def generate_batch(
    model, rows, ids: SpeechIds, settings: Settings, pace: float | None = None
) -> None:
    """Speaks `rows` to their ends in one batch; of several candidates those at fault end early."""
    if type(model.get_decoder()).forward.__module__.startswith("unsloth"):
        generate_with_transformers(
            model, rows, ids, settings
        )  # its forward knows none of these caches
        return
    for frame, _ in enumerate(speak_frames(model, rows, ids, settings)):
        for row in rows if settings.best_of > 1 and frame % 6 == 5 else []:  # twice a second
            row.end = row.end or detect_failure(row, pace)


def generate(model, tokenizer, ids: SpeechIds, text: str, settings: Settings, voice=None):
    """Speaks `text`: (frames, 7) codes, and whether the model ended by itself.

    Where it did not, `settings.max_seconds` or the model's context was reached first.
    """
    row = make_utterance(model, tokenizer, ids, text, settings, voice)
    generate_batch(model, [row], ids, settings)
    return row.codes, row.end == BY_ITSELF


def decode_row(codec, row: Utterance, seed: int, frames=None) -> Iterator[np.ndarray]:
    """Pieces of an utterance's samples; the same, bit for bit, for `frames` of a stream.

    The decoder's noise is seeded, so that an utterance sounds alike wherever it is decoded.
    """
    import torch

    torch.manual_seed(seed)
    codes = row.frames if frames is None else (row.frames[-1] for _ in frames)
    yield from decode_stream(codec, codes)


def speak_best(groups: list, model, codec, ids, settings: Settings, pace, judges) -> list:
    """Speaks every group of candidates, all in one batch, and keeps the best Utterance of each.

    Those that run away or loop leave the batch at once; what is wrong with any is printed.
    """
    rows = [row for group in groups for row in group]
    generate_batch(model, rows, ids, settings, pace)
    if settings.best_of == 1:
        return rows
    best = []
    for group in groups:
        for row in group:
            row.audio = np.concatenate(list(decode_row(codec, row, settings.seed)))
        scores = [measure(row.audio, row.text, pace, judges) for row in group]
        pairs = sorted(zip(group, scores, strict=True), key=lambda pair: rank(*pair))
        faults = [f"{row.candidate + 1} {rejection_reason(row, told)}" for row, told in pairs]
        faults = [line for line in faults if line.split(" ", 1)[1]]
        told = f": {'; '.join(sorted(faults))}" if faults else ""
        kept = f"candidate {pairs[0][0].candidate + 1} of {len(group)}"
        print(f"{group[0].text[:40]!r}: kept {kept}, {len(faults)} at fault{told}")
        best.append(pairs[0][0])
    return best


PAUSE = 0.25  # seconds between the parts of a long text, on top of the silence at clips' ends
FADE = 240  # samples, 10 ms: a part goes into the pause, and comes out of it, without a click
CHARACTERS = 10  # a second, of a slow voice: so a part has room in max_seconds


def split_text(text: str, most: int, language: str = "en") -> list[str]:
    """Parts of at most `most` characters: whole sentences, where one is longer whole words.

    sentencex finds the sentences by the rules of `language`. A long sentence without spaces
    stays whole.
    """
    text, parts = " ".join(text.split()), [""]
    if len(text) <= most:
        return [text]
    from sentencex import segment

    for sentence in segment(language, text):
        for line in textwrap.wrap(sentence, most, break_long_words=False, break_on_hyphens=False):
            if parts[-1] and len(parts[-1]) + 1 + len(line) > most:
                parts.append("")
            parts[-1] = f"{parts[-1]} {line}".strip()
    return parts


def parts_of(text: str, settings: Settings) -> list[str]:
    """The parts in which `text` is spoken, each of which max_seconds has room for."""
    most = max(20, int(settings.max_seconds * CHARACTERS))
    return split_text(text, most, settings.language)


def concat_with_pauses(parts: list):
    """Pieces of samples of each part → of all, with pauses that the parts fade into and out of."""
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    for n, pieces in enumerate(parts):
        held = None  # the last 10 ms, until it is known whether a pause comes
        for piece in pieces:
            if n and held is None:
                piece = np.concatenate([piece[:FADE] * ramp, piece[FADE:]])
            held = piece if held is None else np.concatenate([held, piece])
            yield held[:-FADE]
            held = held[-FADE:]
        assert held is not None, "a part without a frame"
        if n < len(parts) - 1:
            held = np.concatenate([held * ramp[::-1], np.zeros(int(PAUSE * SAMPLE_RATE), "f4")])
        yield held


def save_speech(lines, path: Path, stream: bool = False, keep: bool = True, quiet: bool = False):
    """The next of `lines` to `path`, and a line on what came of it: (samples where kept, rows).

    The file is opened first: one that cannot be written is told before anything is spoken.
    """
    started, length, first, kept = time.perf_counter(), 0, 0, [np.zeros(0, "f4")]
    with (streamed_audio if stream else audio_file)(path) as write:
        rows, pieces = next(lines)
        for piece in pieces:
            write(piece)
            first = first or time.perf_counter() - started
            length += len(piece)
            kept += [piece] if keep else []
    seconds, spent = length / SAMPLE_RATE, time.perf_counter() - started
    told = f"{path}  {seconds:.2f} s of audio in {spent:.2f} s, {format_ending(rows)}"
    if stream:
        told += f"; first audio after {first:.2f} s, real-time factor {spent / seconds:.2f}"
    if not quiet:
        print(told, flush=True)
    return np.concatenate(kept), rows


def format_ending(rows: list[Utterance]) -> str:
    frames, cut = sum(len(row.frames) for row in rows), [r for r in rows if r.end != BY_ITSELF]
    where = f" in {len(cut)} of {len(rows)} parts" if cut and len(rows) > 1 else ""
    return f"{frames} frames, {cut[0].end if cut else BY_ITSELF}{where}"


def synthesize(
    texts, model, tokenizer, codec, settings: Settings, voice, pace=None, judges=None, stream=False
):
    """Each text in turn: its parts as Utterances, and the pieces of samples that they make.

    In a stream one part is spoken at a time, while its pieces are taken.
    """
    ids, best_of = read_speech_ids(tokenizer, codec.codebook_size), range(settings.best_of)

    def candidates(part):
        return [make_utterance(model, tokenizer, ids, part, settings, voice, n) for n in best_of]

    def sound(row):
        if row.audio is not None:  # one of several candidates, decoded to be scored
            return [row.audio]
        frames = speak_frames(model, [row], ids, settings) if stream else None
        return decode_row(codec, row, settings.seed, frames)

    lines = [[candidates(part) for part in parts_of(text, settings)] for text in texts]
    groups, done = [group for line in lines for group in line], []
    at_once = max(1, settings.speak_batch_size // settings.best_of)
    for line in lines:
        rows = [group[0] for group in line]
        if not stream:
            while len(done) < len(line):
                batch, groups = groups[:at_once], groups[at_once:]
                done += speak_best(batch, model, codec, ids, settings, pace, judges)
            rows, done = done[: len(line)], done[len(line) :]
        yield rows, concat_with_pauses([sound(row) for row in rows])


def speak(texts, paths, model, tokenizer, codec, settings: Settings, voice: str | None, **more):
    """Each text to its path, told one by one: [(samples, whether it ended by itself)].

    `more`: as `spoken` takes it, and `keep`: False where the samples are not wanted again.
    """
    keep, quiet, results = more.pop("keep", True), more.pop("quiet", False), []
    stream, pace, judges = (more.get(name) for name in ("stream", "pace", "judges"))
    lines = synthesize(texts, model, tokenizer, codec, settings, voice, **more)
    for text, path in zip(texts, paths, strict=True):
        audio, rows = save_speech(lines, path, stream, keep, quiet)
        if judges is not None:
            print(f"        {format_scores(measure(audio, text, pace, judges))}")
        results.append((audio, all(row.end == BY_ITSELF for row in rows)))
    return results
