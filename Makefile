# make demo: set up and see it work.   make test: set up and run every test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq --no-compile --constraint constraints.txt
DEMO := runs/demo

.PHONY: demo test style types tests lint format prove readme docs docs-serve benchmark clean

# The pip that comes with Python 3.11 takes twice as long. Then torch: with it in place, nothing else
# pulls another build of it in.
define install
	@command -v $(PYTHON) >/dev/null || { echo "needs $(PYTHON) (or: make PYTHON=python3.12 ...)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (a few minutes the first time)"
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@$(PIP) --editable "$(1)"
endef

# Bytecode of all of it, on all processors, for users whose Python writes none.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(call install,.)
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

# Bytecode of what is imported: to make all of it takes longer than the slowest test.
unexport PYTHONDONTWRITEBYTECODE
$(BIN)/.installed-dev: pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch $(BIN)/.installed $@

$(BIN)/.installed-docs: pyproject.toml constraints.txt
	$(call install,.[docs])
	@touch $(BIN)/.installed $@

demo: $(BIN)/.installed
	$(BIN)/esscher compare dsac_t sac --env.id InvertedDoublePendulum-v5 --steps 15000 --seeds 2 \
		--hidden 64 64 --evaluation.every 1000 --directory $(DEMO)
	@echo "open $(DEMO)/report.html in a browser"

# What reads the code uses one processor, so the tests begin beside it.
test: $(BIN)/.installed-dev
	@$(MAKE) --no-print-directory --jobs 2 lint tests

lint: style types

style: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(BIN)/.installed-dev style
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(BIN)/.installed-dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

format: $(BIN)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

prove: $(patsubst proofs/%.json,prove-%,$(wildcard proofs/*.json))

prove-%: $(BIN)/.installed-dev
	$(BIN)/esscher prove $*

readme: $(BIN)/.installed
	$(BIN)/python -m esscher.report.readme README.md

# The variable silences a notice of the theme about other generators.
docs: $(BIN)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean
	@echo "open site/index.html in a browser, or: make docs-serve (which can search)"

docs-serve: $(BIN)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

benchmark: $(BIN)/.installed-dev
	$(BIN)/python benchmarks/sac_speed.py

clean:
	rm -rf $(VENV) build dist site
