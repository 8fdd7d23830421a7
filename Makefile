# make demo   set up and run the main job: train, practise, evaluate (no GPU needed)
# make test   set up and pass the tests
# make bench  measure the operators on this CPU; rows go to benchmarks/results/
# make gpu    GPU tests and benchmarks with the machine's own Python, offline, under nine minutes

.PHONY: setup demo test bench gpu
SHELL := /bin/bash
export PYTHON

demo: export DS_ACCELERATOR := $(or $(DS_ACCELERATOR),$(if $(wildcard /dev/nvidia0),cuda,cpu))
demo: setup
	.venv/bin/etude demo

test: export DS_ACCELERATOR := cpu
test: setup
	.venv/bin/python -m pytest -q

bench: setup
	.venv/bin/python -m benchmarks.run

gpu:
	bash benchmarks/gpu.sh

setup:
	@.ci/setup
