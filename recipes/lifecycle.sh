#!/usr/bin/env bash
# The life cycle of users: new users enrol in a small demo run, send prompts and feedback, drift, and are updated; one is
# rolled back, one is archived, some are deleted, and the deletion is verified. Prints each result; a failure ends it.
#
#   recipes/lifecycle.sh
#   NEW=8 RUN=runs/small recipes/lifecycle.sh     fewer new users, in a copy of a run of `proper demo --users 24`
#
# All files are written to $OUT (by default runs/lifecycle), which must not exist yet.
set -euo pipefail

OUT=${OUT:-runs/lifecycle}
NEW=${NEW:-50}
DELETED=${DELETED:-5}
BUDGET=${BUDGET:-15}
here=$(dirname "$0")
begun=$(date +%s)
step() { echo; echo "== $* (after $(($(date +%s) - begun)) s)"; }

[ ! -e "$OUT" ] || { echo "$OUT: exists already"; exit 1; }
mkdir -p "$OUT"
run=$OUT/run
step "a run"
if [ -n "${RUN:-}" ]; then cp -r "$RUN" "$run"; else proper demo --users 24 --out "$run"; fi

step "$NEW new users enrol, send prompts and give feedback"
python "$here/lifecycle.py" rows "$OUT" "$NEW"
python "$here/lifecycle.py" live "$run" "$OUT"

step "who has drifted"
proper users drift "$run" --json > "$OUT/drift.jsonl"
python "$here/lifecycle.py" drifted "$OUT"

step "the $BUDGET who have drifted most are updated"
proper users update "$run" --drifted --budget "$BUDGET" 2> "$OUT/update.log" > "$OUT/updated.tsv" || { cat "$OUT/update.log"; exit 1; }
python "$here/lifecycle.py" updated "$run" "$OUT"

step "one is rolled back"
one=$(head -n 1 "$OUT/promoted.txt")
echo "$one goes back to the version before the update:"
proper users rollback "$run" --user "$one"

step "one is archived"
proper users archive "$run" --user new01 --out "$OUT/new01.zip"

step "$DELETED are deleted, and it is verified"
leaving=()
for number in $(seq 1 "$DELETED"); do leaving+=(--user "$(printf 'new%02d' "$number")"); done
proper users delete "$run" "${leaving[@]}"
proper users verify-deleted "$run" "${leaving[@]}" --originals "$OUT/new01.zip" --json "$OUT/certificate.json"
proper users check "$run"

step "done in $(($(date +%s) - begun)) s: $(proper users list "$run" | wc -l) users"
