"""Fixtures: the demo's tiny codec and base, and one finished run that many tests look at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import orpheus.settings  # noqa: E402
from orpheus.codec import load_codec  # noqa: E402
from orpheus.models import load_tokenizer  # noqa: E402
from orpheus.settings import UserError  # noqa: E402
from orpheus.tokens import read_speech_ids  # noqa: E402

# config.json is the user's: no test looks at it.
orpheus.settings.CONFIG = ROOT / "tests/no_config.json"
# The import path of tests/programs: the project, then whatever this process has.
PROGRAM_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def script(*words, timeout=300, env=None):
    """Runs a script of the project as a person would; (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )
    return done.returncode, done.stdout, done.stderr


def program(name, *words):
    """Runs tests/programs/<name>.py with the project's modules in reach, as `script` does."""
    env = os.environ | {"PYTHONPATH": PROGRAM_PATH}
    return script(f"tests/programs/{name}.py", *words, env=env)


def one_line(main, monkeypatch, *words):
    """The one line that `main` ends with for these command-line words."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    with pytest.raises(UserError) as caught:
        main()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture(scope="session")
def codec():
    return load_codec("data/demo/codec")


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(Path("data/demo/base"))


@pytest.fixture(scope="session")
def ids(tokenizer, codec):
    return read_speech_ids(tokenizer, codec.codebook_size)


def change(path, **values):
    """Sets keys of a JSON file; one that is None is removed."""
    config = json.loads(path.read_text()) | values
    for name in [name for name, value in values.items() if value is None]:
        del config[name]
    path.write_text(json.dumps(config))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DEMO = ["--config", "data/demo/config.json"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(folder, what was printed) of a short run of finetune.py on the committed clips."""
    out = tmp_path_factory.mktemp("run") / "out"
    words = [*DEMO, "--output_dir", out, "--max_steps", "4", "--limit", "16", "--max_seconds", "1"]
    words += ["--cache_dir", "null"]
    code, printed, errors = program("train_and_keep_logits", *words, "--save_steps", "2")
    assert code == 0, errors
    return out, printed


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of the finished run, without its checkpoints, that a test may change."""
    out = tmp_path / "adapter"
    return shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A finished run with a sample and two checkpoints; copied by the tests that change it."""
    from running import KEYS, run_here  # which imports this file

    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        keys = KEYS | {"sample_texts": '["two"]', "max_seconds": "0.3", "report_to": "tensorboard"}
        run_here(patch, out, **keys)
    return out


@pytest.fixture
def run_copy(run_folder, tmp_path):
    return Path(shutil.copytree(run_folder, tmp_path / "out"))


def over_nf4(adapter):
    """The demo's base and an adapter by PEFT and bitsandbytes alone, with weights of 4 bits.

    In train mode, since bitsandbytes' kernel for CPUs with bfloat16 instructions, which serves in
    eval mode, rounds them once more.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    keys = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**keys)
    base = AutoModelForCausalLM.from_pretrained(
        "data/demo/base", dtype=torch.float32, quantization_config=config
    )
    return PeftModel.from_pretrained(base, adapter).train()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """(folder, what was printed) of make demo's whole training, about two minutes."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = [*DEMO, "--output_dir", out, "--cache_dir", "null"]
    code, printed, errors = script("finetune.py", *words, timeout=1200)
    assert code == 0, errors
    return out, printed


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "demo_run" not in item.fixturenames)  # the longest begins first
