# The two commands of a newcomer. Each builds .venv when it is missing; nothing else is needed but python3 (3.11 or newer).
#   make demo            from a clip to a motion LoRA to new videos, on the embedded tiny Wan, into runs/demo/
#   make test            the tests, without the slow ones, in two processes
#   make conformance     our LoRA files in stock diffusers and peft at two sets of versions, into results/conformance.*
#   make extras          what needs the extras: DeepSpeed in two processes on the CPU (and a C++ compiler), 4 and 8 bits
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     takes the small CPU build of torch (no GPU needed)
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
OLDER := runs/conformance/venv

.PHONY: demo test check conformance extras licences
demo: .venv/made
	$(BIN)/python -m motionlora.train.demo --out runs/demo

test: .venv/made
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal  # threads of numpy that wait by spinning make tests of two processes take minutes

check: .venv/made
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

conformance: .venv/made $(OLDER)/made
	$(BIN)/python tests/bench_conformance.py --other $(OLDER)/bin/python

extras: .venv/made
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,deepspeed,4bit]'
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -k deepspeed tests/test_launchers.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_four_bit.py tests/test_optimizer.py

licences: .venv/made
	$(BIN)/python tests/bench_licences.py

$(OLDER)/made: constraints-older.txt
	@$(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints-older.txt torch diffusers peft transformers accelerate safetensors
	@touch $@

.venv/made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "motionlora needs Python 3.11 or newer, this is %d.%d: name one with make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv || { echo 'python3 cannot make environments: install python3-venv (apt-get install python3-venv) and try again.'; rm -rf .venv; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt --editable '.[dev]'
	@touch $@
