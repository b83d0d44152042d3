# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8

.PHONY: demo test chaos fuzz data-size setup check operators lock bench gpu sanitize torch-versions clean

demo: setup
	@$(BIN)/python -m jobs demo

# A process a core, up to four: each begins with a stretch of the tests, then takes over from the
# others, so that fixtures are made about once. Not --dist loadfile, which starts a test that
# crashes again and again, nor loadgroup, which pytest-xdist 3.8 does not do with pytest 9.2.
TEST_PROCESSES ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc); echo $$((cores < 4 ? cores : 4)))
test: setup check
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

setup: $(VENV)/.installed operators

# The environment, made anew into the same folder whenever the lock changes.
$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --requirement requirements.lock
	@touch $@

# A no-op where sources, compilers and torch are those of the last build.
operators: $(VENV)/.installed
	@$(BIN)/python -m cuda_ops build

check: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

# Kills at random and cut networks; about an hour. Its cluster is of this machine alone.
chaos: setup
	@$(BIN)/python -m pytest -m chaos

# Damaged files for everything that reads files: 22,000 of them, some minutes on one core.
FUZZ_INPUTS ?= 22000
FUZZ_SEED ?= 0
fuzz: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)

# Conversion beside tar, and the loader's memory over three epochs, at COCO's size; fails above the
# limits of the two files. Takes 36 GB of disk, of which the drawn input's 18 stay in outputs/ for the
# next time. Of a few thousand images convert's start-up alone takes more time than the limit allows.
COCO_IMAGES ?= 118287
data-size: setup
	@failed=0; \
	$(BIN)/python tests/data_prep/coco_size.py outputs/coco-size-$(COCO_IMAGES) \
		--images $(COCO_IMAGES) --own-files --cold || failed=1; \
	OMP_NUM_THREADS=1 $(BIN)/python tests/pipeline/check_memory.py $(COCO_IMAGES) || failed=1; \
	exit $$failed

bench: setup
	@$(BIN)/python -m cuda_ops benchmark

# For a GPU machine, without the environment above: PYTHON needs torch, torchvision, scipy, simplejpeg
# and tyro; transformers for BESIDE, pytest and hypothesis for the tests, the packages of
# requirements.lock for those of trainings. Goes on after a failure, then fails.
BESIDE ?= grid_sample transformers
STEPS ?= 20
RESULTS := docs/benchmarks
gpu:
	@name=$$($(PYTHON) -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))' 2>/dev/null) \
		|| { echo "make gpu: $(PYTHON) has no torch that sees a GPU; give PYTHON=" >&2; exit 1; }; \
	failed=; mkdir -p $(RESULTS); \
	try() { echo "--- $$*"; "$$@" || failed="$$failed\n  $$*"; }; \
	try $(PYTHON) -m cuda_ops build; \
	try $(PYTHON) -m cuda_ops check --device cuda; \
	try $(PYTHON) -m cuda_ops benchmark --device cuda --output $(RESULTS)/operators-$$name.json; \
	if $(PYTHON) -c 'import pytest' 2>/dev/null; then \
		trainings=tests/pipeline/test_training_on_gpu.py; \
		$(PYTHON) -c 'import deepspeed, faster_coco_eval, pycocotools' >/dev/null 2>&1 || { trainings=; \
			echo "--- deepspeed, faster-coco-eval or pycocotools is missing: no trainings"; }; \
		try $(PYTHON) -m pytest -m gpu tests/cuda_ops tests/pipeline/test_bad_step.py \
			tests/pipeline/test_benchmark_step.py tests/pipeline/test_loader_hand_over.py $$trainings; \
	else echo "--- pytest is not installed: the tests marked gpu are left out"; fi; \
	try $(PYTHON) -m pipeline benchmark-step deformable_detr_r50 --device cuda --batch-sizes 2 4 8 \
		--steps $(STEPS) --beside $(BESIDE) --output $(RESULTS)/step-$$name.json; \
	try $(PYTHON) -m pipeline benchmark-step deformable_detr_r50 --device cuda --batch-sizes 2 4 8 \
		--steps $(STEPS) --compile --output $(RESULTS)/step-compile-$$name.json; \
	if [ -n "$$failed" ]; then printf 'failed:%b\n' "$$failed" >&2; exit 1; fi

# The kernels under compute-sanitizer, of the CUDA toolkit: wrong addresses, and races in shared memory.
sanitize:
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m cuda_ops check --device cuda --no-large
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m cuda_ops check --device cuda --no-large

# One CPU library under every torch from 2.11 on: minutes, and gigabytes of downloads.
torch-versions: setup
	@$(BIN)/python tests/cuda_ops/check_torch_versions.py

lock:
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --no-emit-index-url \
		--no-annotate --no-header --group pyproject.toml:cuda --group pyproject.toml:dev \
		--group pyproject.toml:lock pyproject.toml --output-file requirements.lock

clean:
	rm -rf .build outputs
