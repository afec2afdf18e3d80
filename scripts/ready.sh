#!/bin/sh
# Make everything ready in .venv: compressor, its tools, and the exact versions of constraints.txt.
# Needs python3 (3.10-3.13) and a package index; nothing else. PYTHON=... chooses another interpreter. With a C++ compiler
# and Python's headers the kernels are compiled as well.
set -eu
cd "$(dirname "$0")/.."
want=$(cat pyproject.toml setup.py constraints.txt compressor/kernels/sources.py compressor/kernels/native/* | cksum)
if [ "$(cat .venv/ready 2>/dev/null || true)" != "$want" ]; then
    echo "making .venv ready (once; downloads PyTorch)"
    [ -x .venv/bin/pip ] || "${PYTHON:-python3}" scripts/make_venv.py .venv
    .venv/bin/python -m pip install --quiet -c constraints.txt torch
    .venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
    echo "$want" > .venv/ready
fi
