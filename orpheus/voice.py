"""Speaking: a model's folder → a Voice; a text → parts → codes by `generate` → samples."""

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore
from typing import Any, Self

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

from orpheus.audio import concat_with_pauses
from orpheus.codec import decode_stream, load_codec
from orpheus.files import MODEL_FILES, fetch, is_model
from orpheus.models import check_machine, device, load_model, training_dtype
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT, last_checkpoint
from orpheus.scoring import BY_ITSELF, CUT_OFF, detect_failure, measure, rejection_reason
from orpheus.settings import Settings, SpeakingSettings, UserError, read_json, read_settings
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    SpeechIds,
    ids_to_codes,
    prompt_ids,
    read_speech_ids,
    split_text,
)


@dataclass
class Utterance:
    """A text that is spoken in one go, and what has been generated for it."""

    text: str
    prompt: list[int]
    max_frames: int
    candidate: int = 0  # its number among those of best_of; each has its own random numbers
    codes: np.ndarray = field(default_factory=lambda: np.zeros((0, SLOTS), np.int64))  # (frames, 7)
    end: str = ""  # how it ended; empty while it is generated


def sample_codes(
    logits: torch.Tensor, seen: torch.Tensor, settings: SpeakingSettings, uniforms: torch.Tensor
) -> torch.Tensor:
    """Return the (rows,) choices that random numbers of [0, 1) draw from (rows, choices) logits.

    They invert the cumulative distribution. `seen` says where repetition_penalty applies.
    """
    if (penalty := settings.repetition_penalty) != 1:
        penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalized, logits)
    if settings.temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / settings.temperature).softmax(-1).sort(descending=True)
    probs.masked_fill_(probs.cumsum(-1) - probs >= settings.top_p, 0)
    cumulative = probs.cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    index = index.minimum((probs > 0).sum(-1, keepdim=True) - 1)  # rounding may step past the last
    return order.gather(-1, index)[:, 0]


# What a model's own generation_config may say otherwise, and generate would do or warn of
NEUTRAL = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_beams": 1}
NEUTRAL |= {"repetition_penalty": 1.0, "max_length": None}


