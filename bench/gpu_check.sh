#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command: tests, sanitizers, benchmark; results in one folder.
#
#     bash bench/gpu_check.sh --help
#     PYTHON=.venv/bin/python bash bench/gpu_check.sh quick
#
# Needs torch, triton, torchvision, pytest and rich, no network. bench/README.md has a page about it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -m bench.gpu.visit "$@"
