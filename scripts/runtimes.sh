#!/bin/sh
# The programs that read what we write, for tests/runtimes and the tests of exports: into .venv, from the package indexes of Python, npm and Debian.
#   sh scripts/runtimes.sh            installs them (as root where Chromium is missing)
#   sh scripts/runtimes.sh test ...   and runs the tests that need them: an absent one is a failure here, and no skip
set -eu
cd "$(dirname "$0")/.."
sh scripts/ready.sh
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[gguf,mlx,tasks,docs]"
llama=3.22.1
if [ "$(cat .venv/llama/version 2>/dev/null || true)" != "$llama" ]; then
    mkdir -p .venv/llama
    npm install --prefix .venv/llama --silent --no-audit --no-fund --no-save --omit=optional --ignore-scripts \
        "node-llama-cpp@$llama" "@node-llama-cpp/linux-x64@$llama"
    echo "$llama" > .venv/llama/version
fi
if ! command -v chromium >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
if [ "${1:-}" = test ]; then
    shift
    export COMPRESSOR_TEST_RUNTIMES=1 COMPRESSOR_LLAMA_CPP="$PWD/.venv/llama/node_modules" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    pages=tests/docs/test_docs_commands.py::test_blocks_run
    .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" tests/runtimes \
        tests/run/test_export_check.py tests/run/test_export_full_disk.py tests/hub/test_push_exports.py \
        "$pages[docs/exports/gguf.md]" "$pages[docs/tasks.md]" "$@"
fi
