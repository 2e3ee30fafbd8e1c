# Two commands: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Libraries of clients, some of whose pins are not vLLM's: for the examples and for Schemathesis.
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.ready
# uv reads find-links from its own variable only.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: setup demo test bench evidence screenshots check format lock clean

setup: $(READY) $(CLIENTS_READY)

# The lock file holds every package, so nothing is resolved; torch's CPU build comes from the index that pip is
# set up with or, failing that, from PyTorch's own. Bytecode is compiled once: where Python may not write it
# (PYTHONDONTWRITEBYTECODE), each of an engine's three processes would compile vLLM and torch at every start.
$(READY): pyproject.toml requirements/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r requirements/cpu.txt || \
	  $(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode --torch-backend cpu -r requirements/cpu.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

$(CLIENTS_READY): requirements/clients.txt $(READY)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(BIN)/uv pip install --python $(CLIENTS)/bin/python --no-deps --compile-bytecode -r requirements/clients.txt
	touch $@

demo: $(READY)
	$(BIN)/trimtab demo

test: setup
	$(BIN)/python -m pytest

# What control costs: some 25 minutes, on a machine that does nothing else. TEXT: prose for the growing output.
bench: setup
	$(BIN)/python benchmarks/control.py --save .trimtab/control.json
	$(BIN)/python benchmarks/growth.py --plot docs/growth.svg $(addprefix --text ,$(TEXT))

# What is held of the gateway (docs/evidence.md): some 25 minutes. It ends with an error where something does not hold.
evidence: setup
	$(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/gateway_overhead.py
	$(BIN)/python benchmarks/gateway_overhead.py --way socket
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/long_prompts.py

# The pictures in docs/playground/, by the system's Chromium.
screenshots: setup
	$(BIN)/python benchmarks/playground_shots.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pin anew what pyproject.toml asks for. The CUDA lock must not see the CPU build of torch.
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --override requirements/overrides.txt \
	  --no-emit-index-url --no-annotate --no-header -o requirements/cpu.txt
	$(BIN)/uv pip compile requirements/clients.in --python-version 3.11 \
	  --no-emit-index-url --no-annotate --no-header -o requirements/clients.txt
	UV_FIND_LINKS= $(BIN)/uv pip compile pyproject.toml --extra cuda --python-platform x86_64-manylinux_2_28 \
	  --no-emit-index-url --no-annotate --no-header -o requirements/cuda.txt

clean:
	rm -rf $(VENV) $(CLIENTS) .trimtab .mypy_cache .ruff_cache .pytest_cache
