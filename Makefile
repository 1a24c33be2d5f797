# make install  sets up .venv, for a GPU where there is one
# make demo     the whole path on the committed sample, on any machine: clips in, a voice out
# make test     the tests
# make train    python finetune.py, on a GPU
# make cut      what data/cut.py needs on top, to make clips of long recordings

# Exits with 1 for a Python that is too old, or that lacks what `python -m venv` needs.
USABLE := -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python $(USABLE) && echo $$python && break; done)
KIND := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
OTHER := $(if $(filter gpu,$(KIND)),cpu,gpu)
READY := .venv/ready-$(KIND)

install: $(READY)

demo: $(READY)
	rm -rf outputs/demo
	.venv/bin/python finetune.py --config data/demo/config.json
	.venv/bin/python infer.py "seven two nine" --model outputs/demo --out outputs/demo/seven_two_nine.wav

train: $(READY)
	.venv/bin/python finetune.py

cut: $(READY)
	.venv/bin/python -m pip install -r requirements/cut.txt

test: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

# A .venv that was made for the other kind of machine is emptied first.
$(READY): requirements/$(KIND).txt requirements/common.txt requirements/unsloth.txt Makefile
	@$(or $(PYTHON),false) $(USABLE) || { echo 'error: Python 3.11, 3.12 or 3.13 with venv is needed:' \
	'sudo apt install python3-venv python3-dev; where that is older, as on Ubuntu 22.04,' \
	'sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.12-venv python3.12-dev'; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard .venv/ready-$(OTHER)),--clear) .venv
	.venv/bin/python -m pip install -r $<
	.venv/bin/python -m pip install --no-deps -r requirements/unsloth.txt
	touch $@

.PHONY: install demo train cut test
