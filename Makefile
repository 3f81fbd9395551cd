# Every target sets up what it needs; nothing but Python 3.11+ (with venv), make and a package index is assumed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# uv does not read pip's settings: hand it those that matter, and trust whom this machine trusts.
export UV_SYSTEM_CERTS ?= 1
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
export UV_CUSTOM_COMPILE_COMMAND := make lock
# Without bytecode every start compiles all that it imports: a second each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(VENV)/.run  ## the main job on sample data, from nothing, and what it cost
	@$(BIN)/python -m demo

.PHONY: up
up: $(VENV)/.run  ## a model stub and a proxy on fixed ports until Ctrl-C, with lines to paste
	@$(BIN)/python -m demo.up

.PHONY: setup
setup: $(VENV)/.dev  ## everything that development needs, into .venv

.PHONY: test
test: $(VENV)/.dev  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -m "not slow and not k8s" -n 2 --dist loadfile $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.dev  ## the slow tests, but for those that want the machine for themselves
	$(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadfile $(PYTEST_ARGS)

.PHONY: test-alone
test-alone: $(VENV)/.dev  ## the slow tests that are judged by time or memory, one after the other
	$(BIN)/python -m pytest -m "slow and alone" $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/.dev  ## figures beside their floors, as tables and in .bench/
	$(BIN)/python -m benchmarks

.PHONY: audit
audit: $(VENV)/.audit  ## an SBOM of every lock, and what is known against what is in it (queries an advisory service)
	$(BIN)/python -m scripts.audit

.PHONY: mutants
mutants: $(VENV)/.mutants  ## change the code in one place at a time and list what no test notices (MUTANTS="gcra claim.lua --sample 20")
	$(BIN)/python -m scripts.mutants $(MUTANTS)

.PHONY: k8s-check
k8s-check: $(VENV)/.k8s  ## deploy/k8s: schemas, a policy, and whether it fits itself and the code
	$(BIN)/python -m scripts.prometheus_rule --check
	$(BIN)/python -m scripts.k8s_check
	$(BIN)/python -m pytest -m k8s tests/k8s

.PHONY: k8s-rules
k8s-rules: $(VENV)/.k8s  ## make deploy/k8s's PrometheusRule again from deploy/prometheus/rules.yaml
	$(BIN)/python -m scripts.prometheus_rule

.PHONY: images
images: $(VENV)/.run  ## both services and the stub as images (REGISTRY= TAG= BASE=), by podman or docker
	$(BIN)/python scripts/images.py build --registry "$(REGISTRY)" --tag "$(TAG)" --base "$(BASE)" --build-args="$(BUILD_ARGS)"

.PHONY: image-test
image-test: $(VENV)/.run  ## build them, and run the main job in them: read-only, without capabilities
	$(BIN)/python scripts/images.py test --registry "$(REGISTRY)" --tag "$(TAG)" --base "$(BASE)" --build-args="$(BUILD_ARGS)"

.PHONY: lint
lint: $(VENV)/.dev  ## style, types, imports, and that nothing made has drifted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/python scripts/protos.py --check
	$(BIN)/python scripts/locks.py --check
	$(BIN)/python -m scripts.metrics --check
	$(BIN)/python -m scripts.dashboards --check
	@if command -v promtool >/dev/null; then promtool check rules deploy/prometheus/rules.yaml; \
		else echo "promtool is not installed: the rules are not checked"; fi

.PHONY: format
format: $(VENV)/.dev  ## put the code in its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: protos
protos: $(VENV)/.dev  ## make the stubs again from protos/seniority.proto
	$(BIN)/python scripts/protos.py

.PHONY: monitoring
monitoring: $(VENV)/.dev  ## make docs/metrics.md and the dashboards again
	$(BIN)/python -m scripts.metrics
	$(BIN)/python -m scripts.dashboards

.PHONY: screenshots
screenshots: $(VENV)/.dev  ## take the pictures of the status page again (needs chromium)
	$(BIN)/python -m scripts.screenshots

.PHONY: lock
lock: $(VENV)/.uv  ## bring the locks in line with pyproject.toml (UPGRADE=1: to the newest versions)
	$(BIN)/python scripts/locks.py $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean:  ## remove what was made
	rm -rf $(VENV) .demo .bench .audit .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# --- set-up -----------------------------------------------------------------------------------------------

$(VENV)/.uv: requirements/bootstrap.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@touch $@

# uv installs a lock in seconds; where it cannot reach the index that pip was set up for, pip does, in a minute.
define install
	@echo "installing into $(VENV)"
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes $(1) \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes $(1)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --offline --editable .
endef

$(VENV)/.run: $(VENV)/.uv requirements/proxy.txt requirements/augmenter.txt requirements/stub.txt pyproject.toml
	$(call install,-r requirements/proxy.txt -r requirements/augmenter.txt -r requirements/stub.txt)
	@touch $@

$(VENV)/.dev: $(VENV)/.uv requirements/dev.txt pyproject.toml
	$(call install,-r requirements/dev.txt)
	@touch $@ $(VENV)/.run

$(VENV)/.k8s: $(VENV)/.dev requirements/k8s.txt
	$(call install,-r requirements/k8s.txt)
	@touch $@

$(VENV)/.mutants: $(VENV)/.dev requirements/mutants.txt
	$(call install,-r requirements/mutants.txt)
	@touch $@

$(VENV)/.audit: $(VENV)/.dev requirements/audit.txt
	$(call install,-r requirements/audit.txt)
	@touch $@
