PYTHON ?= python3
BIN := .venv/bin
# A package is compiled when it is first imported, and kept: otherwise each import of PyTorch takes
# three times as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check check-types check-style check-layers check-docs docs install format coverage-models soak fuzz clean

demo: .venv/installed-demo
	$(BIN)/stochastic-depth compare digits --seeds 3 --minutes 3 --out runs/demo

# A process for each core, up to eight, with one thread: most tests compute on small tensors; where a
# test has more, they give a busy core free soon. Files are handed out as tests/conftest.py orders
# them, the longest first.
test: check
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=1000 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Two at a time: the types take a minute of one core.
check: install
	$(MAKE) --no-print-directory -j2 check-types check-style check-layers check-docs

check-types:
	$(BIN)/pyright
check-style:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
check-layers:
	$(BIN)/lint-imports
check-docs:
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What is in the file is not tried again: remove it to begin anew.
coverage-models: .venv-coverage/installed
	PYTHONPATH=src .venv-coverage/bin/python tools/coverage_models.py --out runs/coverage-models.jsonl --summary results/coverage-models.json

# Libraries of models, for this alone: beside .venv, and without what they depend on, which would
# replace PyTorch. The compiled parts of torchaudio are for CUDA, and its models do without.
.venv-coverage/installed: .venv/installed-dev pyproject.toml
	$(BIN)/python -m venv .venv-coverage
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > .venv-coverage/base.pth
	mv .venv-coverage/base.pth .venv-coverage/lib/python3*/site-packages
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["coverage"], sep="\n")' > .venv-coverage/packages
	.venv-coverage/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement .venv-coverage/packages
	find .venv-coverage -path '*/torchaudio/*.so' -delete
	touch $@

soak: install
	STOCHASTIC_DEPTH_SOAK=1 $(BIN)/pytest -m soak tests

fuzz: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tools/fuzz.py --seconds 60

install: .venv/installed-dev

NEEDS_demo := PyTorch, scikit-learn and what draws pictures, 1.1 GB
NEEDS_dev := all that the tests use, about 3 GB

# Only what commands import is compiled, which is a tenth of it. What the demonstration needs is part
# of what the tests need. A failed installation leaves no file, and begins again.
.venv/installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": give one with make PYTHON=...")'
	@echo 'Installing into .venv: $(NEEDS_$*).'
	@command -v nvidia-smi > /dev/null || echo 'No NVIDIA GPU is seen here. Without it, PyTorch is 3 GB smaller with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$*]'
	$(BIN)/python -c 'import stochastic_depth.lab.comparison'
	touch .venv/installed-demo $@

clean:
	rm -rf .venv .venv-coverage build dist site .pytest_cache .ruff_cache .import_linter_cache
