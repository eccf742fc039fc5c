#!/usr/bin/env bash
# Train a recipe on the machines of a hostfile through DeepSpeed's own launcher, from one of them.
#   launch/deepspeed.sh HOSTFILE RECIPE [KEY=VALUE]...        a line of HOSTFILE: node1 slots=8
# Needs ssh without a password to every machine, pdsh here, and this folder at the same path everywhere. Variables
# for all machines (NCCL_SOCKET_IFNAME=ib0, OMP_NUM_THREADS=8) stand in a file .deepspeed_env here, one a line.
# Exit codes are those of launch/torchrun.sh. To stop with a checkpoint, send USR1 to any `lclm train` process, or
# set train.stop_after_minutes: DeepSpeed's launcher itself ends its processes at once.
set -uo pipefail
if [ $# -lt 2 ]; then
    echo "usage: launch/deepspeed.sh HOSTFILE RECIPE [KEY=VALUE]..." >&2
    exit 2
fi
hostfile=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
command=$(command -v lclm || echo "$here/../.venv/bin/lclm")
python=${PYTHON:-$(dirname "$command")/python}
fail() { echo "launch/deepspeed.sh: $1" >&2; exit 2; }
[ -x "$python" ] || fail "found no lclm; run \`make setup\`, or set PYTHON to a Python that has it"
mapfile -t names < <(sed 's/#.*//' "$hostfile" 2>/dev/null | awk 'NF {print $1}')
[ ${#names[@]} -gt 0 ] || fail "$hostfile names no machine; a line reads: node1 slots=8"
if [ ${#names[@]} -gt 1 ]; then
    command -v pdsh > /dev/null || fail "found no pdsh, which DeepSpeed's launcher needs; install it"
fi
for name in "${names[@]}"; do
    for ((second = 0; ; second++)); do
        getent hosts "$name" > /dev/null && break
        [ "$second" -lt "${NAMES_TIMEOUT:-60}" ] || fail "the name $name ($hostfile) does not resolve here"
        sleep 1
    done
done

export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
restarts=${RESTARTS:-3}
for ((restart = 0; ; restart++)); do
    "$(dirname "$python")/deepspeed" --hostfile "$hostfile" --master_addr "${names[0]}" \
        --master_port "${PORT:-29500}" --no_local_rank --module lclm train "$@"
    code=$?
    # killed processes were lost, as those say that waited for them
    case $code in 137 | 143 | 241 | 247) code=76 ;; esac
    if [ $code -ne 76 ] || [ "$restart" -ge "$restarts" ]; then exit $code; fi
    echo "launch/deepspeed.sh: a process was lost; restart $((restart + 1)) of $restarts" >&2
    sleep 10
done
