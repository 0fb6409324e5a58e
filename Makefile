# Two commands for a newcomer: make demo, make test. Both install what is missing into .venv, once.
export RAY_AUTH_MODE ?= disabled
unexport PYTHONDONTWRITEBYTECODE   # each worker of pytest and of Ray would compile all of it anew
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -q

# where there is a GPU, vLLM is its CUDA build: all roles hold the first card in turn
ONE_GPU := --set rollout.num_gpus=1 --set rollout.sleep=true --set rollout.gpu_memory_utilization=0.5 --set rollout.enforce_eager=true \
	--set learner.num_gpus=1 --set reference.num_gpus=1 --set evaluate.num_gpus=1

.PHONY: install demo lint docs messages check check-tests test test-all test-gpu test-integrations mutants

install:
	@deploy/install.sh

demo: install
	RAY_AUTH_MODE=token $(PY) -m frpo run recipes/testbed.yaml $(if $(shell nvidia-smi -L 2>/dev/null),$(ONE_GPU))

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

# the site of docs/ and of the docstrings, into site/; a warning or a dead link is an error
docs: install
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# the list of all messages in docs/troubleshooting.md, after one was changed
messages:
	$(PY) docs/hooks/messages.py

# lint beside the tests, which wait now and then
check: install
	$(MAKE) -j 2 lint check-tests

# the requests to every path of the service are long, and long to collect
check-tests: install
	$(PYTEST) -n 2 -m "not slow and not long" --ignore=tests/contract/test_service_schema.py tests/unit tests/contract

# two at once, by file, since the tests of a file share a Ray and some files their actors
test: lint
	$(PYTEST) -n 2 -m "not slow" tests/unit tests/contract
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" tests/ray tests/integrations

test-all: lint
	$(PYTEST) -m "not gpu" tests

test-gpu: install
	$(PYTEST) -m gpu tests/gpu

# verl's transformers is not vLLM's, so verl has an environment of its own
test-integrations: install
	deploy/install.sh .venv-verl verl
	.venv-verl/bin/python -m pytest -q tests/integrations/test_verl.py
	$(PYTEST) tests/integrations

# Which changes of the numbers' code no test notices: a quarter of an hour. tests/mutants.md lists those that may live
mutants: install
	$(PY) -m uv pip install --quiet --python $(PY) --editable ".[mutants]"
	$(PY) tests/mutants.py
