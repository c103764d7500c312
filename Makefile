# make demo      set up, convert the embedded model, write some text with the result
# make test      set up, then every check that needs no GPU; what CI runs
# make test-gpu  set up, then the tests that need an NVIDIA GPU
# make lint      the checks that run no test
# make kernels   compile every GPU kernel that ships, without a GPU: with the Triton that is installed and with KERNELS_TRITON; minutes
# make setup     only the environment
#
# A machine without an NVIDIA GPU gets TORCH, so that pip does not choose a CUDA build of several GB by itself; set it to whatever
# torch suits yours, e.g. `make setup TORCH='torch==2.13.0'`. A torch that PYTHON can import already is used as it is.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
export PATH := $(abspath $(VENV)/bin):$(PATH)

# Two test processes of one thread each: on 2 cores faster than one process of two threads, whose small matrices do not fill a core.
TEST_PROCESSES ?= 2

# What torch 2.11 pins; the kernels were measured with it.
KERNELS_TRITON ?= 3.6.0

.PHONY: setup demo test test-gpu lint kernels clean

setup: $(VENV)/.installed

# The venv sees the packages of PYTHON only if torch is among them: then its owner chose that torch for this machine.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	python -c 'import torch' 2>/dev/null || nvidia-smi >/dev/null 2>&1 || python -m pip install --quiet '$(TORCH)'
	python -m pip install --quiet -e '.[dev]'
	touch $@

demo: setup
	attnconvert linearize demo --recipe hedgehog --out demo-hedgehog --overwrite
	attnconvert generate demo-hedgehog 'The captain looked at the sea and' --max-new-tokens 60

lint: setup
	ruff check .
	ruff format --check .
	python -m mypy
	lint-imports --no-cache

test: lint
	OMP_NUM_THREADS=1 python -m pytest -m 'not gpu and not slow' -n $(TEST_PROCESSES) --dist worksteal

kernels: setup build/triton-$(KERNELS_TRITON)
	OMP_NUM_THREADS=1 python tools/compile_kernels.py --jobs $(TEST_PROCESSES)
	OMP_NUM_THREADS=1 PYTHONPATH=build/triton-$(KERNELS_TRITON) python tools/compile_kernels.py --jobs $(TEST_PROCESSES)

# The folder appears when it is whole.
build/triton-$(KERNELS_TRITON): | setup
	rm -rf $@.part
	python -m pip install --quiet --no-deps --target $@.part 'triton==$(KERNELS_TRITON)'
	mv $@.part $@

test-gpu: setup
	python -m pytest -m gpu tests

clean:
	rm -rf $(VENV) demo-hedgehog demo-hedgehog.run build *.egg-info
