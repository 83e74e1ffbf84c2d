#!/usr/bin/env bash
# The questions of the paper on the real data sets: every job of recipes/findings.yaml, then docs/findings.md.
# Jobs that are done by the same settings, data and code are skipped, and a killed job continues where it stopped.
# Run it from the root of the repository; the data sets are expected in data/, where `proper data fetch` puts them.
#
#   recipes/findings.sh                          everything that remains
#   recipes/findings.sh --only 10                one question
#   recipes/findings.sh --max-minutes 60         start no job that would end after an hour
#   recipes/findings.sh --list                   what is done, what remains, and for how long
set -euo pipefail

python -m experiments run "$@" || failed=$?
case " $* " in *" --list "*) ;; *) python -m experiments page ;; esac
exit "${failed:-0}"
