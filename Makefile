# Each target sets up what it needs first (scripts/bootstrap.py), on a fresh clone with only Python >= 3.11 and make.
#
#   make compare [ARGS="--shape dsv3_tp16 --tokens 1,8,64"]   verify, time and select all variants on this machine
#   make test                                                 the tests that need no GPU
#   make check                                                format, lint, types, import rules
#   make gpu OUT=<folder>                                     the GPU tests and the comparison of the README
#   make clean                                                remove the environment and all caches
#
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
OUT ?= results/gpu
ARGS ?=
JOBS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: compare test check gpu clean python

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# The Python of target $@, in the shell variable `python`.
bootstrap = python="$$($(PYTHON) scripts/bootstrap.py $@)"

compare: python
	@$(bootstrap)
	"$$python" -m workbench compare $(ARGS)

test: python
	@$(bootstrap)
	OMP_NUM_THREADS=1 "$$python" -m pytest -n $(JOBS) -m "not gpu" $(ARGS)

check: python
	@$(bootstrap)
	"$$python" -m ruff format --check .
	"$$python" -m ruff check .
	"$$python" -m mypy
	"$${python%/*}/lint-imports"

GPU_SHAPES := dsv3_tp16 dsv3_tp8 qwen3next_tp4
GPU_TOKENS := 1,2,8,16,32,64,128,256,512,1024,2048,4096,8192

# torch.loop is verified by the tests and left out of the comparison: at 0.3 s a call it would take half of the time.
# The comparison runs even where a test failed, and its times are shown even where a variant was wrong; the target fails
# then all the same.
gpu: python
	@$(bootstrap)
	"$$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu: expected a CUDA device, torch sees none")'
	mkdir -p "$(OUT)"
	failed=0
	"$$python" -m pytest -m gpu --junitxml="$(OUT)/gpu_tests.xml" 2>&1 | tee "$(OUT)/gpu_tests.log" || failed=1
	COLUMNS=240 "$$python" -m workbench compare $(addprefix --shape ,$(GPU_SHAPES)) --tokens $(GPU_TOKENS) \
		--exclude torch.loop --results "$(OUT)" $(ARGS) > "$(OUT)/compare.log" || failed=1
	awk '/^## / { times = / input/ && !/:/ } times' "$(OUT)/table.md"
	exit $$failed

python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "python: expected 3.11 or later, got %d.%d; name another with make PYTHON=python3.12" % sys.version_info[:2])'

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
