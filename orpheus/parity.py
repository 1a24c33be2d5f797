"""Compares two models by the probabilities that they give to the codes of the same speech."""

import torch

from orpheus.generation import generate_batch, make_utterance
from orpheus.scoring import Utterance
from orpheus.settings import Settings, read_settings
from orpheus.tokens import SLOTS, SpeechIds, codes_to_ids

# Nats per code. On the demo, computing in bf16 gives 0.0001 at most, weights that are quantised
# otherwise 0.002 or more (tests/benchmarks/README.md).
MAX_DIVERGENCE = 0.001


def generate_greedy(model, tokenizer, ids: SpeechIds, settings: Settings, voice) -> list[Utterance]:
    """The sample texts, at most five seconds of each, spoken without sampling."""
    greedy = settings.replace(temperature=0.0, max_seconds=min(5.0, settings.max_seconds))
    texts = settings.sample_texts or read_settings().sample_texts
    common = model.config, tokenizer, ids
    utterances = [make_utterance(*common, text, greedy, voice) for text in texts]
    generate_batch(model, utterances, ids, greedy)
    return utterances


def speech_log_probs(model, ids: SpeechIds, utterances: list[Utterance]) -> torch.Tensor:
    """(tokens, codebook_size) log-probabilities that a model gives the codes of each token's slot.

    The tokens are those of all utterances, whichever model spoke them.
    """
    log_probs = []
    for row in utterances:
        tokens = [*row.prompt, *codes_to_ids(row.codes, ids).tolist()]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens], device=model.device)).logits
        log_probs.append(code_log_probs(logits[0, len(row.prompt) - 1 : -1].float().cpu(), ids))
    return torch.cat(log_probs)


def code_log_probs(logits: torch.Tensor, ids: SpeechIds) -> torch.Tensor:
    """Whole frames' (tokens, vocabulary) logits → (tokens, codebook_size) log-probabilities."""
    starts = ids.audio + ids.codebook_size * torch.arange(len(logits))[:, None].remainder(SLOTS)
    return logits.gather(1, starts + torch.arange(ids.codebook_size)).log_softmax(-1)


def compare(
    rows: list[Utterance], reference: torch.Tensor, model, ids: SpeechIds
) -> tuple[bool, str]:
    """Whether a model gives codes the same probabilities as an adapter, and a line of figures.

    The measure is the mean KL divergence over the same speech, as llama.cpp compares a quantised
    model with the original (github.com/ggml-org/llama.cpp/pull/6936). First choices are counted,
    too, but they do not decide, since rounding changes close calls.

    Args:
        rows: from `generate_greedy` of the adapter.
        reference: its `speech_log_probs` for these rows.
    """
    found = speech_log_probs(model, ids, rows)
    divergence = float((reference.exp() * (reference - found)).sum(-1).mean())
    same = int((reference.argmax(-1) == found.argmax(-1)).sum())
    message = (
        f"KL divergence from the adapter {divergence:.5f} nats per code; {same} of {len(found)} "
        f"first choices on {len(rows)} texts are the same"
    )
    return divergence <= MAX_DIVERGENCE, message
