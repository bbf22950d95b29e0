# SPDX-License-Identifier: Apache-2.0
# Every target sets .venv up first; that takes no time when nothing changed. To choose Python or
# torch anew, remove .venv. tools/bootstrap.py says how torch is chosen.

PYTHON ?= python3
RUN := .venv/bin/python
# Tools that a --system-site-packages environment has from the base interpreter are on PATH alone.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup check test test-all test-interpreted tiles tune resources demo bench readme-bench docs clean

help:
	@echo "make setup | check | test | test-all | test-interpreted | tiles | tune | resources | demo | bench | readme-bench | docs | clean"

setup:
	@$(PYTHON) tools/bootstrap.py

check: setup
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	clang-format --dry-run -Werror csrc/*.h csrc/*.cu csrc/*.cpp

# With the tests that build wheels: a broken build is what users meet first. What is marked `slow`
# (tests/_slow.py has most of it) runs in `make test-all`.
test: setup
	$(RUN) tools/halves.py

test-all: setup
	$(RUN) -m pytest -q

# The whole contract suite through Triton's interpreter; also on a machine with a GPU.
test-interpreted: setup
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(RUN) -m pytest -q tests/contract -k triton-interpreted

# Tiles of the kernels for each GPU, and what the kernels need with them: compiled with both tritons,
# an hour or more. TRITON36 is where setup puts the second.
TRITON36 := PYTHONPATH=$(CURDIR)/.venv/triton36
tiles: setup
	$(RUN) tools/tiles.py
	$(TRITON36) $(RUN) tools/tiles.py
	$(RUN) tools/tiles.py

# Times the tiles on the GPU at hand and keeps the fastest.
tune: setup
	$(RUN) tools/tune.py

resources: setup
	$(RUN) tools/resources.py --table tests/aot/resources.json
	$(TRITON36) $(RUN) tools/resources.py --table tests/aot/resources.json

demo: setup
	$(RUN) examples/digits.py --out runs/demo --seed 0 --json runs/demo/report.json

bench: setup
	$(RUN) -m pytest bench -q

readme-bench: setup
	$(RUN) tools/readme_tables.py

# The documentation is plain Markdown; this runs its examples and compares its tables and schemas.
docs: setup
	$(RUN) tools/readme_tables.py --check
	$(RUN) -m pytest -q tests/contract/test_docs.py tests/test_readme.py

# .venv stays, making it is the dear part; without its stamp the next setup builds the library anew.
clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f clam_kernels/_C.so clam_kernels/_build.json .venv/clam-setup
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
