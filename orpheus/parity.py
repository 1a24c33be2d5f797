"""Whether two models speak the same: the probabilities that they give to the same speech."""

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


def speech_logits(model, ids: SpeechIds, utterances: list[Utterance]) -> list[torch.Tensor]:
    """(tokens + 1, vocabulary) logits of a model for each utterance, whichever model spoke it."""
    logits = []
    for row in utterances:
        tokens = [*row.prompt, *codes_to_ids(row.codes, ids).tolist()]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens], device=model.device)).logits
        logits.append(output[0, len(row.prompt) - 1 :].float().cpu())
    return logits


def code_log_probs(logits: torch.Tensor, ids: SpeechIds) -> torch.Tensor:
    """(tokens + 1, vocabulary) logits → (tokens, codebook_size) log-probabilities of the codes that
    the slot of each token can take.
    """
    starts = ids.audio + ids.codebook_size * torch.arange(len(logits) - 1)[:, None].remainder(SLOTS)
    return logits[:-1].gather(1, starts + torch.arange(ids.codebook_size)).log_softmax(-1)


def compare(
    rows: list[Utterance], reference: list[torch.Tensor], model, ids: SpeechIds
) -> tuple[bool, str]:
    """Whether a model gives codes the same probabilities as an adapter, and a line of figures.

    The measure is the mean KL divergence over the same speech, as llama.cpp compares a quantised
    model with the original (github.com/ggml-org/llama.cpp/pull/6936). First choices are counted,
    too, but they do not decide, since rounding changes close calls.

    Args:
        rows: from `generate_greedy` of the adapter.
        reference: its `speech_logits` for these rows.
    """
    expected, found = (
        torch.cat([code_log_probs(part, ids) for part in logits])
        for logits in (reference, speech_logits(model, ids, rows))
    )
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    same = int((expected.argmax(-1) == found.argmax(-1)).sum())
    message = (
        f"KL divergence from the adapter {divergence:.5f} nats per code; {same} of {len(found)} "
        f"first choices on {len(rows)} texts are the same"
    )
    return divergence <= MAX_DIVERGENCE, message
