#!/usr/bin/env bash
# Train a recipe with N processes on each machine, through torchrun. The same command goes on with a run.
#   launch/torchrun.sh 8 RECIPE [KEY=VALUE]...                                             one machine
#   launch/torchrun.sh --nodes 4 --rendezvous node1:29400 8 RECIPE [KEY=VALUE]...          on each of four
# Options and exit codes: launch/torchrun.sh --help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command=$(command -v lclm || echo "$here/../.venv/bin/lclm")
python=${PYTHON:-$(dirname "$command")/python}
if ! [ -x "$python" ]; then
    echo "launch/torchrun.sh: found no lclm; run \`make setup\`, or set PYTHON to a Python that has it" >&2
    exit 2
fi
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
exec "$python" "$here/agent.py" "$@"
