#!/bin/sh
# The main job on what comes along: half of the embedded model's weights, and a report.
set -eu
cd "$(dirname "$0")/.."
sh scripts/ready.sh
.venv/bin/compressor prune embedded -o out/demo --overwrite --sparsity 0.5 --nsamples 64 --seqlen 256 --eval-windows 64
.venv/bin/compressor generate out/demo --prompt "The old" --tokens 40
echo "open out/demo/report.html in a browser"
