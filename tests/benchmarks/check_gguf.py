"""Whether a merged model speaks the same greedy tokens in llama.cpp: converts it to GGUF, compares.

python -m orpheus.merge outputs/demo merged
python tests/benchmarks/check_gguf.py merged llama.cpp/convert_hf_to_gguf.py

Outside `make test`. Needs llama-cpp-python and gguf beside the project's packages, and llama.cpp's
converter, which llama-cpp-python's source package has in vendor/llama.cpp.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import orpheus.settings  # noqa: E402
from orpheus.merge import speak_greedily  # noqa: E402
from orpheus.settings import UserError  # noqa: E402
from orpheus.tokens import SLOTS, ids_to_codes  # noqa: E402
from orpheus.voice import load_voice  # noqa: E402

CONVERT = ROOT / "tests" / "programs" / "convert_to_gguf.py"


def generate_greedy_codes(llama, ids, row) -> np.ndarray:
    """(frames, 7) codes of an Utterance's prompt: the best of what a frame allows, id by id."""
    tokens = list(row.prompt)
    while True:
        frame, slot = divmod(len(tokens) - len(row.prompt), SLOTS)
        llama.reset()
        llama.eval(tokens)
        logits = llama.scores[len(tokens) - 1]
        start = ids.audio + slot * ids.codebook_size
        best = start + int(logits[start : start + ids.codebook_size].argmax())
        ended = frame > 0 and logits[ids.eos] >= logits[best]
        if slot == 0 and (ended or frame == row.max_frames):
            return ids_to_codes(np.array(tokens[len(row.prompt) :]), ids)
        tokens.append(best)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give a merged folder and llama.cpp's convert_hf_to_gguf.py")
    from llama_cpp import Llama

    merged, converter = map(Path, sys.argv[1:])
    gguf = merged.with_suffix(".gguf").resolve()
    words = [str(converter), str(merged), "--outfile", str(gguf), "--outtype", "f16"]
    subprocess.run([sys.executable, CONVERT, *words], check=True)
    voice = load_voice(merged)
    ids, rows = voice.ids, speak_greedily(voice)
    llama = Llama(str(gguf), n_ctx=1024, n_threads=1, logits_all=True, verbose=False)
    for row in rows:
        codes = generate_greedy_codes(llama, ids, row)
        same = np.array_equal(codes, row.codes)
        print(f"{row.text!r}: {row.codes.size} tokens, {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    orpheus.settings.run(main)
