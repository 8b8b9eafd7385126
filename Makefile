# Needs Python >= 3.11 with pip, and make. `make demo` on a fresh clone is enough: it installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
# Two test processes use both cores of a small machine; each runs its maths on one thread (tests/conftest.py).
WORKERS ?= 2

BIN := $(VENV)/bin
# -qq hides pip's notices and keeps its errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv demo paper test flower mutations lint docs dist benchmarks rivals comparison clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

venv: $(VENV)/.dev ## install everything for development into .venv

demo: $(VENV)/.lab ## calibrate, train with correlated noise, compare with DP-SGD: writes demo/
	$(BIN)/rootnoise demo --out demo

paper: $(VENV)/.lab ## compute the paper's claims again in hours (QUICK=1: in minutes): writes paper/
	$(BIN)/python papers/kalinin-lampert-2024/reproduce.py --out paper $(if $(QUICK),--quick)

test: $(VENV)/.test ## run every test and every docstring example
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

flower: .venv-flower/.done ## run the tests of the Flower strategy against the real flwr, in .venv-flower
	.venv-flower/bin/pytest tests/test_flower.py tests/test_flower_runs.py

mutations: $(VENV)/.mutations ## plant privacy bugs one at a time: the tests must catch each (30 minutes)
	$(BIN)/python tests/mutate.py

lint: $(VENV)/.lint ## style, formatting, the import rule of ARCHITECTURE.md, and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation into site/; an undocumented public name fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.dist ## build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

benchmarks: $(VENV)/.lab ## run each script of benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script"; done

rivals: $(VENV)/.lab ## install JAX-Privacy and opake, each in .venv-rivals-NAME (FASTDP=FOLDER: fastDP too)
	$(BIN)/python benchmarks/comparison/install.py $(if $(FASTDP),--fastdp $(FASTDP))

comparison: $(VENV)/.lab ## measure rootnoise beside them (QUICK=1: in 10 minutes): writes docs/comparison.json and .md
	$(BIN)/python benchmarks/comparison/run.py $(if $(QUICK),--quick)

clean: ## remove .venv, caches and everything the targets above wrote
	rm -rf $(VENV) .venv-flower .venv-rivals-* demo paper site build dist .hypothesis .import_linter_cache .mutations .mypy_cache .pytest_cache .ruff_cache
	find src tests papers -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each extra of pyproject.toml; an edit of either file below renews the install.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/created
	@echo "Installing rootnoise[$*] into $(VENV): a few minutes the first time, seconds later."
	@$(PIP) install -c constraints.txt -e '.[$*]'
	@touch $@

# flwr wants an older typer and rich than the pins: those two are left to pip.
.venv-flower/.done: pyproject.toml constraints.txt
	@echo "Installing rootnoise[test,flower] into .venv-flower: a few minutes the first time."
	@$(PYTHON) -m venv .venv-flower
	@grep -vE '^(typer|rich)==' constraints.txt > .venv-flower/constraints.txt
	@.venv-flower/bin/python -m pip --disable-pip-version-check --no-input -qq \
		install -c .venv-flower/constraints.txt -e '.[test,flower]'
	@touch $@

OLD = "rootnoise needs Python >= 3.11, got %d.%d: try make PYTHON=python3.12" % sys.version_info[:2]

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit($(OLD))'
	@$(PYTHON) -m venv $(VENV)
	@touch $@
