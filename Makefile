# make setup   builds .venv from pyproject.toml and constraints.txt, if it is not up to date
# make demo    trains Zoom-in-Net on drawn eyes, from nothing to figures
# make test    the tests that take seconds: what a change must pass (without LLVM's passes, a quarter
#              of their time: XLA's programs are the same)
# make proof   everything: the long tests, and over three seeds that zooming pays
# make proof-attention   a global attention against none, over three seeds: does it gain, and
#              find the region that decides? (at most 40 minutes on two cores)
# make lint    ruff's findings
# make clean   removes .venv and caches; leaves runs/ and data/ alone
#
# PYTHON=python3.12   builds .venv with that Python (3.11 to 3.13); else the first that works
# EXTRAS=dev,cuda12   installs more extras of pyproject.toml (cuda12, cuda13, tpu, torch)

EXTRAS ?= dev
PYTHON ?= python3 python3.13 python3.12 python3.11
FITS = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
RUN = .venv/bin/python
STAMP = .venv/.installed-$(EXTRAS)

.PHONY: help setup demo test proof proof-attention lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(RUN) -c "" 2>/dev/null || { \
	  for python in $(PYTHON); do \
	    if $$python -c "$(FITS)" >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: no Python 3.11 to 3.13 with its venv module among: $(PYTHON)." >&2; \
	    echo "make: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$($$found --version)."; \
	  $$found -m venv --clear .venv; \
	}
	@echo "Installing into .venv what pyproject.toml asks for (minutes, the first time)."
	@$(RUN) -m pip install -qq --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(RUN) -m medattn_jax train --config=configs/demo.py --workdir=runs/demo

test: $(STAMP)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(RUN) -m pytest -m "not slow" -n 2 --dist worksteal

proof: $(STAMP)
	$(RUN) -m pytest -n 2 --dist worksteal
	$(RUN) -m benchmarks.zooming

proof-attention: $(STAMP)
	$(RUN) -m benchmarks.global_attention --sources=none,bank-linear --seeds=0,1,2 \
	  --least-gain=0 --least-iou=0.6 --workdir=runs/proof_attention

lint: $(STAMP)
	$(RUN) -m ruff check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
