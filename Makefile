# Two commands: `make demo` and `make test`. Each makes .venv first and installs what it needs there.

PYTHON ?= python3
VENV := .venv
BIN := $(if $(filter Windows_NT,$(OS)),$(VENV)/Scripts,$(VENV)/bin)

KERNEL := sightline/kernels
SOURCES := $(KERNEL)/build.py $(wildcard $(KERNEL)/native/*)

.PHONY: demo test check clean

demo: $(VENV)/installed $(VENV)/built
	$(BIN)/sightline demo

test: $(VENV)/installed-dev $(VENV)/built
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) sightline-demo $(KERNEL)/*.so

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Without a C++ compiler everything works too, with the other implementations; `sightline doctor` tells.
$(VENV)/built: $(SOURCES) | $(VENV)/installed
	$(BIN)/python $(KERNEL)/build.py || echo "going on without the native kernel"
	touch $@
