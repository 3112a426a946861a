# make demo   set up and run the main job on the embedded model and data
# make test   install what tests need and run all checks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test install clean

demo: $(VENV)/installed
	$(BIN)/lorakit demo

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorakit needs Python 3.11 or newer")'
	@echo "setting up $(VENV) (torch and the libraries of the field, some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

test: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build dist *.egg-info
