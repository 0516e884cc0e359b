# A new machine needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
#   make demo [WORDS="..."]   export the bundled model, verify it, run it
#   make test                 every check that CI runs
# PYTHON chooses the interpreter, pip's own settings (PIP_INDEX_URL, ...) where packages come from.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
INPUTS := pyproject.toml constraints.txt
THIRDPARTY := tests/thirdparty/requirements.txt

.PHONY: demo test lint pytest clean

demo: .venv/.installed-demo
	$(BIN)/txopt demo $(WORDS)

test: lint pytest

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: .venv/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

clean:
	rm -rf .venv build dist demo-out src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: what follows then meets the pinned build and looks for no other.
.venv/.installed-demo: $(INPUTS) | $(BIN)/python
	$(INSTALL) torch
	$(INSTALL) -e '.[export]'
	touch $@

.venv/.installed-test: $(INPUTS) $(THIRDPARTY) | $(BIN)/python
	$(INSTALL) torch
	$(INSTALL) -e '.[export,audio,image,optimum,test]'
	$(INSTALL) --no-deps -r $(THIRDPARTY)
	touch .venv/.installed-demo $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "txopt needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
