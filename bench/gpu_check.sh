#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command: tests, benchmark, sanitizer; results in one folder.
#
#     bash bench/gpu_check.sh [--quick] [FOLDER]      FOLDER: $OUT, or gpu_check/, if not given
#     PYTHON=.venv/bin/python bash bench/gpu_check.sh
#     RESUME=results.json bash bench/gpu_check.sh     continues the benchmark of a call before, of the same commit
#     BENCH_COMMIT=$(git rev-parse HEAD) …            says the commit to a copy without .git
#
# Needs torch, triton, torchvision, pytest and rich, no network. Each stage has a budget of its own, so all of
# it ends within 9 minutes (--quick: 4); what a stage did until then is in the folder. A failing stage does not
# stop the next. Exit code: 0 if nothing failed, 1 if something did, 3 if there is no GPU to check.
set -u

quick=no
folder=${OUT:-gpu_check}
for argument in "$@"; do
    case $argument in
        --quick) quick=yes ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "gpu_check: unknown option $argument; see --help" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
results=$folder/results.json
if [ -z "${RESUME:-}" ]; then
    # What an earlier check left is kept under another name.
    [ ! -f "$results" ] || mv --backup=numbered "$results" "$folder/earlier.json" || exit 2
elif ! [ "$RESUME" -ef "$results" ]; then
    cp "$RESUME" "$results" || exit 2
fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET  # the real compiler

# A stage may take 10 s more than its budget to end.
if [ $quick = yes ]; then  # seconds: 20 + 80 + 35 + 95 = 230
    test_budget=70 memcheck_budget=25 racecheck_budget=0 bench_budget=85
    tests=(tests/test_contract.py -k "values_and_gradients or deterministic")
else                       # seconds: 20 + 180 + 45 + 45 + 240 = 530
    test_budget=170 memcheck_budget=35 racecheck_budget=35 bench_budget=230
    tests=(tests/test_contract.py tests/kernels)
fi

declare -a summary=()
failed=no
note() {  # NAME OUTCOME
    summary+=("$(printf '%-12s %s' "$1" "$2")")
    echo "== $1: $2"
}

measured() {  # what the benchmark has left, in words; fails if that is nothing, or if one of our ops failed
    if [ ! -f "$results" ]; then echo "nothing was measured"; return 1; fi
    "$python" - "$results" <<'END'
import sys
from pathlib import Path
from bench.results import OURS, read
rows = read(Path(sys.argv[1])).rows
failed = sum(row.impl == OURS and row.ms is None for row in rows)
print(f"results.json has {len(rows)} rows; {failed} of ours failed")
sys.exit(failed > 0 or not rows)
END
}

stage() {  # NAME BUDGET COMMAND…: runs the command, its output in NAME.log as well
    local name=$1 budget=$2 began=$SECONDS code
    shift 2
    echo "== $name: at most $budget s: $*"
    # Interrupted rather than killed, so that it can show what it has; a compiler may keep it from hearing.
    timeout --preserve-status -s INT -k 10 "$budget" "$@" >"$folder/$name.log" 2>&1
    code=$?
    tail -n 25 "$folder/$name.log"
    local took=$((SECONDS - began))
    if [ $code -eq 0 ]; then
        note "$name" "ok ($took s)"
    elif [ $took -ge "$budget" ] && [ "$name" = bench ] && [[ $code =~ ^13[07]$ ]]; then
        local left
        left=$(measured) || failed=yes
        note "$name" "stopped when its $budget s were over; $left"
    elif [ $took -ge "$budget" ]; then
        failed=yes
        note "$name" "FAILED: not done within $budget s"
    else
        failed=yes
        note "$name" "FAILED with code $code ($took s)"
    fi
}

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' \
    2>"$folder/torch.log") || { cat "$folder/torch.log" >&2; echo "gpu_check: torch does not load" >&2; exit 2; }
rm "$folder/torch.log"
echo "GPU: ${gpu:-none}"
command -v nvidia-smi >/dev/null && nvidia-smi >"$folder/nvidia-smi.txt" 2>&1

has() { "$python" -c "import $1" 2>/dev/null; }
if [ -z "${BENCH_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1; then
    note commit "unknown: without .git, BENCH_COMMIT has to say it; the benchmark cannot be continued"
fi
for package in fvcore deformops hypothesis xdist pytest_timeout pytest_benchmark; do
    has $package || note "$package" "not installed; what needs it is left out"
done

# What needs no GPU, the compile checks, is left to make test.
options=(-q -p no:cacheprovider -o addopts= --ignore=tests/kernels/test_compile.py
    --ignore=tests/kernels/test_deform_conv_compile.py)
has xdist && options+=(-n 4)
if ! has hypothesis; then
    while read -r file; do options+=("--ignore=$file"); done \
        < <(grep -lE '^(from|import) hypothesis' tests/kernels/*.py)
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)

sanitize() {  # TOOL BUDGET
    if [ "$2" -eq 0 ]; then
        note "$1" "left out by --quick"
    elif [ -z "$gpu" ]; then
        note "$1" "not run: no GPU"
    elif [ -z "$sanitizer" ]; then
        note "$1" "not run: compute-sanitizer is not installed"
    elif ! timeout -k 5 20 "$sanitizer" --error-exitcode 9 "$python" -c 'import torch; torch.ones(1, device="cuda")' \
        >"$folder/$1.log" 2>&1; then
        note "$1" "not run: compute-sanitizer does not work on this machine, see $1.log"
    else
        # Without PyTorch's cache every tensor is an allocation of its own, so its ends are known.
        stage "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$1" --error-exitcode 9 "$python" -m bench.small_calls
    fi
}

if [ -n "$gpu" ]; then
    stage tests $test_budget "$python" -m pytest "${options[@]}" "${tests[@]}"
else
    note tests "not run: no GPU"
fi
if [ -z "$gpu" ]; then
    echo "No GPU: the benchmark runs at small sizes on the CPU; its times say nothing about the kernels."
    stage bench $bench_budget "$python" -m bench --quick --json "$results"
elif [ $quick = yes ]; then
    stage bench $bench_budget "$python" -m bench --quick --shapes nyud --dtype bf16 --json "$results"
else
    stage bench $bench_budget "$python" -m bench --resume "$results"
fi
sanitize memcheck $memcheck_budget
sanitize racecheck $racecheck_budget

{
    echo "gpu_check$([ $quick = yes ] && echo ' --quick'), GPU: ${gpu:-none}, $SECONDS s"
    printf '  %s\n' "${summary[@]}"
} | tee "$folder/summary.txt"
echo "Everything is in $folder"
[ $failed = no ] || exit 1
[ -n "$gpu" ] || exit 3
