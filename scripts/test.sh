#!/bin/sh
# Lint, types, tests. Arguments go to pytest: sh scripts/test.sh -k sweep
set -eu
cd "$(dirname "$0")/.."
sh scripts/ready.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" "$@"
