#!/usr/bin/env bash
# compute-sanitizer over every CUDA variant, from the repository's root. Prints one line per tool; logs go to the folder $1.
#
# initcheck has to see every kernel that writes what ours read, so it watches all of them, on the small case alone; the
# others watch our kernels. racecheck gets kernels whose barriers it can follow. API errors are left out: CuPy probes for
# driver functions that this driver lacks.
set -uo pipefail
logs="${1:?a folder for the logs}"
here="$(dirname "$0")"
export PYTHONPATH="$PWD"
for tool in memcheck racecheck synccheck initcheck; do
    scope=(--kernel-name kns=sm90_) case=all racecheck=0
    if [ "$tool" = initcheck ]; then scope=() case=small; fi
    if [ "$tool" = racecheck ]; then racecheck=1; fi
    MOE_WORKBENCH_RACECHECK=$racecheck compute-sanitizer --tool "$tool" --report-api-errors no "${scope[@]}" \
        python3 "$here/sanitize.py" "$case" > "$logs/$tool.log" 2>&1
    echo "$tool: $(tail -n 1 "$logs/$tool.log")"
done
