# Two commands do everything on a fresh machine:
#   make train    environment (1.7 GB), corpus, tokenizer, a real training run of a few minutes, a sample, a report
#   make test     environments, style, types, layers, the suite, and what may differ again with NeMo
# Others take hours, or measure:
#   make test-all the suite in its long version: more layouts, kills, drawn examples and planted faults
#   make sweep    400 random parallel layouts against one process, and checkpoints between layouts
#   make bench    training and decoding against transformers and AutoModel, and where our time goes
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# What is never imported need not be compiled: an environment takes half the time.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# For that reason what is imported is compiled once and kept, wherever the environment says otherwise:
# without, every process compiles PyTorch's Python anew, 10 s.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
NEMO := .venv-nemo
# Each worker begins with half of the files, so that what a file's tests share is made once.
TEST_FLAGS ?= -n 2 --dist worksteal
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
TORCH_KIND := $(if $(GPU),with CUDA (several GB),without CUDA since there is no GPU)
# What NVIDIA's AutoModel and Megatron-Core need to be built on a CPU, without what needs a GPU.
PEERS := nemo-automodel megatron-core torchao torchdata flashoptim

# An environment of its own with PyTorch. Without a GPU from PyTorch's index of CPU wheels, which saves
# gigabytes of CUDA; where that is out of reach (a mirror, no network), from what pip finds elsewhere.
# Arguments: its folder, its constraints, what else goes into it and how large it is.
define environment
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: set PYTHON=/path/to/python"; exit 1; }
	@echo "== environment $(1) ($(PYTHON)): PyTorch $(TORCH_KIND); $(3); some minutes"
	$(PYTHON) -m venv --clear $(1)
	@test -n "$(GPU)" || $(1)/bin/pip install $(PIP_FLAGS) --retries 0 --timeout 15 --no-deps -c $(2) \
	  --index-url https://download.pytorch.org/whl/cpu torch >/dev/null 2>&1 || \
	  echo "   PyTorch's CPU wheels are out of reach: taking what pip finds, which may bring CUDA (several GB)"
	$(1)/bin/pip install $(PIP_FLAGS) -c $(2) torch
endef

.PHONY: train test test-all test-torch test-lightning test-nemo hooks lint browser bench sweep format clean

train: $(VENV)/.ready
	$(VENV)/bin/deepseek train --config deepseek_v3_tiny --sample --report

# The environments are made side by side; what takes all cores for itself follows.
test:
	@$(MAKE) --no-print-directory -j 2 lint browser $(NEMO)/.ready
	@$(MAKE) --no-print-directory -j 1 test-lightning test-nemo

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

hooks: $(VENV)/.ready
	$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e ".[hooks]"
	$(VENV)/bin/pre-commit install

test-lightning: $(VENV)/.ready
	@echo "== the suite with PyTorch Lightning alone"
	$(VENV)/bin/python -m pytest $(TEST_FLAGS)

test-nemo: $(NEMO)/.ready
	@echo "== the tests that may differ with NVIDIA NeMo"
	$(NEMO)/bin/python -m pytest $(TEST_FLAGS) -m "framework and not nightly" \
	  $$(grep -rl --include="test_*.py" "mark.framework" tests)

test-all: export HYPOTHESIS_PROFILE := nightly
test-all:
	@$(MAKE) --no-print-directory -j 2 lint browser $(NEMO)/.ready
	@$(MAKE) --no-print-directory -j 1 sweep
	@echo "== the long version of the suite with PyTorch Lightning alone"
	$(VENV)/bin/python -m pytest $(TEST_FLAGS) -m "" --timeout 3600
	@echo "== and with NVIDIA NeMo"
	$(NEMO)/bin/python -m pytest $(TEST_FLAGS) -m "" --timeout 3600
	@echo "== the suite notices faults that are planted in the package"
	cd tests && ../$(VENV)/bin/python -m support.mutations

# Another torch than the pinned one, in an environment of its own: make test-torch TORCH=2.11.0
test-torch:
	@test -n "$(TORCH)" || { echo "say which: make test-torch TORCH=2.11.0"; exit 1; }
	grep -v "^torch==" constraints.txt > .venv-torch-constraints.txt
	$(PYTHON) -m venv --clear .venv-torch
	.venv-torch/bin/pip install $(PIP_FLAGS) -c .venv-torch-constraints.txt torch==$(TORCH)
	.venv-torch/bin/pip install $(PIP_FLAGS) -c .venv-torch-constraints.txt -e ".[dev]"
	.venv-torch/bin/python -m pytest $(TEST_FLAGS)

browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "== installing chromium" && \
	  { apt-get install -qq -y chromium || { apt-get update -qq && apt-get install -qq -y chromium; }; } \
	  >/dev/null 2>&1; } || \
	  echo "== NO CHROMIUM: the report will NOT be looked at in a browser; apt-get install chromium"

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/train_step.py
	$(VENV)/bin/python benchmarks/results.py

gpu-check: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/gpu.py --out gpu_check.json

sweep: $(VENV)/.ready
	cd tests && ../$(VENV)/bin/python -m support.sweep --cases 200 --dtype float64
	cd tests && ../$(VENV)/bin/python -m support.sweep --cases 200 --dtype float32
	cd tests && ../$(VENV)/bin/python -m support.checkpoint_sweep --pairs 30 --chains 5

format: $(VENV)/.ready
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt,Lightning and what runs and tests need; 0.6 GB to download and 1.7 GB on disk)
	$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

$(NEMO)/.ready: pyproject.toml constraints-nemo.txt
	$(call environment,$(NEMO),constraints-nemo.txt,NVIDIA NeMo and what the tests need; 2.2 GB on disk)
	$(NEMO)/bin/pip install $(PIP_FLAGS) -c constraints-nemo.txt -e ".[nemo,dev]"
	$(NEMO)/bin/pip install $(PIP_FLAGS) -c constraints-nemo.txt --no-deps $(PEERS)
	@touch $@

clean:
	rm -rf $(VENV) $(NEMO) .venv-torch* .pytest_cache .ruff_cache .mypy_cache .hypothesis
