#!/usr/bin/env bash
# The LaMP table: every public task by time, fetched, trained and evaluated with the paper's hyperparameters.
# Needs a GPU and the gated backbone (`hf auth login`). Run it from the root of the repository; the same call again
# continues where it stopped. Fetching means agreeing to CC BY-NC-SA 4.0: `proper data fetch lamp-3` shows the license.
#
#   recipes/lamp.sh                              all seven tasks
#   recipes/lamp.sh lamp-3 lamp-5                some of them
#   SET="backbone=mistralai/Mistral-7B-v0.3 evaluation.seeds=[0]" recipes/lamp.sh lamp-3
#   RUNS=/scratch/lamp recipes/lamp.sh
#
# Writes a run folder per task under $RUNS and all results to $RUNS/results, and prints the table.
set -euo pipefail

RUNS=${RUNS:-runs/lamp}
DATA=${DATA:-data}
settings=()
for setting in ${SET:-}; do settings+=(--set "$setting"); done
tasks=("$@")
[ $# -gt 0 ] || tasks=(lamp-1 lamp-2m lamp-2n lamp-3 lamp-4 lamp-5 lamp-7)
# Before the first of them trains for hours.
for task in "${tasks[@]}"; do
    [ -f "configs/lamp/$task.yaml" ] || { echo "$task: no such task: there is no configs/lamp/$task.yaml" >&2; exit 2; }
done

mkdir -p "$RUNS/results"
for task in "${tasks[@]}"; do
    there="$DATA/$task-time"
    # Files that are there are checked and kept.
    proper data fetch "$task" --split time --out "$there" --yes
    proper run "configs/lamp/$task.yaml" --out "$RUNS/$task" --set "data.path=$there" ${settings[@]+"${settings[@]}"}
    cp "$RUNS/$task/results.json" "$RUNS/results/$task.json"
done
python scripts/results_table.py "$RUNS/results"
