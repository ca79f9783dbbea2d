PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz lint bench coverage docs zoo clean

# torch comes first and by itself, so that no other package can pull a different build of it.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[models,openvino,dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/bitwright demo --force

# One thread a worker: the tests' networks are tiny, and waiting threads would only get in each other's way.
test: .venv/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto

# Ten thousand broken files of every kind that is read; `make test` tries five hundred of them.
fuzz: .venv/.installed
	BITWRIGHT_FUZZ=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/given/test_fuzz.py

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m benchmarks.calibration
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.reconstruct
	$(BIN)/python -m benchmarks.scores
	$(BIN)/python -m benchmarks.evolve
	$(BIN)/python -m benchmarks.deploy --fresh
	$(BIN)/python -m benchmarks.static
	$(BIN)/python -m benchmarks.narrow

# Some 150 networks of timm, torchvision and transformers, an hour or two; what was done goes on where it stopped.
coverage: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[coverage]'
	$(BIN)/python -m benchmarks.coverage

# The site, in build/site.
docs: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Trains the embedded networks again; needs Fashion-MNIST in its original four files.
zoo: .venv/.installed
	$(BIN)/python -m bitwright.zoo.train
	OMP_NUM_THREADS=1 $(BIN)/python -m bitwright.zoo.train_dense

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
