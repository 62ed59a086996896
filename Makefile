# The two commands of the README, `make demo` and `make test`, do all their own set-up from nothing but
# python3 (3.10 to 3.13), make and a network with PyPI. A second call installs nothing.

PYTHON  ?= python3
GPU_PYTHON ?= python3.12
WORKERS ?= 2

# Everything is tested on this stack, too, beside the newest one that pip finds.
PINNED := torch==2.11.0 torchvision==0.26.0 triton==3.6.0

# The ends of what is said to work, and two between: Python, torch, torchvision, Triton; the last one takes the newest.
MATRIX := 3.10-2.8.0-0.23.0-3.4.0 3.12-2.11.0-0.26.0-3.6.0 3.11-2.14.1-0.29.1-3.8.0 3.13

# One thread per test worker: two workers with two threads each would fight over two cores.
PYTEST := -m pytest -n $(WORKERS)

# What meets no tensor of the CPU with one of the GPU is shown on CPU tensors that say they are on a GPU.
ON_A_FAKE_GPU := tests/train tests/examples tests/model/test_head.py tests/model/test_backbone.py tests/bench/test_training.py \
	tests/bench/test_on_gpu.py

.PHONY: help demo test test-pinned test-gpu-arithmetic test-matrix test-full gpu-ready gpu-rehearse lint format clean

help:
	@echo "make demo                 train a small DeGMix on synthetic rooms; results in runs/demo/"
	@echo "make test                 run every test this machine can run"
	@echo "make test-pinned          the same on $(PINNED)"
	@echo "make test-gpu-arithmetic  the kernels' tests with a GPU's rounding errors, on the same"
	@echo "make test-matrix          the same on four stacks, from torch 2.8 to the newest, Python 3.10 to 3.13"
	@echo "make test-full            the same as make test, and the tests that take many minutes"
	@echo "make gpu-ready            without a GPU, compile whatever a visit to a GPU machine launches, into .gpu/"
	@echo "make gpu-rehearse         run that visit here, over a driver that launches nothing"
	@echo "make lint                 ruff check and ruff format --check"
	@echo "make format               rewrite the sources as ruff format wants them"
	@echo "make clean                remove the virtual environments and everything the commands above made"

demo: .venv/demo.installed
	.venv/bin/python -m degmix demo

test: .venv/test.installed
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST)

test-full: .venv/test.installed
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) --full
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) -p fake_cuda $(ON_A_FAKE_GPU)

test-pinned: .venv-pinned/test.installed
	OMP_NUM_THREADS=1 .venv-pinned/bin/python $(PYTEST)

# test_compile.py is left out: what compilers make of a kernel does not depend on the interpreter.
test-gpu-arithmetic: .venv-pinned/test.installed
	DEGMIX_GPU_ARITHMETIC=1 OMP_NUM_THREADS=1 .venv-pinned/bin/python $(PYTEST) \
		tests/test_contract.py tests/kernels --ignore=tests/kernels/test_compile.py

# Each environment takes some 6 GB, and goes when its tests have passed.
test-matrix: $(MATRIX:%=matrix-%)

matrix-%:
	rm -rf .venv-$@
	python$(firstword $(subst -, ,$*)) -m venv .venv-$@
	.venv-$@/bin/python -m pip install --quiet -e ".[test]" \
		$(if $(findstring -,$*),$(join torch== torchvision== triton==,$(wordlist 2,4,$(subst -, ,$*))))
	OMP_NUM_THREADS=1 .venv-$@/bin/python $(PYTEST)
	rm -rf .venv-$@

lint: .venv/test.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/test.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The same Python as on the machines that are visited: launchers are compiled for it.
gpu-ready: .venv-gpu/test.installed
	.venv-gpu/bin/python -m bench.gpu.prepare

gpu-rehearse: .venv-gpu/test.installed
	.venv-gpu/bin/python -m bench.gpu.rehearse

clean:
	rm -rf .venv .venv-pinned .venv-gpu .venv-matrix-* .gpu runs gpu_check build dist .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/bin/python .venv-pinned/bin/python:
	$(PYTHON) -m venv $(@D)/..

.venv-gpu/bin/python:
	@$(GPU_PYTHON) -c "" 2>/dev/null || { echo "make gpu-ready needs Python 3.12, which a visit finds on its machine: GPU_PYTHON=/path/to/python3.12"; exit 1; }
	$(GPU_PYTHON) -m venv $(@D)/..

# A stamp is touched last, so an interrupted installation is done again.
.venv/demo.installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet -e ".[train]"
	touch $@

.venv/test.installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet -e ".[test]"
	touch $@

.venv-pinned/test.installed .venv-gpu/test.installed: %/test.installed: pyproject.toml Makefile | %/bin/python
	$*/bin/python -m pip install --quiet $(PINNED) -e ".[test]"
	touch $@
