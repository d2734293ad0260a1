# Every target works as the first command after `git clone`. It needs only make and Python 3.11 to 3.14.
#   PYTHON=/path/to/python3.12   the Python that builds .venv (default: the first one that fits)
#   ARGS="..."                   more arguments for the command of lab, demo, test-faults, bench, train or lab-runs

VENV  := .venv
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
# JupyterLab refuses to run as root, which is the only user of many containers.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
NOTEBOOKS := $(patsubst %.py,%.ipynb,$(sort $(wildcard notebooks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help setup lab demo test lint format test-faults test-gpu test-browser notebooks bench train lab-runs clean

help: ## List the targets
	@echo 'make <target> [ARGS="..."] [PYTHON=/path/to/python3]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Build .venv and fetch the text corpora (once, minutes; then instant)
	@$(PY) -m hsa_mini fetch

lab: setup ## Open the notebooks in JupyterLab (reachable from this machine only)
	JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/.jupyter" $(PY) -m jupyterlab --ip=127.0.0.1 \
		--LabApp.default_url=/lab/tree/$(firstword $(NOTEBOOKS)) $(ALLOW_ROOT) $(ARGS)

demo: setup ## Let the shipped model find one sentence in a long text
	$(PY) -m hsa_mini demo $(ARGS)

test: setup lint ## Check the code, run the tests, then run every notebook (no GPU needed)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal
	$(if $(wildcard notebooks/*.ipynb),HSA_MINI_TOKENS=16384 $(PY) -m pytest -q --nbval-lax --nbval-cell-timeout=60 notebooks/,@echo 'no notebooks to run')

# The .ipynb are generated, so neither tool reads them.
lint: $(READY) ## Check style, format and types (changes no file)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@if command -v node >/dev/null; then $(PY) -m pyright --pythonpath $(PY); \
	else echo 'types not checked: pyright needs Node.js'; fi

format: $(READY) ## Format the code and mend what ruff can mend by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test-faults: $(READY) ## Attack the project: power loss, crashes, kills, corruption, fuzz (an hour)
	$(PY) tests/faults $(ARGS)

test-gpu: $(READY) ## Run the tests that need an NVIDIA GPU
	$(PY) -m pytest -q tests/gpu

test-browser: setup ## Run the tests that drive JupyterLab in Chromium (which must be installed)
	$(PY) -m pytest -q tests/browser

# Two runs write the same files. --update keeps the ids of cells. Timings and the state and views of widgets are left out.
# The printed text of a cell is joined, because the kernel sends it in pieces that differ from run to run.
notebooks: setup ## Generate each .ipynb from its .py and execute it
ifneq ($(NOTEBOOKS),)
	$(PY) -m jupytext --to ipynb --update $(NOTEBOOKS:.ipynb=.py)
	$(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 \
		--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
		--NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor \
		--NotebookExporter.preprocessors=hsa_mini.viz.stills.KeepStills $(NOTEBOOKS)
else
	@echo 'no notebooks to run'
endif

bench: $(READY) ## Time the operations on this machine (on its GPU if it has one)
	$(PY) kernels/bench $(ARGS)

train: setup ## Train the three models of the course, or resume (minutes each on a GPU)
	@set -e; for model in mini mini_moe small_moe; do \
		if [ -f runs/$$model/final/manifest.json ]; then echo "runs/$$model/final exists already"; \
		else $(PY) -m hsa_mini train $$model $(ARGS); fi; done

lab-runs: setup ## Train and measure the laboratory's variants that have no result yet (on a GPU)
	$(PY) -m hsa_mini lab $(ARGS)

clean: ## Remove .venv, out/ and everything that builds and tests wrote
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find hsa_mini kernels notebooks tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Each candidate is run and not only looked up, because a pyenv shim can exist and fail, and Debian can lack ensurepip.
# Python 3.15 and later are refused, because the pinned Triton has no wheel for them.
# If .venv exists without $(READY), an interrupted run left it half-built, and it is built again from nothing.
$(READY): pyproject.toml environment.yml
	@set -e; \
	if [ ! -f $@ ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14 python) ''; do \
			if "$$python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; then break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo '$(or $(PYTHON),PATH): no Python 3.11 to 3.14 with its venv module; try make PYTHON=/path/to/python3.12' >&2; exit 1; \
		fi; \
		"$$python" -m venv --clear $(VENV); \
	fi; \
	rm -f $@; \
	echo 'Installing PyTorch, Triton, JupyterLab and the rest into $(VENV); this takes a few minutes ...'; \
	sed -n 's/^ *- \([A-Za-z0-9._-]*==.*\)$$/\1/p' environment.yml > $(VENV)/constraints.txt; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'; \
	touch $@
