# `make demo`, `make test` and `make labs` make .venv first, and install what they need there.

PYTHON ?= python3
VENV := .venv
BIN := $(if $(filter Windows_NT,$(OS)),$(VENV)/Scripts,$(VENV)/bin)

KERNEL := sightline/kernels
SOURCES := $(KERNEL)/build.py $(wildcard $(KERNEL)/native/*)

.PHONY: demo test labs check wheel clean

demo: $(VENV)/installed $(VENV)/built
	$(BIN)/sightline demo

test: $(VENV)/installed-dev $(VENV)/built
	$(BIN)/python -m pytest

# The labs, executed, as pages that need no network: build/labs/*.html. Their exercises write files where they run.
labs: $(VENV)/installed-labs $(VENV)/built
	rm -rf build/labs
	mkdir -p build/labs
	cp docs/labs/*.ipynb build/labs
	$(BIN)/python -m nbconvert --to html --execute --template-file docs/labs/page.html.j2 build/labs/*.ipynb

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# A wheel with the native kernel, compiled here: for every Python, torch 2.10 and newer, and the systems its name tells.
wheel: $(VENV)/installed
	$(BIN)/python $(KERNEL)/build.py
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist sightline-demo $(KERNEL)/*.so

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/installed-labs: pyproject.toml constraints.txt | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[labs]"
	touch $@

# Without a C++ compiler everything works too, with the other implementations; `sightline doctor` tells.
$(VENV)/built: $(SOURCES) | $(VENV)/installed
	$(BIN)/python $(KERNEL)/build.py || echo "going on without the native kernel"
	touch $@
