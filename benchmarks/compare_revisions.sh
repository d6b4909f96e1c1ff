#!/usr/bin/env bash
# Fails if a part of sampling or training is 15 % farther from the machine's limit than at another revision.
#     bash benchmarks/compare_revisions.sh REVISION [PYTHON]
# Both revisions are measured in turn, a second time where the first says slower, since machines are noisy.
set -euo pipefail
revision=${1:?give a revision to compare with, such as main}
python=$(command -v "${2:-python}") || { echo "${2:-python} is not found" >&2; exit 1; }
[[ $python == /* ]] || python=$PWD/$python
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch=$(mktemp -d)
trap 'git worktree remove --force "$scratch/base" 2>/dev/null; rm -rf "$scratch"' EXIT
git worktree add --quiet --detach "$scratch/base" "$revision"

measure() {  # measure FOLDER LOG OPTIONS...: the log is shown too
    local folder=$1 log=$2
    shift 2
    (cd "$folder" && PYTHONPATH=$folder "$python" benchmarks/speed.py "$@") | tee "$log"
}

status=0
for settings in "--model demo --batch-size 100 --parts tokens decoder train-tokens" \
    "--model B-16X --batch-size 2 --num-steps 5 --parts prefill step head decoder train-tokens"; do
    for attempt in 1 2; do
        echo "== $settings, attempt $attempt"
        # shellcheck disable=SC2086 # (the words of the settings)
        measure "$scratch/base" "$scratch/base.log" $settings >/dev/null
        # shellcheck disable=SC2086
        measure "$PWD" "$scratch/new.log" $settings --check "$scratch/base.log" && continue 2
    done
    status=1
done
exit $status
