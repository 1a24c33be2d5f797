"""Whether transformers 4 reads all that we save as transformers 5 does: logits and token ids.

    python tests/benchmarks/check_transformers4.py [FOLDER]

FOLDER gets transformers 4.57.6, by pip, if it is not there yet. The base is the demo's with
Orpheus's rotary settings; the demo's own are those that version 4 takes where it finds none.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PINS = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23"]
ROTARY = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY |= {"original_max_position_embeddings": 256, "rope_theta": 500000.0}
READ = """
import sys
sys.path[:0] = sys.argv[3:]
import torch, transformers
folder = sys.argv[1]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
kept = {"version": transformers.__version__, "ids": tokenizer("slt: seven <laugh>").input_ids}
if not (__import__("pathlib").Path(folder) / "adapter_config.json").exists():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = torch.randint(300, 2000, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept["logits"] = model(input_ids=ids).logits[0]
torch.save(kept, sys.argv[2])
"""


def run(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True)


def read(folder: Path, *path) -> dict:
    """What transformers reads from a folder; `path` goes before the installed packages."""
    import torch

    kept = folder.parent / "kept.pt"
    run("-c", READ, folder, kept, *path)
    return torch.load(kept)


def save_everything(work: Path) -> list[Path]:
    """An adapter, a full fine-tune, a checkpoint of each, and a merged model."""
    base = shutil.copytree(ROOT / "data/demo/base", work / "base")
    config = json.loads((base / "config.json").read_text()) | {"rope_parameters": ROTARY}
    (base / "config.json").write_text(json.dumps(config))
    words = ["finetune.py", "--config", "data/demo/config.json", "--model", base, "--limit", "8"]
    words += ["--backend", "transformers", "--max_steps", "4", "--save_steps", "2"]
    words += ["--sample_texts", "[]", "--cache_dir", work / "cache", "--report_to", "none"]
    run(*words, "--output_dir", work / "adapter")
    run(*words, "--output_dir", work / "full", "--full_finetuning", "true")
    run("-m", "orpheus.merge", work / "adapter", work / "merged", "--voice", "slt")
    runs = [work / "adapter", work / "full"]
    return [*runs, *(run / "checkpoint-2" for run in runs), work / "merged"]


def main() -> None:
    old = Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/transformers4")
    if not old.is_dir():
        run("-m", "pip", "install", "-q", "--no-deps", "--target", old, *PINS)
    wrong = 0
    with tempfile.TemporaryDirectory() as work:
        for folder in save_everything(Path(work)):
            new, four = read(folder), read(folder, old)
            same = new["ids"] == four["ids"]
            line = f"token ids {'the same' if same else 'DIFFER'}"
            if "logits" in new:
                far = (new["logits"] - four["logits"]).abs().max().item()
                line += f", logits differ by at most {far:.1e}"
                same = same and far < 1e-3
            wrong += not same
            name = folder.relative_to(work)
            print(f"{name}: transformers {new['version']} and {four['version']}: {line}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
