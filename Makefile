# make demo    sets everything up and personalizes the built-in model on examples/me.txt
# make test    sets everything up, lints and runs the tests
# make lint    ruff check, ruff format, mypy
# make bench   training and sampling speed here, against the plain path

PYTHON ?= python3
BIN := .venv/bin
CONTEXT ?= examples/me.txt
RUN ?= runs/demo
WORKERS ?= 2

.PHONY: install demo test lint bench bench-gpu clean

install: .venv/installed

# torch comes first and pinned, so that nothing after it asks for another one.
# llama-cpp-python has no wheel: it is compiled here, once, which takes some minutes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch -c constraints.txt
	@echo "Installing; compiling llama.cpp takes some minutes the first time."
	$(BIN)/pip install --quiet -e '.[dev,math]' -c constraints.txt
	@touch $@

demo: install
	$(BIN)/mipo-lite personalize --user-context $(CONTEXT) --base builtin --run $(RUN)
	$(BIN)/mipo-lite chat $(RUN) --message "What should I do this weekend?"

# One thread for each process: the models of the tests are too small to share among cores.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/mipo-lite bench

bench-gpu: install
	$(BIN)/python -m mipo_lite.bench_gpu

clean:
	rm -rf .venv build dist
