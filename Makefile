# make demo     set up and run the main job: train, practise, evaluate (no GPU needed)
# make test     set up and pass the tests
# make bench    measure the operators on this CPU; rows go to benchmarks/results/
# make aot-3.6  compile the Triton kernels with Triton 3.6, which torch 2.11 brings, against the budgets
# make mutations  break each promised feature of evaluation and see its test turn red
# make gpu      GPU tests and benchmarks with the machine's own Python, offline, under nine minutes

.PHONY: setup demo test bench aot-3.6 mutations gpu
SHELL := /bin/bash
export PYTHON

demo: export DS_ACCELERATOR := $(or $(DS_ACCELERATOR),$(if $(wildcard /dev/nvidia0),cuda,cpu))
demo: setup
	.venv/bin/etude demo

test: export DS_ACCELERATOR := cpu
test: setup
	.venv/bin/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: setup
	.venv/bin/python -m benchmarks.run

aot-3.6: setup
	.venv/bin/python -m pip install -q --no-deps --upgrade --target .cache/triton-3.6 triton==3.6.0
	PYTHONPATH=.cache/triton-3.6 .venv/bin/python -m etude.kernels.compiling --check

mutations: export DS_ACCELERATOR := cpu
mutations: setup
	.venv/bin/python tests/mutations/run.py

gpu:
	bash benchmarks/gpu.sh

setup:
	@.ci/setup
