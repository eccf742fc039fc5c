#!/usr/bin/env bash
# What `make train` does: data, training, report, export and a sample. What is there already is not done again;
# FRESH=1 deletes it first.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=recipes/tiny.yaml
data=data/stdlib
run=runs/tiny
skipped=()

say() { printf '\n== %s\n' "$*"; }

if [ -n "${FRESH:-}" ] && [ "${FRESH}" != 0 ]; then
    say "FRESH=1: deleting $data and $run"
    rm -rf "$data" "$run"
fi

say "data: the Python standard library's source -> $data"
lclm data build recipes/data/stdlib.yaml

if [ -f "$run/export/config.json" ]; then
    skipped+=("training  $run, by $recipe as it was then")
else
    say "training: $recipe on two processes -> $run"
    launch/torchrun.sh 2 "$recipe"
fi

if [ "$run/report.html" -nt "$run/metrics.jsonl" ]; then
    skipped+=("report    $run/report.html")
else
    say "report"
    lclm report "$run"
fi

say "a sample: the model reads a held-out document as latents only, and is asked about it"
lclm generate "$run/export" --questions "$data/conversations/heldout"

if [ ${#skipped[@]} -gt 0 ]; then
    say "done before, and not done again:"
    printf '   %s\n' "${skipped[@]}"
    echo "   FRESH=1 make train deletes $data and $run and does all of it again"
fi
say "everything is in $run: report.html, recipe.yaml, metrics.jsonl, tensorboard, export"
