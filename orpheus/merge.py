"""Merge an adapter into its base: one 16-bit model, with a model card.

python -m orpheus.merge outputs/anna merged

Exits with 1 if the merged model gives codes other probabilities than the adapter does.
"""

import gc
import json
import shutil
import sys
from pathlib import Path

import torch

from orpheus.files import MODEL_FILES, atomic_file, fetch, is_adapter, write_text
from orpheus.models import add_old_names, load_model
from orpheus.runs import SAMPLE, SAVED_CONFIG, SAVED_REPORT, find_sample, model_card
from orpheus.settings import Parser, UserError, run
from orpheus.tokens import SLOTS, SpeechIds, codes_to_ids
from orpheus.voice import Utterance, Voice, load_voice

# Nats per code. On the demo, computing in bf16 gives 0.0001 at most, weights that are quantised
# otherwise 0.002 or more (tests/benchmarks/README.md).
MAX_DIVERGENCE = 0.001
SECONDS = 5.0  # of each sample text, at most


def speak_greedily(voice: Voice) -> list[Utterance]:
    """Return the sample texts of a voice, spoken without sampling."""
    greedy = voice.replace(temperature=0.0, best_of=1, max_seconds=SECONDS)
    speeches = greedy.speak(voice.settings.sample_texts or ["Hello, this is my new voice."])
    return [part for speech in speeches for part in speech.parts]


def speech_log_probs(model, ids: SpeechIds, utterances: list[Utterance]) -> torch.Tensor:
    """Return (tokens, codebook_size) log-probabilities of the codes of each token's slot.

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


def mean_divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL divergence in nats per code of two `speech_log_probs`.

    llama.cpp compares a quantised model with the original in this way
    (github.com/ggml-org/llama.cpp/pull/6936).
    """
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def save_merged(voice: Voice, weights: str, out: Path) -> None:
    """Write the merged model of a voice, its tokenizer, settings and report, all or nothing."""
    with atomic_file(out) as part:
        for saved in load_model(str(voice.folder), weights, merged=True):
            saved.save_pretrained(str(part))
        add_old_names(part)
        if voice.home:
            settings = dict(voice.settings) | {"weights": "16bit"}
            write_text(part / SAVED_CONFIG, json.dumps(settings, indent=2) + "\n")
            shutil.copy(voice.home / SAVED_REPORT, part)
            if sample := find_sample(voice.home):
                shutil.copy(sample, part / SAMPLE)


def merge(model: str | Path, out: Path) -> float:
    """Merge an adapter into the weights that it was trained over, into a new folder.

    Returns:
        The divergence of the merged model from the adapter, in nats per code of the same speech.

    Raises:
        UserError: there is no adapter, or something in `out`.
    """
    folder = fetch(str(model), MODEL_FILES)
    if not is_adapter(folder):
        raise UserError(f"{folder}: no adapter: there is nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give a new folder")
    voice = load_voice(folder)
    ids, rows, dtype = voice.ids, speak_greedily(voice), voice.model.dtype
    reference = speech_log_probs(voice.model, ids, rows)
    voice.model = None  # so that two models need not fit into memory
    gc.collect()  # PEFT's reference cycles would keep it
    save_merged(voice, voice.weights, out)
    found = speech_log_probs(load_model(str(out), dtype=dtype)[0], ids, rows)
    same = int((reference.argmax(-1) == found.argmax(-1)).sum())
    divergence = mean_divergence(reference, found)
    message = (
        f"KL divergence from the adapter {divergence:.5f} nats per code, {same} of {len(found)} "
        "first choices the same"
    )
    if voice.home:
        write_text(out / "README.md", model_card(voice.home, voice.settings, out.name, message))
    print(f"merged   {out}: {message}")
    return divergence


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="RUN", help="adapter or checkpoint of finetune.py")
    parser.add_argument("out", metavar="FOLDER", help="new folder for the merged model")
    arguments = parser.parse_args()
    if merge(arguments.model, Path(arguments.out)) > MAX_DIVERGENCE:
        print("parity   FAILED: it does not speak as the adapter does. Listen before you use it")
        sys.exit(1)


if __name__ == "__main__":
    run(main)
