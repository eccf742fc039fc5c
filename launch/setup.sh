#!/usr/bin/env bash
# Make a virtual environment with lclm and its pinned dependencies: launch/setup.sh [FOLDER, default .venv]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

fits='import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'
python=
for candidate in "${PYTHON:-}" python3.11 python3.12 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c "$fits" 2>/dev/null; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
    echo "setup: found no Python 3.11 or 3.12 with the venv module; install one, or set PYTHON=/path/to/python" >&2
    exit 2
fi

constraints=constraints.txt
options=()
if [ ! -x "$venv/bin/python" ]; then
    if "$python" -c 'import torch' 2>/dev/null; then
        echo "setup: $("$python" --version) already has torch; the environment will use it"
        options=(--system-site-packages)
    fi
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv "${options[@]}" "$venv"
fi
if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    grep -v '^torch==' constraints.txt > "$constraints"
else
    echo "setup: installing torch"
    "$venv/bin/python" -m pip install --quiet --quiet "$(grep '^torch==' constraints.txt)"
fi
echo "setup: installing lclm and what it needs (a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet --quiet --constraint "$constraints" --editable '.[test]'
echo "setup: done; \`source $venv/bin/activate\` makes the lclm command available"
