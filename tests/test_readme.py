"""README.md: its commands run as typed, and what it names is there."""

import os
import re
import shlex
import shutil
import subprocess

import soundfile
from conftest import DEMO, ROOT, script

from orpheus.doctor import FINDINGS
from orpheus.scoring import CUT_OFF
from orpheus.settings import Settings

README = (ROOT / "README.md").read_text()


def commands(heading):
    """The shell commands under a heading of the README, as lists of words."""
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def made_by(target):
    """The python commands that `make TARGET` runs once .venv is there."""
    ready = ["-o", ".venv/ready-cpu", "-o", ".venv/ready-gpu"]
    command = ["make", "-n", "--no-print-directory", *ready, target]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_quick_start_runs(tmp_path, finished):
    """What `make demo` and the README let the demo's voice say is said, by a shorter run."""
    assert [words[:2] for words in commands("Try it")] == [["make", "demo"], ["make", "test"]]
    clear, train, speak = made_by("demo")
    assert clear == ["rm", "-rf", "outputs/demo"]
    assert train[1:] == ["finetune.py", *DEMO]  # as test_demo.py trains
    again = shlex.split(re.search(r"`(\.venv/bin/python infer.py \"four[^`]*)`", README)[1])
    for words in (speak, again):
        words = [word.replace("outputs/demo", str(finished[0])) for word in words[1:]]
        wav = tmp_path / words[words.index("--out") + 1]
        words[words.index("--out") + 1] = str(wav)
        code, printed, errors = script(*words)
        assert code == 0, errors
        assert str(wav) in printed
        assert soundfile.info(wav).samplerate == 24_000


def test_make_train_and_make_test_are_what_the_readme_says():
    assert made_by("train") == [[".venv/bin/python", "finetune.py"]]
    assert [".venv/bin/python", "-m", "pytest"] in made_by("test")


def make_install(folder, *words, path=""):
    """What `make install` says in a copy of the Makefile that has only the CPU's stamp."""
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".venv").mkdir()
    (folder / ".venv/ready-cpu").touch()
    env = {"PATH": f"{path}:{os.environ['PATH']}"}
    command = ["make", "install", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def stand_in(folder, name, code):
    """A program of that name that ends with `code`, in a folder for PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\nexit {code}\n")
    (folder / name).chmod(0o755)
    return folder


def test_a_venv_of_the_other_kind_is_made_anew(tmp_path):
    without = stand_in(tmp_path / "none", "nvidia-smi", 9)
    assert "Nothing to be done" in make_install(tmp_path / "cpu", path=without)[1]
    driver = stand_in(tmp_path / "driver", "nvidia-smi", 0)
    code, printed = make_install(tmp_path / "gpu", "-n", path=driver)
    assert code == 0 and "-m venv --clear .venv" in printed
    assert "pip install -r requirements/gpu.txt" in printed and "touch .venv/ready-gpu" in printed


def test_a_python_that_is_too_old_is_refused_before_anything_is_installed(tmp_path):
    old = stand_in(tmp_path / "bin", "python3.10", 1)
    driver = stand_in(tmp_path / "bin", "nvidia-smi", 0)
    code, printed = make_install(tmp_path / "make", "PYTHON=python3.10", path=f"{old}:{driver}")
    assert code != 0 and "Python 3.11, 3.12 or 3.13" in printed and "deadsnakes" in printed
    assert [path.name for path in (tmp_path / "make/.venv").iterdir()] == ["ready-cpu"]


def test_links_and_files_of_the_readme_exist():
    """And a module imports only from those that stand above it in the list."""
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    lines = README.split("## Files")[1].split("```")[1].strip().splitlines()
    files = [("orpheus/" if line[0] == " " else "") + line.split()[0].strip(",") for line in lines]
    assert links and files
    for path in links + files:
        assert (ROOT / path).exists(), path
    modules = {path.name for path in ROOT.glob("orpheus/[a-z]*.py")}
    listed = [path[8:] for path in files if path[:8] == "orpheus/" and path[8:]]
    assert modules == set(listed)
    for n, name in enumerate(listed):
        imported = re.findall(r"from orpheus\.(\w+) import", (ROOT / "orpheus" / name).read_text())
        assert {f"{module}.py" for module in imported} <= set(listed[:n]), name


def test_remedies_for_a_wrong_sound_name_what_exists():
    """Keys and findings, options of infer.py, and what is printed."""
    section = README.split("## If it sounds wrong")[1].split("\n## ")[0]
    help_text = script("infer.py", "--help")[1]
    code = re.findall(r"`([^`]+)`", section)
    options = {option for words in code for option in re.findall(r"--\w+", words)}
    assert {"--best_of", "--wav"} <= options
    assert all(f"{option} " in help_text or f"{option}\n" in help_text for option in options)
    names = {words for words in code if re.fullmatch(r"[a-z_]+", words)}
    assert names <= Settings.model_fields.keys() | FINDINGS.keys() | {"best"}
    assert "cut off at the limit" in section and CUT_OFF.startswith("cut off at the limit")


def test_prepare_as_the_readme_has_it(tmp_path):
    """The form of "Your own voice": a metadata.csv of file_name,text and a --voice."""
    assert "file_name,text" in README
    clips = sorted((ROOT / "data/numbers").glob("*.flac"))[:2]
    rows = "".join(f"{n}.flac,seven\n" for n, _ in enumerate(clips))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    for n, clip in enumerate(clips):
        (tmp_path / f"{n}.flac").write_bytes(clip.read_bytes())
    words = ["--config", "data/demo/config.json", "--dataset", tmp_path, "--voice", "anna"]
    code, printed, errors = script("data/prepare.py", *words)
    assert code == 0, errors
    assert "2 of 2 clips" in printed and "voice anna\n" in printed
