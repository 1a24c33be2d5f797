"""Whether a merged model speaks the same greedy tokens in llama.cpp: converts it to GGUF, compares.

python infer.py --merge merged --model outputs/demo
python tests/check_gguf.py merged llama.cpp/convert_hf_to_gguf.py

Outside `make test`. Needs llama-cpp-python and gguf beside the project's packages, and llama.cpp's
converter, which llama-cpp-python's source package has in vendor/llama.cpp.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import infer  # noqa: E402

CONVERT = ROOT / "tests" / "programs" / "convert_to_gguf.py"


def greedy(llama, ids, row) -> np.ndarray:
    """(frames, 7) codes: the best of what a frame allows next, token by token."""
    processor, tokens = infer.SlotProcessor(ids, len(row.prompt)), list(row.prompt)
    import torch

    while True:
        llama.reset()
        llama.eval(tokens)
        logits = torch.tensor(llama.scores[len(tokens) - 1])[None]
        best = int(processor(torch.tensor([tokens]), logits).argmax())
        if best == ids.eos or len(tokens) == len(row.prompt) + row.most * infer.SLOTS:
            spoken = np.array(tokens[len(row.prompt) :])
            return infer.ids_to_codes(spoken, ids)
        tokens.append(best)


def main() -> None:
    if len(sys.argv) != 3:
        raise infer.Mistake("give a merged folder and llama.cpp's convert_hf_to_gguf.py")
    from llama_cpp import Llama

    merged, converter = map(Path, sys.argv[1:])
    gguf = merged.with_suffix(".gguf").resolve()
    words = [str(converter), str(merged), "--outfile", str(gguf), "--outtype", "f16"]
    subprocess.run([sys.executable, CONVERT, *words], check=True)
    run = infer.read_run(str(merged), {})
    model, tokenizer = infer.load_model(str(merged))
    ids = infer.read_speech_ids(tokenizer, infer.load_codec(run.settings.codec).codebook_size)
    rows = infer.read_greedily(model, tokenizer, ids, run.settings, infer.choose_voice(None, run))
    llama = Llama(str(gguf), n_ctx=1024, n_threads=1, logits_all=True, verbose=False)
    for row in rows:
        codes = greedy(llama, ids, row)
        same = np.array_equal(codes, row.codes)
        print(f"{row.text!r}: {row.codes.size} tokens, {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    infer.run(main)
