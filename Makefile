# Two commands do everything: `make demo` and `make test`. Both create .venv from pinned constraints first.
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP := $(PY) -m pip --disable-pip-version-check
# The oldest and the newest supported Triton: kernels are compiled with both, side by side with the one in .venv.
TRITONS := 3.6.0 3.9.0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format bench clean

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
	rm -rf $(VENV) .demo build
