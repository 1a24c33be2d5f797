"""Whether two models speak the same: their greedy tokens, and their logits over the same speech."""

import numpy as np
import torch

from orpheus.generation import generate_batch, make_utterance
from orpheus.scoring import Utterance
from orpheus.settings import Settings, read_settings
from orpheus.tokens import SLOTS, SpeechIds, codes_to_ids

MIN_AGREEMENT = 0.98  # share of greedy tokens; sums in other dtypes decide close calls otherwise


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


def compare(
    rows: list[Utterance], reference: list[torch.Tensor], model, ids: SpeechIds
) -> tuple[bool, str]:
    """Whether a model would choose an adapter's greedy tokens, and a line of figures.

    Args:
        rows: from `generate_greedy` of the adapter.
        reference: its `speech_logits` for these rows.
    """
    total, logits = sum(row.codes.size for row in rows), speech_logits(model, ids, rows)
    pairs = zip(reference, logits, strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    pairs = zip(logits, rows, strict=True)
    first = sum(count_first_choices(part, row.codes, ids) for part, row in pairs)
    message = (
        f"{first} of {total} of the adapter's greedy tokens on {len(rows)} texts are its first "
        f"choice; logits differ by {difference:.4f} at most"
    )
    return first >= MIN_AGREEMENT * total, message


def count_first_choices(logits: torch.Tensor, codes: np.ndarray, ids: SpeechIds) -> int:
    """How many of the (frames, 7) codes have the highest of the (tokens + 1, vocabulary) logits.

    Of the logits of their slot, given the speech before them: a single close call, which differing
    sums can decide, does not change all that follows.
    """
    count = 0
    for slot in range(SLOTS):
        start = ids.audio + slot * ids.codebook_size
        choices = logits[:-1][slot::SLOTS, start : start + ids.codebook_size].argmax(-1)
        count += int((choices.numpy() == codes[:, slot]).sum())
    return count
