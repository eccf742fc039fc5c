# lclm: `make train` trains a tiny model from raw text to a generating checkpoint; `make help` lists the rest.

VENV ?= .venv
# FRESH=1 with `make train`: delete what it made before (data, run) and do it again
FRESH ?=
KILLS ?= 50

BIN := $(VENV)/bin
STAMP := $(VENV)/.lclm-$(shell cat setup.cfg constraints.txt | cksum | cut -d' ' -f1)
export PATH := $(abspath $(BIN)):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup train test test-all kills lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## make the virtual environment (once; again when setup.cfg or constraints.txt change)

$(STAMP): setup.cfg constraints.txt
	@launch/setup.sh $(VENV)
	@rm -f $(VENV)/.lclm-* && touch $@

train: $(STAMP)  ## raw text -> shards -> tiny model -> report, export and a sample, in ten minutes on two cores
	@FRESH=$(FRESH) launch/first_run.sh

test: $(STAMP)  ## the tests, without those marked slow
	@python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: $(STAMP)  ## every test
	@python -m pytest -q -n 2 --dist loadfile

kills: $(STAMP)  ## kill small training runs KILLS times (50), see that each ends as if it had not been; half an hour
	@python -m tests.distributed.kills --kills $(KILLS)

lint: $(STAMP)  ## style and types
	@ruff check . && ruff format --check . && mypy

format: $(STAMP)  ## apply the style
	@ruff check --fix . && ruff format .

clean:  ## delete what `make train` made, and caches; the virtual environment stays
	@rm -rf data/stdlib runs/tiny build .pytest_cache .mypy_cache .ruff_cache
