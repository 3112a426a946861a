# make demo         set up and run the main job on the embedded model and data
# make demo-image   the same for pictures: installs diffusers too, trains LoRAs of the embedded image model
# make test         install what tests need and run all checks
# make lock         renew constraints.txt, constraints-oldest.txt and what `lorakit doctor` knows of them
# make test-oldest  the tests with the oldest releases that pyproject.toml admits
# make test-newest  the tests with the newest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No isolated builds: those take the setuptools of the day. Ours is pinned and installed first, and builds lorakit too.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-build-isolation
PIP := $(BIN)/python $(INSTALL) -c constraints.txt
# What `make test-newest` installs of torch; NEWEST_TORCH=torch==2.13.0 where several GB of CUDA packages are too much.
NEWEST_TORCH ?= torch
PYTEST := -m pytest -n 2

.PHONY: demo demo-image test install lock test-oldest test-newest clean

demo: $(VENV)/installed
	$(BIN)/lorakit demo

demo-image: $(VENV)/image
	$(BIN)/lorakit demo --image

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorakit needs Python 3.11 or newer")'
	@echo "setting up $(VENV) (torch and the libraries of the field, some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools
	$(PIP) --editable '.[serve]'
	touch $@

$(VENV)/image: $(VENV)/installed
	$(PIP) --editable '.[image]'
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

test: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python $(PYTEST)

lock:
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv; }
	.venv-lock/bin/python scripts/lock.py

# Tests only: how code is formatted and typed is `make test`'s matter, with the releases that are pinned.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python $(PYTEST)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(INSTALL) -c constraints-oldest.txt torch==2.13.0 setuptools
	.venv-oldest/bin/python $(INSTALL) -c constraints-oldest.txt --editable '.[test]'
	touch $@

test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(INSTALL) --upgrade '$(NEWEST_TORCH)' 'setuptools<85'
	.venv-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager '$(NEWEST_TORCH)' --editable '.[test]'
	.venv-newest/bin/python -m pip freeze --exclude-editable > .venv-newest/freeze.txt
	.venv-newest/bin/python $(PYTEST)

clean:
	rm -rf $(VENV) .venv-lock .venv-oldest .venv-newest build dist *.egg-info
