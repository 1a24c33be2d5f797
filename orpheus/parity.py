"""Whether two models speak the same: their greedy tokens, and their logits over the same speech."""

from dataclasses import dataclass

import numpy as np
import torch

from orpheus.generation import generate_batch, make_utterance
from orpheus.scoring import Utterance
from orpheus.settings import Settings, read_settings
from orpheus.tokens import SpeechIds, codes_to_ids


@dataclass
class GreedySpeech:
    """The sample texts as a model speaks them without sampling, and its logits for each."""

    utterances: list[Utterance]
    logits: list[torch.Tensor]  # (tokens of speech + 1, vocabulary) each


def generate_greedy(model, tokenizer, ids: SpeechIds, settings: Settings, voice) -> list[Utterance]:
    """The sample texts, at most five seconds of each, spoken without sampling."""
    greedy = settings.replace(temperature=0.0, max_seconds=min(5.0, settings.max_seconds))
    texts = settings.sample_texts or read_settings().sample_texts
    utterances = [make_utterance(model, tokenizer, ids, text, greedy, voice) for text in texts]
    generate_batch(model, utterances, ids, greedy)
    return utterances


def speech_logits(model, ids: SpeechIds, utterances: list[Utterance]) -> list[torch.Tensor]:
    """(tokens + 1, vocabulary) logits of a model for each utterance, whichever model spoke it."""
    logits = []
    for row in utterances:
        tokens = [*row.prompt, *codes_to_ids(row.codes, ids).tolist()]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens], device=model.device)).logits
        logits.append(output[0, len(row.prompt) - 1 :].float().cpu())
    return logits


def speak_greedy(model, tokenizer, ids: SpeechIds, settings: Settings, voice) -> GreedySpeech:
    utterances = generate_greedy(model, tokenizer, ids, settings, voice)
    return GreedySpeech(utterances, speech_logits(model, ids, utterances))


def compare(reference: GreedySpeech, model, tokenizer, ids, settings, voice) -> tuple[bool, str]:
    """Whether a model speaks the greedy tokens of `reference`, and a line that says how many."""
    rows, total = reference.utterances, sum(row.codes.size for row in reference.utterances)
    others = generate_greedy(model, tokenizer, ids, settings, voice)
    logits = speech_logits(model, ids, rows)
    pairs = zip(reference.logits, logits, strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    same, passed = 0, True
    for row, other in zip(rows, others, strict=True):
        common = min(len(row.frames), len(other.frames))
        same += int((row.codes[:common] == other.codes[:common]).sum())
        passed &= row.end == other.end and np.array_equal(row.codes, other.codes)
    message = f"{same} of {total} greedy tokens on {len(rows)} texts are the adapter's"
    return passed, f"{message}, logits differ by {difference:.4f} at most"
