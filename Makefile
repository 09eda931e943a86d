# make demo       text -> tokens -> a trained model -> samples -> a folder transformers loads
# make demo-sft   goes on from it: chats -> all weights and LoRA -> questions answered -> merged
# make test       what a change must pass: the tests but the slow ones
# make test-all   all tests
# make check      style, types, direction of imports
# make tree       draws the tree of the README anew, after a module came, went or changed its name
#
# The first of them makes .venv and installs what it needs (scripts/install.sh).  PYTHON=python3.13
# and TORCH=torch==2.12.0 choose others; VENV=path uses another environment.

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.PHONY: demo demo-sft test test-all check tree format clean

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

demo-sft: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo_sft.sh

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed
	$(PYTEST)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

tree: $(VENV)/.installed
	$(BIN)/python scripts/tree.py --write

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

# pip runs again only when what it read has changed.
$(VENV)/.installed: pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh $(VENV)
	touch $@
