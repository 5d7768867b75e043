# All set-up lives in .venv, made on first use. Setting up needs the network; nothing after it does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

# Every target runs on generated data.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export WANDB_MODE := offline

.DEFAULT_GOAL := help
.PHONY: help setup demo test browser-test conformance benchmark models-test streaming real-shape reward-models estimators studies lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# The stamp holds what was installed and where, so that a new clone of the same files installs nothing.
setup: ## Install everything into .venv; the other targets do this by themselves, once
	@want="$$(cat pyproject.toml constraints.txt | cksum) $(CURDIR)"; \
	if [ "$$(cat $(READY) 2>/dev/null)" = "$$want" ]; then exit 0; fi; \
	set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo "Python 3.11 or newer is needed, and $(PYTHON) is not. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
			exit 1; }; \
		echo "[1/3] environment: $(VENV), $$($(PYTHON) --version)"; \
		if $(BIN)/python -c '' 2>/dev/null; then $(PYTHON) -m venv $(VENV); else $(PYTHON) -m venv --clear $(VENV); fi; \
	fi; \
	rm -f $(READY); \
	echo "[2/3] PyTorch: the largest download, give it a minute or more"; \
	$(PIP) torch; \
	echo "[3/3] rlhf and the other packages"; \
	$(PIP) -e '.[dev]'; \
	echo "$$want" > $(READY)

demo: setup ## Align the embedded survey world with four algorithms; prints the table, names the figure
	$(BIN)/rlhf align -m algo=kl_ppo,pm,dpo,rpo run_dir=runs/demo tracker=none

test: setup ## Run the test suite in two processes, whole training runs left out
	$(BIN)/python -m pytest -m "not slow and not browser" -n 2 --dist loadfile

# Playwright drives the Chromium on PATH, or brings its own.
browser-test: setup ## Open the HTML report in a headless browser; installs the browser
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(PIP) playwright
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	$(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest tests/browser -m browser

conformance: setup ## Check that each algorithm reaches its own optimum: worlds x seeds (long)
	$(BIN)/python benchmarks/conformance.py

benchmark: setup ## Time the default job and its peak memory
	$(BIN)/python benchmarks/default_job.py

models-test: setup ## Train every model family end to end as a miniature: full, LoRA, shared base (15 minutes)
	$(BIN)/python benchmarks/models.py

streaming: setup ## Measure loading and streaming of up to 200,000 rows
	$(BIN)/python benchmarks/streaming.py

real-shape: setup ## Train a model of opt-125m's shape on the CPU, memory beside the estimate: DATA=FILE of dialogues
	$(BIN)/python benchmarks/real_shape.py --data $(DATA)

gpu: setup ## Speed, arithmetic and memory of each phase of an update; on a GPU
	$(BIN)/python benchmarks/gpu.py

growth: setup ## Compare one process with two, on the CPU
	$(BIN)/python benchmarks/growth.py ranks

reward-models: setup ## Measure PCRM, length calibration and WARM, three worlds each (long)
	$(BIN)/python benchmarks/reward_models.py pcrm
	$(BIN)/python benchmarks/reward_models.py calibration
	$(BIN)/python benchmarks/reward_models.py warm

estimators: setup ## Check that sampled metrics, pools and rankings are honest (minutes)
	$(BIN)/python benchmarks/estimators.py

studies: setup ## Preference collapse and over-optimisation, three seeds each (long)
	$(BIN)/python benchmarks/studies.py collapse
	$(BIN)/python benchmarks/studies.py overoptimisation

lint: setup ## Check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean: ## Remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rlhf_cli tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
