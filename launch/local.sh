#!/usr/bin/env bash
# Train a recipe with N processes on this machine, through torchrun: launch/local.sh N RECIPE [KEY=VALUE]...
# The same command goes on with a run that was interrupted.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    echo "usage: launch/local.sh N RECIPE [KEY=VALUE]...   for example: launch/local.sh 2 recipes/tiny.yaml" >&2
    exit 2
fi
processes=$1
shift

here=$(cd "$(dirname "$0")/.." && pwd)
command=$(command -v lclm || echo "$here/.venv/bin/lclm")
python=${PYTHON:-$(dirname "$command")/python}
if ! [ -x "$python" ]; then
    echo "launch/local.sh: found no lclm; run \`make setup\`, or set PYTHON to a Python that has it" >&2
    exit 2
fi
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

# torchrun, but without its own traceback when a process fails: that process has said why
torchrun='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    sys.exit(max(failure.exitcode for failure in error.failures.values()) or 1)
'
exec "$python" -c "$torchrun" --standalone --nproc-per-node "$processes" -m lclm train "$@"
