# Each target makes what it needs; a fresh clone needs Python (3.10 or newer), make and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEEPSPEED := .venv-deepspeed
MEGATRON := .venv-megatron
FAULTS ?= all
DEVICE ?= cpu

ONLY ?=
CHECK ?=
CASES ?=

.PHONY: demo test test-big test-deepspeed test-megatron check fmt sim faults bench bench-peers bench-convert proto clean

# Train, kill, recover, compare: the main job, in a live view. FAULTS=none|all|worker,daemon,coordinator,node|shrink
# DEVICE=cuda trains on the GPUs of this machine; one is enough.
demo: $(READY)
	$(BIN)/python -m examples.demo --faults $(FAULTS) --device $(DEVICE)

# All tests.
test: $(READY)
	$(BIN)/python -m pytest

# Style, types, and generated code that is up to date.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy snapshotd client/snapshotd_client
	$(BIN)/python -m tests.proto_drift

# Format imports and what ruff can mend.
fmt: $(READY)
	$(BIN)/ruff check --fix .

# Conversions of 1 and 10 GB with the same memory; needs 11 GB of disk. CASES=dcp runs that source only.
test-big: $(READY)
	SNAPSHOTD_TEST_BIG=1 $(BIN)/python -m pytest -s tests/universal/test_memory.py $(if $(CASES),-k "$(CASES)")

# Checkpoints from and for the real DeepSpeed, on CPU, in an environment of its own. CASES=z3 runs those with z3 in their names.
test-deepspeed: $(DEEPSPEED)/.ready
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" \
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/extensions \
	$(DEEPSPEED)/bin/python -m pytest tests/frameworks/test_deepspeed.py --timeout 900 $(if $(CASES),-k "$(CASES)")

# Checkpoints from and for the real Megatron-core, on CPU, in a virtual environment of their own.
test-megatron: $(MEGATRON)/.ready
	OMP_NUM_THREADS=1 $(MEGATRON)/bin/python -m pytest tests/frameworks/test_megatron.py

# The long simulation: 2,000 seeds.
sim: $(READY)
	$(BIN)/python -m tests.simulation.run --seeds 2000

# Real kills only.
faults: $(READY)
	$(BIN)/python -m pytest tests/faults

# What snapshotd costs, beside its floors and what people use instead. ONLY=part,... CHECK=1 (exit 1 when a goal is missed)
bench: $(READY)
	$(BIN)/snapshotd bench --out benchmarks/results $(if $(ONLY),--only $(ONLY)) $(if $(CHECK),--check)

# What `make bench` measures beside us, installed beside the environment: it needs them not, and says which are not there.
bench-peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/peers \
		-r benchmarks/peers/requirements.txt

# Conversion beside the formats' own tools, with checkpoints that DeepSpeed and torch write on the spot; needs 12 GB of tmpfs.
bench-convert: $(READY) $(DEEPSPEED)/.ready
	SNAPSHOTD_BENCH_DEEPSPEED=$(CURDIR)/$(DEEPSPEED)/bin/python \
	$(BIN)/snapshotd bench --out benchmarks/results --only $(or $(ONLY),convert) $(if $(CHECK),--check)

# DeepSpeed on the CPU, in an environment of its own: torch first, by its exact version, and no operators are built. Its
# zero_to_fp32 needs huggingface_hub, and does not say so.
$(DEEPSPEED)/.ready: pyproject.toml constraints.txt
	test -x $(DEEPSPEED)/bin/python || $(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy setuptools wheel
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  deepspeed==0.19.8 huggingface_hub
	touch $@

# Generated code of the wire contract.
proto: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. proto/snapshotd/v1/*.proto
	rm -f snapshotd/v1/worker_pb2_grpc.py snapshotd/v1/bulk_pb2_grpc.py snapshotd/v1/record_pb2_grpc.py

clean:
	rm -rf $(VENV) $(DEEPSPEED) $(MEGATRON) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-out

$(READY): pyproject.toml constraints.txt hatch_build.py snapshotd/native/copy_digest.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

$(MEGATRON)/.ready: pyproject.toml constraints.txt
	test -x $(MEGATRON)/bin/python || $(PYTHON) -m venv $(MEGATRON)
	$(MEGATRON)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(MEGATRON)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt megatron-core==0.16.1
	touch $@
