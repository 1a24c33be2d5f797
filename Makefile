# make install  sets up .venv, for a GPU where there is one
# make demo     the whole path on the committed sample, on any machine: clips in, a voice out
# make test     the tests
# make train    python finetune.py, on a GPU
# make cut      what data/cut.py needs on top, to make clips of long recordings

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
REQUIREMENTS := requirements/$(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu).txt
# Without its dependencies, which would replace the pins: requirements/*.txt name those it needs.
UNSLOTH := unsloth==2026.10.9 unsloth_zoo==2026.10.9

install: .venv/ready

demo: .venv/ready
	.venv/bin/python finetune.py --config data/demo/config.json --overwrite
	.venv/bin/python infer.py "seven two nine" --model outputs/demo --out outputs/demo/seven_two_nine.wav

train: .venv/ready
	.venv/bin/python finetune.py

cut: .venv/ready
	.venv/bin/python -m pip install -r requirements/cut.txt

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

.venv/ready: $(REQUIREMENTS) Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r $(REQUIREMENTS)
	.venv/bin/python -m pip install --no-deps $(UNSLOTH)
	touch $@

.PHONY: install demo train cut test
