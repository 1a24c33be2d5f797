"""Whether two models speak the same: the probabilities that they give to the same speech."""

from dataclasses import dataclass

import torch

from orpheus.generation import generate_batch, make_utterance
from orpheus.scoring import Utterance
from orpheus.settings import Settings, read_settings
from orpheus.tokens import SLOTS, SpeechIds, codes_to_ids

# Nats per code. On the demo, computing in bf16 gives 0.0001 at most, weights that are quantised
# otherwise 0.002 or more (tests/benchmarks/README.md).
MAX_DIVERGENCE = 0.001


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


def code_log_probs(logits: torch.Tensor, ids: SpeechIds) -> torch.Tensor:
    """(tokens + 1, vocabulary) logits → (tokens, codebook_size) log-probabilities of the codes that
    the slot of each token can take.
    """
    starts = ids.audio + ids.codebook_size * torch.arange(len(logits) - 1)[:, None].remainder(SLOTS)
    return logits[:-1].gather(1, starts + torch.arange(ids.codebook_size)).log_softmax(-1)


def compare(reference: GreedySpeech, model, tokenizer, ids, settings, voice) -> tuple[bool, str]:
    """Whether a model gives the codes of `reference` the same probabilities, and a line of figures.

    The measure is the mean KL divergence over the same speech, as llama.cpp compares a quantised
    model with the original (github.com/ggml-org/llama.cpp/pull/6936). Greedy tokens are counted,
    too, but they do not decide: sums in another order change a close call, and with it what
    follows.
    """
    rows, total = reference.utterances, sum(row.codes.size for row in reference.utterances)
    others = generate_greedy(model, tokenizer, ids, settings, voice)
    expected, found = (
        torch.cat([code_log_probs(part, ids) for part in logits])
        for logits in (reference.logits, speech_logits(model, ids, rows))
    )
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    first = int((expected.argmax(-1) == found.argmax(-1)).sum())
    same = sum(
        int((row.codes[: len(other.frames)] == other.codes[: len(row.frames)]).sum())
        for row, other in zip(rows, others, strict=True)
    )
    message = (
        f"KL divergence from the adapter {divergence:.5f} nats per code; {first} of {total} first "
        f"choices on {len(rows)} texts are the same, {same} if it speaks by itself"
    )
    return divergence <= MAX_DIVERGENCE, message