class SlotSampler(LogitsProcessor):
    """Draws each row's next id, of its slot or the end, and forbids `generate` all others.

    A row's random numbers depend on the seed and its candidate alone, not on the rest of the batch.
    """

    def __init__(self, voice: "Voice", parts: list[Utterance], start: int):
        self.ids, self.settings, self.start = voice.ids, voice.settings, start
        shape = max(part.max_frames for part in parts) + 1, SLOTS  # one more for the end token
        generators = [np.random.default_rng([self.settings.seed, p.candidate]) for p in parts]
        uniforms = np.stack([g.random(shape, dtype=np.float32) for g in generators])
        self.uniforms = torch.from_numpy(uniforms)  # (rows, frames, 7) in [0, 1)
        # (rows, 7, choices), True for what a slot has had before
        self.seen = torch.zeros(len(parts), SLOTS, self.ids.codebook_size + 1, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take (rows, length) ids and (rows, vocabulary) scores; all but one become −inf."""
        frame, slot = divmod(input_ids.shape[1] - self.start, SLOTS)  # after the prompts
        size, end = self.ids.codebook_size, self.ids.eos
        first = self.ids.audio + slot * size
        logits = torch.cat([scores[:, first : first + size], scores[:, end : end + 1]], dim=-1)
        if frame == slot == 0:
            self.uniforms, self.seen = self.uniforms.to(scores.device), self.seen.to(scores.device)
            if not torch.isfinite(logits).all():
                raise UserError("the model computes NaN: its weights are damaged, or it diverged")
        if slot > 0 or frame == 0:
            logits[:, size] = float("-inf")  # an end comes between two frames
        uniforms = self.uniforms[:, frame, slot]
        choice = sample_codes(logits, self.seen[:, slot], self.settings, uniforms)[:, None]
        if self.settings.repetition_penalty != 1:
            self.seen[:, slot].scatter_(1, choice, True)
        chosen = torch.where(choice == size, end, choice + first)
        return scores.fill_(float("-inf")).scatter_(1, chosen, 0.0)


class PartsEnd(StoppingCriteria):
    """Ends each row at its own length and, if there are other candidates, once it has failed."""

    def __init__(self, voice: "Voice", parts: list[Utterance], start: int):
        self.voice, self.parts, self.start = voice, parts, start

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        length, ids = input_ids.shape[1] - self.start, self.voice.ids
        if self.voice.settings.best_of > 1 and length % (6 * SLOTS) == 0:  # twice a second
            for part, speech in zip(self.parts, input_ids[:, self.start :].cpu(), strict=True):
                if ids.eos not in speech:
                    part.codes = ids_to_codes(speech, ids)
                    part.end = detect_failure(part.codes, part.text, self.voice.pace)
        ended = [part.end != "" or length > part.max_frames * SLOTS for part in self.parts]
        return torch.tensor(ended, device=input_ids.device)


class FrameStreamer(BaseStreamer):
    """Hands over (7,) codes of one row, each when `wanted`, so that it does not slow the codec."""

    def __init__(self, ids: SpeechIds):
        self.ids, self.speech, self.closed = ids, [], False
        self.frames, self.wanted = SimpleQueue(), Semaphore(0)

    def put(self, tokens: torch.Tensor) -> None:
        if tokens.numel() > 1:  # the prompt
            return
        self.speech.append(tokens.item())
        if len(self.speech) == SLOTS:
            self.frames.put(ids_to_codes(self.speech, self.ids)[0])
            self.speech.clear()
            self.wanted.acquire()
        if self.closed:  # nobody listens any more
            raise EOFError

    def end(self, *_) -> None:
        self.frames.put(None)


def format_end(parts: list[Utterance]) -> str:
    """How many frames the parts of a text have, and how the first that was cut off ended."""
    frames = sum(len(part.codes) for part in parts)
    ends = [part.end for part in parts if part.end != BY_ITSELF]
    return f"{frames} frames, {ends[0] if ends else BY_ITSELF}"


@dataclass
class Speech:
    """What a text became."""

    text: str
    parts: list[Utterance]  # of a long text several
    pieces: Iterator[np.ndarray]  # of (samples,); to be taken once, unless `audio` is read

    @cached_property
    def audio(self) -> np.ndarray:
        """(samples,) float32 at 24 kHz."""
        return np.concatenate([*self.pieces])

    @property
    def ended(self) -> bool:
        """Whether all parts ended by themselves. In a stream, ask once all pieces are taken."""
        return all(part.end == BY_ITSELF for part in self.parts)


@dataclass
class Voice:
    """Text → speech, by a model and the settings for speaking of its run.

    >>> voice = load_voice("outputs/anna", temperature=0.4)
    >>> samples = voice.say("Good morning.")  # (samples,) float32 at 24 kHz
    >>> soundfile.write("morning.wav", samples, 24_000)
    """

    model: Any
    tokenizer: Any
    codec: Any
    settings: Settings
    name: str | None = None  # of the voice in the prompt
    pace: float | None = None  # seconds a character of the recordings that it was trained on
    folder: Path | None = None  # of the model
    home: Path | None = None  # of the run's saved settings and report
    weights: str = "16bit"  # how those of the base are held, as in training
    dtype: torch.dtype | None = None  # as load_model takes it

    @cached_property
    def ids(self) -> SpeechIds:
        return read_speech_ids(self.tokenizer, self.codec.codebook_size)

    def say(self, text: str | list[str]) -> np.ndarray | list[np.ndarray]:
        """Return (samples,) float32 at 24 kHz, or a list of them for a list of texts."""
        if isinstance(text, str):
            return next(self.speak([text])).audio
        return [speech.audio for speech in self.speak(text)]

    def stream(self, text: str) -> Iterator[np.ndarray]:
        """Yield the same samples as `say` in pieces, each as soon as it can be decoded."""
        return next(self.speak([text], stream=True)).pieces

    def replace(self, **changes) -> Self:
        """Return a copy that shares the model, with another `voice` name or other settings."""
        name = changes.pop("voice", self.name)
        return dataclasses.replace(self, name=name, settings=self.settings.replace(**changes))

    def speak(self, texts: list[str], stream: bool = False) -> Iterator[Speech]:
        """Yield the Speech of each text, generated in batches or, in a stream, as it is taken."""
        if stream and self.settings.best_of > 1:
            raise UserError("a stream plays what comes first: leave out best_of, or set it to 1")
        lines = [self.make_parts(text) for text in texts]
        if not stream:
            spoken = self.generate_best([part for parts in lines for part in parts])
            lines = ([*islice(spoken, len(parts))] for parts in lines)
        for text, parts in zip(texts, lines, strict=True):
            pieces = concat_with_pauses([self.decode(part, stream) for part in parts])
            yield Speech(text, parts, pieces)

    def make_parts(self, text: str) -> list[Utterance]:
        """Return the parts of a text, which have to leave room for a frame of speech."""
        wanted = max(1, int(self.settings.max_seconds * SAMPLE_RATE / FRAME_SAMPLES))  # frames
        parts = []
        for words in split_text(text, self.settings, self.pace):
            prompt = prompt_ids(self.tokenizer, self.ids, words, self.name)
            room = (self.model.config.max_position_embeddings - len(prompt) - 1) // SLOTS
            if room < 1:
                fault = f"a text of {len(prompt)} tokens leaves no room for a frame of speech"
                raise UserError(f"{words[:40]!r}: {fault}; shorten it")
            parts.append(Utterance(words, prompt, min(wanted, room)))
        return parts

    @torch.inference_mode()
    def generate(self, parts: list[Utterance], streamer: FrameStreamer | None = None) -> None:
        """Generate the codes of parts in one batch; with `best_of`, failed ones end early."""
        prompts = [torch.tensor(part.prompt) for part in parts]
        tokens = pad_sequence(prompts, True, self.ids.pad, padding_side="left").to(
            self.model.device
        )
        start, frames = tokens.shape[1], max(part.max_frames for part in parts)
        room = self.model.config.max_position_embeddings - start
        generated = self.model.generate(
            input_ids=tokens,
            attention_mask=(tokens != self.ids.pad).long(),
            max_new_tokens=min(frames * SLOTS + 1, room),  # one for the end token
            logits_processor=[SlotSampler(self, parts, start)],
            stopping_criteria=[PartsEnd(self, parts, start)],
            streamer=streamer,
            eos_token_id=self.ids.eos,
            pad_token_id=self.ids.eos,
            cache_implementation=self.settings.cache_implementation,
            use_cache=True,
            **NEUTRAL,
        )
        for part, speech in zip(parts, generated[:, start:].cpu().numpy(), strict=True):
            end = next(iter(np.flatnonzero(speech == self.ids.eos)), len(speech))
            frames = min(end // SLOTS, part.max_frames)
            by_itself = frames * SLOTS == end < len(speech)
            part.end = part.end or (BY_ITSELF if by_itself else CUT_OFF)
            part.codes = ids_to_codes(speech[: frames * SLOTS], self.ids)

    def generate_best(self, parts: list[Utterance]) -> Iterator[Utterance]:
        """Generate parts in batches; yield each, or the best of its `best_of` candidates."""
        count = self.settings.best_of
        size = max(1, self.settings.speak_batch_size // count)
        for first in range(0, len(parts), size):
            batch = parts[first : first + size]
            groups = [[dataclasses.replace(p, candidate=n) for n in range(count)] for p in batch]
            self.generate([part for group in groups for part in group])
            yield from map(self.choose_best, groups)

    def choose_best(self, candidates: list[Utterance]) -> Utterance:
        """Return the one nearest to the voice's pace that is not rejected; print why others are."""
        ranks, failed = [], []
        for n, part in enumerate(candidates if len(candidates) > 1 else (), 1):
            scores = measure(np.concatenate([*self.decode(part)]), part.text, self.pace)
            fault = rejection_reason(part.end, scores)
            failed += [f"candidate {n}, {fault}"] if fault else []
            ranks.append((fault != "", abs(math.log(scores.get("pace", 1)))))
        best = ranks.index(min(ranks)) if ranks else 0
        if ranks:
            kept = f"kept candidate {best + 1} of {len(ranks)}, {len(failed)} failed"
            print(f"{candidates[best].text[:40]!r}: {'; '.join([kept, *failed])}")
        return candidates[best]

    def decode(self, part: Utterance, stream: bool = False) -> Iterator[np.ndarray]:
        """Yield the samples of a part, (samples,) in pieces; in a stream, generate it meanwhile."""
        frames = self.stream_frames(part) if stream else part.codes
        return decode_stream(self.codec, frames, self.settings.seed)

    def stream_frames(self, part: Utterance) -> Iterator[np.ndarray]:
        """Yield (7,) codes of a part while another thread generates it."""
        streamer = FrameStreamer(self.ids)
        with ThreadPoolExecutor(1) as executor:
            done = executor.submit(self.generate, [part], streamer)
            done.add_done_callback(streamer.end)  # an error ends the frames as well
            try:
                while (frame := streamer.frames.get()) is not None:
                    yield frame
                    streamer.wanted.release()
            finally:
                streamer.closed = True
                streamer.wanted.release()
            done.result()


def default_model(settings: Settings) -> str:
    """Return output_dir if it holds a run, otherwise the base model; print which."""
    out = settings.output_dir
    trained = is_model(Path(out))
    print(f"model    {out if trained else f'{settings.model}, the base: no run in output_dir yet'}")
    return out if trained else settings.model


def find_voice(model: str | Path, changes: dict, files: list[str] = MODEL_FILES) -> Voice:
    """Return the Voice of a folder or hub id, of which `files` are fetched, without its model.

    Its settings are those of the run, or without one those of config.json, under `changes`.
    """
    name, changes = changes.get("voice"), {n: v for n, v in changes.items() if n != "voice"}
    folder = fetch(str(model), files)
    if not is_model(folder):
        remedy = "give a finished run, a checkpoint or a model"
        if checkpoint := last_checkpoint(folder):
            remedy = f"give {checkpoint}, or finish the run with finetune.py --resume"
        raise UserError(f"{folder}: no adapter or model in it; {remedy}")
    for home in (folder, folder.resolve().parent):  # a checkpoint's run is above it
        if (home / SAVED_CONFIG).is_file():
            settings = read_settings(home / SAVED_CONFIG, changes, saved=True)
            report = read_json(home / SAVED_REPORT)
            voices = [*report["voices"]]
            pace = report["seconds"] / report["characters"] if report["characters"] else None
            if name and voices and name not in voices:
                raise UserError(f"voice {name}: {folder} was trained on {', '.join(voices)}")
            name = name or next(iter(voices), settings.voice)
            return Voice(None, None, None, settings, name, pace, folder, home)
    settings = read_settings(words=changes)
    return Voice(None, None, None, settings, name or settings.voice, folder=folder)


def load_voice(model: str | Path | None = None, **changes) -> Voice:
    """Load an adapter, a checkpoint, a merged model or a base, with its codec.

    It speaks in the precision and over the weights of its training; a base without a run, on a CPU,
    in 16 bits. Raises a UserError for a model, voice or setting that does not exist.

    Args:
        model: folder or hub id; None is the run of config.json, or its base if there is none yet.
        changes: settings that go over those of the run (temperature, seed, codec, …), and `voice`,
            one of the names that the model was trained on, if not the first.
    """
    model = model or default_model(read_settings())
    check_machine(str(model))
    voice = find_voice(model, changes)
    voice.codec = load_codec(voice.settings.codec, device())
    if voice.home or device() == "cuda":
        voice.weights = voice.settings.weights
    voice.dtype = training_dtype(voice.settings) if voice.home else None
    voice.model, voice.tokenizer = load_model(str(voice.folder), voice.weights, dtype=voice.dtype)
    note = "" if voice.weights == "16bit" else f"; {voice.weights} weights"
    note = "; trained over fp8 weights, speaks over 16-bit ones" if "fp8" in note else note
    print(f"model    {voice.folder}: {str(voice.model.dtype).removeprefix('torch.')}{note}")
    return voice
