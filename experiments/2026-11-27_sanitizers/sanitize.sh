#!/usr/bin/env bash
# compute-sanitizer over every CUDA kernel, from the repository's root:
#
#     bash experiments/2026-11-27_sanitizers/sanitize.sh <folder for logs> [tool ...]
#
# One line for each tool: its exit status (0 clean and right, 9 errors found, 124 over the time limit, else the run's),
# its summary, the run's last line. PYTHON names the interpreter, LIMIT_S the seconds that a tool may take.
#
# initcheck has to see every kernel that writes what ours read, so it watches all of them; the others watch ours.
# racecheck gets kernels whose barriers it can follow. API errors are left out: CuPy probes for driver functions that a
# driver lacks.
set -uo pipefail
logs="${1:?a folder for the logs}"
shift
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck initcheck)
python="${PYTHON:-python3}"
script="$(dirname "$0")/sanitize.py"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$logs"

MOE_WORKBENCH_RACECHECK=0 "$python" "$script" --compile || exit 1
for tool in "${tools[@]}"; do
    scope=(--kernel-name kns=sm90_) racecheck=0
    if [ "$tool" = initcheck ]; then scope=(); fi
    if [ "$tool" = racecheck ]; then
        racecheck=1
        MOE_WORKBENCH_RACECHECK=1 "$python" "$script" --compile || exit 1
    fi
    start=$SECONDS
    MOE_WORKBENCH_RACECHECK=$racecheck timeout "${LIMIT_S:-180}" compute-sanitizer --tool "$tool" \
        --report-api-errors no --error-exitcode 9 --print-limit 20 "${scope[@]}" \
        "$python" "$script" > "$logs/$tool.log" 2>&1
    status=$?
    summary="$(grep -o '[A-Z]* SUMMARY: .*' "$logs/$tool.log" | tail -n 1)"
    last="$(grep -v '^=========' "$logs/$tool.log" | tail -n 1)"
    echo "$tool: exit $status, ${summary:-no summary}, $last [$((SECONDS - start)) s]"
done
