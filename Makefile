# make demo and make test set themselves up: Python 3.10 to 3.13 is all they need.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
BIN := $(VENV)/bin

.PHONY: demo test check smoke clean

demo: $(VENV)/.demo
	$(BIN)/wemoe-fast demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(VENV)/.demo
	$(BIN)/wemoe-fast demo --quick --out $(OUT)-quick

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) $(OUT)-quick
