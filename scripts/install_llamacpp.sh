#!/usr/bin/env bash
# Makes a virtual environment with the real llama.cpp (llama-cpp-python), the oracle of tests/backends/test_real_llamacpp.py.
#
#   scripts/install_llamacpp.sh [FOLDER]        default: .venv-llamacpp in the project root
#
# The library is compiled, which takes about twelve minutes of one core the first time; afterwards the script sees its
# own marker file and does nothing. PYTHON names the interpreter to build from (default: python3).
set -euo pipefail

readonly VERSION=0.3.36

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/.venv-llamacpp}
marker=$folder/.llama-cpp-python-$VERSION

if [[ -e $marker ]]; then
    echo "llama.cpp is ready in $folder"
    exit 0
fi
if [[ -d $folder && -n $(ls -A "$folder") && ! -e $folder/pyvenv.cfg ]]; then
    echo "$folder exists, isn't empty and isn't a virtual environment: left untouched" >&2
    exit 1
fi

echo "compiling llama.cpp into $folder (some minutes)"
"${PYTHON:-python3}" -m venv --clear "$folder"
python=$folder/bin/python
# Neither programs nor vision are needed, only the library.
CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}" \
    "$python" -m pip -qq --disable-pip-version-check install "llama-cpp-python==$VERSION"
"$python" -c "import llama_cpp" || { echo "llama.cpp was installed, but can't be imported" >&2; exit 1; }
touch "$marker"
echo "llama.cpp is ready in $folder"
