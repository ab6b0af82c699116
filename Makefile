# Everything a fresh machine needs: `make demo` (set-up and the main job) and `make test` (set-up and the tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
AREA ?=
WORKERS ?= auto

.PHONY: demo test lint bench site results data small-data clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch, scikit-learn and what else the library needs: a minute or two ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing what the tests and the peers need: three minutes or so ..."
	@$(PIP) -e '.[dev]'
	@touch $@

# Images, series and motions as package managers have them; best effort, the demo falls back to digits.
data:
	@sh scripts/fetch_data.sh all

# Without the motions, whose package has 100 MB: the demo does without, and the tests of them are skipped by name.
small-data:
	@sh scripts/fetch_data.sh

demo: $(VENV)/.core small-data
	@echo "Comparing the methods of two papers on wrong labels with what everyone uses: a few minutes, with a bar ..."
	$(BIN)/trimtab compare label-noise --methods elr,ldr --seeds 3 --figure label-noise.png

test: $(VENV)/.dev small-data
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

site: $(VENV)/.dev
	$(BIN)/trimtab site

results: $(VENV)/.dev data
	$(BIN)/trimtab run $(if $(AREA),--area $(AREA),--all) --results results

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .hypothesis
