# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python >= 3.11, a C++20 compiler
# and make. A second call redoes only what changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Idle threads sleep, so that neighbours on the machine do not slow everything down tenfold; OMP_WAIT_POLICY=ACTIVE
# in the environment overrides it.
test demo: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test setup build own bench bench-peers docs lint format clean cuda-emulation cuda-check cuda-link gpu sanitize \
	fuzz fuzz-networks zoo
.DEFAULT_GOAL := build

demo: own
	$(BIN)/blokern compare fast-at fast-bat:step_size=20 --data digits --model small_cnn --eps 0.1 --epochs 8 \
		--seeds 0,1,2 --out runs/demo
	$(BIN)/blokern prune omp bip --density 0.1 --data digits --model small_cnn --epochs 8 --seeds 0,1,2 \
		--out runs/demo-pruned

test: build
	$(BIN)/python -m pytest

bench: build
	$(BIN)/blokern bench all

# The API reference, into build/docs; the pages of docs/ are read as they are.
docs: build
	$(BIN)/python docs/reference.py build/docs

# blokern beside other libraries, in a venv of their own, on a network that the first call trains: docs/benchmarks.md.
# SUITE=attack, sparse, curvature or bilevel: that one alone.
PEERS := .venv-peers
SUITE ?= all
ATTACKED := build/peers/small_cnn-64.pt
ATTACKED_ON := $(if $(wildcard /usr/share/datasets/fashion-mnist),fashion-mnist,digits)

bench-peers: build $(PEERS)/.setup $(ATTACKED)
	$(PEERS)/bin/python -m benchmarks.peers $(SUITE) --checkpoint $(ATTACKED) --out benchmarks/results

$(PEERS)/.setup: benchmarks/peers/requirements.txt $(VENV)/.setup
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -c constraints.txt torch setuptools -r $(VENV)/requirements.txt
	$(PEERS)/bin/pip install -q --no-deps -r benchmarks/peers/requirements.txt
	touch $@

$(ATTACKED): | build
	$(BIN)/blokern train pgd --data $(ATTACKED_ON) --train-limit 10000 --model small_cnn --width 64 --eps 0.1 --epochs 6 --lr 0.1 \
		--augment false --seed 0 --threads 2 --out $(@:.pt=) --resume
	cp $(@:.pt=)/best.pt $@

# The CUDA kernels without a GPU (docs/gpu.md): emulated; compiled by nvcc and inspected; linked to a CUDA build of torch.
cuda-emulation: build
	$(BIN)/python -m pytest tests/native -s

cuda-check: setup
	$(BIN)/python tests/native/cuda_check.py

LINK := build/cuda-link

cuda-link:
	$(PYTHON) -m venv --clear $(LINK)
	$(LINK)/bin/pip install -q torch==2.14.1 setuptools wheel ninja
	git clone -q . $(LINK)/tree
	FORCE_CUDA=1 $(LINK)/bin/pip install -q --no-build-isolation -e $(LINK)/tree
	$(LINK)/bin/pip install -q -c constraints.txt pytest hypothesis expecttest safetensors
	cd $(LINK)/tree && ../bin/python -c 'import torch; from blokern._backend import build_info; \
		print(build_info()); assert torch._C._dispatch_has_kernel_for_dispatch_key("blokern::pgd_step_l2", "CUDA")'
	cd $(LINK)/tree && ../bin/python -m pytest tests/attack tests/sparse tests/curvature tests/test_backend.py

# On a machine with a GPU: build, tests, sanitizers, benchmarks, inside nine minutes, with PYTHON's own torch.
gpu:
	$(PYTHON) -m benchmarks.gpu

# The kernels under ASan, UBSan and TSan, in builds of their own; and CASES random calls of all ops against their
# oracles, each followed by hostile ones, then as many calls whose memory is watched (docs/reliability.md).
CASES ?= 100000
sanitize: setup
	$(BIN)/python tests/hardening/sanitize.py address
	$(BIN)/python tests/hardening/sanitize.py thread

fuzz: build
	$(BIN)/python tests/hardening/fuzz.py --cases $(CASES) --hostile 4
	$(BIN)/python tests/hardening/leaks.py --calls $(CASES)

# Random networks, and networks that others wrote, beside plain torch (docs/reliability.md, docs/compatibility.md).
NETWORKS ?= 20000
fuzz-networks: build
	$(BIN)/python tests/hardening/fuzz_networks.py --cases $(NETWORKS)

zoo: build
	$(BIN)/python tests/zoo/zoo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

setup: $(VENV)/.setup
build: $(VENV)/.build
own: $(VENV)/.own

# What blokern needs to be built and to run; and beside it, what its tests and its lint need.
$(VENV)/.base: constraints.txt pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel ninja
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], sep="\n"); open("$(VENV)/requirements.txt", "w").write( \
		"\n".join([*p["dependencies"], *p["optional-dependencies"]["dev"]]))' > $(VENV)/base.txt
	$(BIN)/pip install -q -c constraints.txt -r $(VENV)/base.txt
	touch $@

$(VENV)/.setup: $(VENV)/.base tests/peers.txt tests/zoo/requirements.txt
	$(BIN)/pip install -q -c constraints.txt -r $(VENV)/requirements.txt
	$(BIN)/pip install -q -c constraints.txt --no-deps -r tests/peers.txt
	$(BIN)/pip install -q -c constraints.txt --no-deps --no-compile --upgrade -t $(VENV)/zoo -r tests/zoo/requirements.txt
	touch $@

# The kernels for every instruction set, as the tests want them, or for this machine's own alone, which takes a third of
# the time. All sets include the own one.
INSTALL := install -q --no-build-isolation --no-deps -e .

$(VENV)/.build: $(VENV)/.setup $(NATIVE)
	$(BIN)/pip $(INSTALL)
	touch $(VENV)/.own $@

$(VENV)/.own: $(VENV)/.base $(NATIVE)
	BLOKERN_CPU_CAPABILITIES=native $(BIN)/pip $(INSTALL)
	touch $@

clean:
	rm -rf build $(VENV)/.build $(VENV)/.own blokern/*.so
