"""A voice: a model, its tokenizer and codec, and the settings that it speaks with."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from orpheus.codec import load_codec
from orpheus.generation import synthesize
from orpheus.hub import absolute_path_or_hub_id
from orpheus.models import device
from orpheus.run_info import choose_voice, load_run, load_run_info
from orpheus.scoring import BY_ITSELF, Utterance
from orpheus.settings import Settings


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
    home: Path | None = None  # the folder of the run's saved settings and report, if there is one

    def say(self, text: str | list[str]) -> np.ndarray | list[np.ndarray]:
        """Return (samples,) float32 at 24 kHz, or a list of them for a list of texts."""
        if isinstance(text, str):
            return next(self.speak([text])).audio
        return [speech.audio for speech in self.speak(text)]

    def stream(self, text: str) -> Iterator[np.ndarray]:
        """Yield the same samples as `say` in pieces, each as soon as it can be decoded."""
        return next(self.speak([text], stream=True)).pieces

    def speak(self, texts: list[str], stream: bool = False) -> Iterator[Speech]:
        """Yield the Speech of each text, generated in batches or, in a stream, as it is taken."""
        common = self.model, self.tokenizer, self.codec, self.settings, self.name, self.pace
        for text, (parts, pieces) in zip(
            texts, synthesize(texts, *common, stream=stream), strict=True
        ):
            yield Speech(text, parts, pieces)

    def replace(self, **changes) -> Self:
        """Return a copy that shares the model, with another `voice` name or other settings."""
        name = changes.pop("voice", self.name)
        return dataclasses.replace(self, name=name, settings=self.settings.replace(**changes))


def load_voice(model: str | Path | None = None, config: str | None = None, **changes) -> Voice:
    """Load an adapter, a checkpoint, a merged model or a base, with its codec.

    Args:
        model: folder or hub id; None is the run of config.json, or its base if there is none yet.
        config: file of settings that go over those of the run.
        changes: settings that go over both (`temperature`, `seed`, `codec`, …), and `voice`, one of
            the names that the model was trained on.

    Raises:
        UserError: what is given is no model, or a setting or voice that does not exist.
    """
    name = changes.pop("voice", None)
    if "codec" in changes:
        changes["codec"] = absolute_path_or_hub_id(changes["codec"])
    info = load_run_info(str(model) if model else None, changes, config=config)
    name = choose_voice(name, info)
    codec = load_codec(info.settings.codec, device())
    model, tokenizer = load_run(info)
    return Voice(model, tokenizer, codec, info.settings, name, info.pace, info.folder, info.home)
