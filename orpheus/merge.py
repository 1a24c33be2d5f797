"""Merges an adapter into its base: one 16-bit model, with a model card.

python -m orpheus.merge outputs/anna merged

Exits with 1 if the merged model gives codes other probabilities than the adapter.
"""

import gc
import json
import shutil
import sys
from pathlib import Path

from orpheus.files import atomic_file, write_text
from orpheus.hub import is_adapter
from orpheus.options import Parser, overrides
from orpheus.runs import SAMPLE, SAVED_CONFIG, SAVED_REPORT, find_sample, model_card
from orpheus.settings import UserError, run


def save_merged(info, weights: str, out: Path) -> None:
    """Writes the merged model, its tokenizer, settings and report to `out`, whole or not at all."""
    from safetensors import SafetensorError

    from orpheus.models import add_old_names, load_model

    try:
        with atomic_file(out) as part:
            for saved in load_model(str(info.folder), weights, merged=True):
                saved.save_pretrained(str(part))
            add_old_names(part)
            if info.home:
                settings = info.settings.flat() | {"weights": "16bit"}
                write_text(part / SAVED_CONFIG, json.dumps(settings, indent=2) + "\n")
                shutil.copy(info.home / SAVED_REPORT, part)
                if sample := find_sample(info.home):
                    shutil.copy(sample, part / SAMPLE)
    except SafetensorError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None


def merge(info, voice: str | None, out: Path) -> bool:
    """Merges the adapter of a run into its base, into the new folder `out`.

    Args:
        info: a RunInfo.
        voice: speaks the sample texts, which compare the merged model with the adapter.

    Returns:
        Whether the merged model speaks as the adapter does over the weights that it was trained
        over (`orpheus.parity.compare`).
    """
    import torch

    from orpheus.codec import load_codec
    from orpheus.models import device, load_model
    from orpheus.parity import compare, generate_greedy, speech_log_probs
    from orpheus.run_info import held_weights, speaking_dtype
    from orpheus.tokens import read_speech_ids

    if not is_adapter(info.folder):
        raise UserError(f"{info.folder}: no adapter: there is nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give a new folder")
    weights, settings = held_weights(info), info.settings
    dtype = speaking_dtype(info) if device() == "cuda" else torch.float32
    model, tokenizer = load_model(str(info.folder), weights, dtype=dtype)
    ids = read_speech_ids(tokenizer, load_codec(settings.codec).codebook_size)
    rows = generate_greedy(model, tokenizer, ids, settings, voice)
    reference = speech_log_probs(model, ids, rows)
    del model
    gc.collect()  # PEFT's reference cycles would keep it while the merged one is loaded
    save_merged(info, weights, out)
    passed, message = compare(rows, reference, load_model(str(out), dtype=dtype)[0], ids)
    if info.home:
        write_text(out / "README.md", model_card(info.home, settings, out.name, message))
    print(f"merged   {out}: {message}")
    if not passed:
        print("parity   FAILED: it does not speak as the adapter does. Listen before you use it")
    return passed


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="RUN", help="adapter or checkpoint of finetune.py")
    parser.add_argument("out", metavar="FOLDER", help="new folder for the merged model")
    parser.add_run_options(keys=("codec",))
    arguments = parser.parse_options()
    from orpheus.run_info import choose_voice, load_run_info

    info = load_run_info(arguments.model, overrides(arguments), config=arguments.config)
    if not merge(info, choose_voice(arguments.voice, info), Path(arguments.out)):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
