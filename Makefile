# image_text_sim_clip: `make help` lists what there is. Everything runs in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := image_text_sim_clip.py curate.py addons challenge_set examples readme_imgs tests

.PHONY: help demo test quick fuzz lint bench bench-scale bench-web bench-stores bench-gpu figures model finetuned finetuned-flow clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/ready  ## score the bundled drawings with the bundled model, without a download of either
	$(BIN)/python image_text_sim_clip.py --config challenge_set/demo.yaml

test: .venv/ready-for-tests lint  ## run linter, type checker and all tests
	$(BIN)/python -m pytest -n 2

quick: .venv/ready-for-tests  ## run the tests that take no time
	$(BIN)/python -m pytest -n 2 -m "not slow"

fuzz: .venv/ready-for-tests  ## mutated images and tables, a minute each, from a new seed
	FUZZ_S=60 FUZZ_SEED=$$(date +%s) $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

lint: .venv/ready-for-tests  ## ruff and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

bench: .venv/ready  ## time this script, a one-by-one loop and plain batches (ViT-B/32, CPU, ten minutes)
	$(BIN)/python tests/bench.py --out scores/bench --plot readme_imgs/throughput.png
	$(BIN)/python tests/bench_several.py --out scores/bench-several

bench-scale: .venv/ready-for-tests  ## rows/s of one process, two ranks and Ray on the same dry run; MB/s of staging; rows/s of scores.csv and curate
	$(BIN)/python tests/bench_scale.py
	$(BIN)/python tests/bench_inputs.py
	$(BIN)/python tests/bench_ends.py

bench-web: .venv/ready-for-tests  ## images/s from a loopback web with hosts that fail, next to img2dataset (IMG2DATASET=its command)
	$(BIN)/python tests/bench_web.py

bench-stores: .venv/ready-for-tests  ## images/s from an object store and over plain HTTP, from one server on loopback
	$(BIN)/python tests/bench_stores.py

bench-gpu: .venv/ready  ## the same on CUDA, with more models
	$(BIN)/python tests/bench.py --out scores/bench --gpu --plot scores/bench/throughput-gpu.png

figures: .venv/ready-for-tests  ## draw everything in readme_imgs again, from real runs
	$(BIN)/python readme_imgs/draw_figures.py

model: .venv/ready  ## train challenge_set/shapes_clip again and draw its images (half an hour on two cores)
	$(BIN)/python challenge_set/draw_shapes.py
	$(BIN)/python challenge_set/train_shapes_clip.py

finetuned: .venv/ready-for-tests  ## fine-tune a tiny text-to-image pipeline with dissimilarity, from three seeds (most of an hour)
	$(BIN)/python examples/demonstrate_finetuning.py

finetuned-flow: .venv/ready-for-tests  ## the same for a pipeline of flow matching, with one teacher and with two
	$(BIN)/python examples/demonstrate_finetuning.py --kind flow

clean:  ## remove the virtual environment, caches and the results of demo and bench; other runs stay
	rm -rf .venv scores/demo scores/bench scores/bench-several .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt addons/requirements.txt examples/requirements.txt addons/requirements-scale.txt addons/requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@
