# Each target sets up what it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.ready
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

.PHONY: venv demo test test-all lint bench bench-svd accuracy clean

venv: $(STAMP)

# torch first and alone: a later resolver must find it and never choose another build.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,oracle,demo]'
	touch $(STAMP)

demo: venv
	$(BIN)/python examples/demo_images.py --work build/demo/images
	$(BIN)/python examples/demo_encoder.py --work build/demo/encoder

# One process per core; then, alone, what keeps to the clock.
BESIDE = $(BIN)/pytest -q -n logical --dist worksteal

test: venv
	$(BESIDE) -m 'not huge and not timed'
	$(BIN)/pytest -q -m 'timed and not huge'

test-all: venv
	$(BESIDE) -m 'not huge and not timed'
	$(BIN)/pytest -q -m 'huge or timed'

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check fastmerge tests benchmarks examples triton_kernels setup.py
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.[ch]pp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/report.py --check

bench: venv
	$(BIN)/pytest -q benchmarks/bench_ops.py --benchmark-autosave --benchmark-columns=min,median,rounds \
		--results benchmarks/results/ops.json
	$(BIN)/python benchmarks/bench_merge.py
	$(BIN)/python benchmarks/bench_merge.py --cold
	$(BIN)/python benchmarks/bench_merge.py --sweep
	$(BIN)/python benchmarks/report.py

# FusionBench's functions are what it is compared with; they stay out of the environment.
bench-svd: venv
	test -d build/rivals || $(BIN)/pip install -q --no-deps --target build/rivals fusion-bench
	$(BIN)/python benchmarks/bench_svd.py --rivals build/rivals
	$(BIN)/python benchmarks/bench_merge.py --decompose --experts 4
	$(BIN)/python benchmarks/bench_merge.py --decompose --experts 3 --parameters 150e6
	$(BIN)/python benchmarks/report.py

accuracy: venv
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf build dist *.egg-info $(VENV)
