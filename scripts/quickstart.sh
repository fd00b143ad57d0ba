#!/usr/bin/env bash
# From nothing to a compressed model: makes .venv, fetches a small model, and runs configs/quickstart.yml.
#
#   bash scripts/quickstart.sh [more arguments for llmc, such as --set quant.weight.bit=8]
#
# A second call reuses the environment and the model; after a kill it goes on where it was. What may be set in the
# environment: see common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment gguf
make_demo_model
# A finished quickstart is done anew, an interrupted one goes on.
if [[ -e outputs/quickstart/metrics.json ]]; then
    set -- --set save.on_existing=overwrite "$@"
fi
exec "$venv/bin/python" -m llmc --config configs/quickstart.yml --task_id quickstart "$@"
