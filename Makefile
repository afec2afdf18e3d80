.PHONY: ready demo test benchmark

ready:  ; sh scripts/ready.sh
demo:   ; sh scripts/demo.sh
test:   ; sh scripts/test.sh
benchmark: ready
	.venv/bin/python benchmarks/run_all.py
