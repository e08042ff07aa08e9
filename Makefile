# Everything here makes its own virtual environment first, from nothing but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Apart: where optimum-quanto is installed, every `optimum-cli` command takes seconds longer.
QUANTO := $(VENV)/quanto

# mkdocs-material advertises its successor at every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test suite quanto soak compatibility serving check lint types imports pages project docs style clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 8

# pip compiles on one core only, and compiles tests too. A few files are of other versions of Python.
$(INSTALLED): pyproject.toml constraints.txt optimum_sieve/commands/register_sieve.py optimum_sieve_autoload.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed for the tested versions; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt \
		--editable '.[dev,docs]'
	-$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib
	@touch $@

$(QUANTO): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target $@ optimum-quanto ninja
	@touch $@

demo: $(INSTALLED) ## Prune a real model for a real task and compare the two (DEMO_MODEL, DEMO_TASK: other ones)
	$(BIN)/python examples/demo/run.py

test: suite quanto ## Run the tests and the doctests

suite: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

quanto: $(QUANTO)
	PYTHONPATH=$(QUANTO) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet tests/quantization/test_quanto.py

soak: $(INSTALLED) ## Kill runs, fill disks, alter models and generate inputs by the thousand (SOAK_ARGS: options)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py $(SOAK_ARGS)

compatibility: $(INSTALLED) ## Run tests under other versions of other packages, write docs/compatibility.md (ENVIRONMENTS)
	$(BIN)/python tests/compatibility/run.py $(ENVIRONMENTS)

serving: $(INSTALLED) ## Serve the demo's model with vLLM on the CPU: its tests, then tokens per second
	$(BIN)/python tests/compatibility/run.py vLLM --then benchmarks/serving.py $(SERVING_ARGS)

check: lint types imports pages project ## Lint, format, types, import rules, documentation, version

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

pages: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet

project: $(INSTALLED)
	$(BIN)/python -m pytest --quiet tests/test_project.py

docs: $(INSTALLED) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

style: $(INSTALLED) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) site dist demo-output soak .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
