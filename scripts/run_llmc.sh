#!/usr/bin/env bash
# Starts a run in the background, as LLMC's launcher does: its output goes to ${task_name}.log, its process id to
# ${task_name}.pid. Edit the variables, or set them in the environment.
#
#   config=my.yml task_name=my_run bash scripts/run_llmc.sh
#   tail -f my_run.log
#   kill "$(cat my_run.pid)"      starting it again goes on where it was
set -euo pipefail

llmc=${llmc:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
config=${config:-$llmc/configs/awq/awq_w4a16.yml}
task_name=${task_name:-awq_w4a16}
python=${python:-$llmc/.venv/bin/python}

export PYTHONPATH=$llmc${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
nohup "$python" -m llmc --config "$config" --task_id "$task_name" "$@" >"$task_name.log" 2>&1 &
echo $! >"$task_name.pid"
echo "started $task_name (process $!); its output is in $task_name.log"
