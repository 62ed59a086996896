#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command: tests, sanitizer, benchmark; results in one folder.
#
#     bash bench/gpu_check.sh [--quick] [FOLDER]      FOLDER: $OUT, or gpu_check/, if not given
#     PYTHON=.venv/bin/python bash bench/gpu_check.sh
#     RESUME=results.json bash bench/gpu_check.sh     continues the benchmark of a call before, of the same commit
#     BENCH_COMMIT=<40 digits> bash …                 says the commit of a copy without its own .git
#     TESTS=0 MEMCHECK=200 BENCH=100 bash …           seconds of a stage instead of its own; 0 leaves it out.
#                                                     HUGE and RACECHECK likewise; DEADLINE for everything
#
# Needs torch, triton, torchvision, pytest and rich, no network. Everything ends within 530 s (--quick: 230 s):
# a stage gets its seconds, or what is left. What it did until then is in the folder: results.json, its report
# (results.json.begun where a measurement was killed), summary.txt and logs.tgz. A failing stage does not stop
# the next. Exit code: 0 if nothing failed, 1 if something did, 2 if it cannot start, 3 if there is no GPU.
set -u

fail() { echo "gpu_check: $*" >&2; exit 2; }

quick=no
folder=${OUT:-gpu_check}
for argument in "$@"; do
    case $argument in
        --quick) quick=yes ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) fail "unknown option $argument; see --help" ;;
        *) folder=$argument ;;
    esac
done

# Seconds. The last stage of each has what the others leave.
declare -A budget
if [ $quick = yes ]; then
    deadline=230
    budget=([bench]=110 [tests]=60 [huge]=0 [sanitizer]=25 [memcheck]=$deadline [racecheck]=0)
else
    deadline=530
    budget=([tests]=240 [huge]=80 [sanitizer]=25 [memcheck]=60 [racecheck]=0 [bench]=$deadline)
fi
seconds_of() {  # VARIABLE DEFAULT: what the environment says, if it says anything
    local value=${!1:-$2}
    [[ $value =~ ^(0|[1-9][0-9]{0,4})$ ]] || fail "$1=$value: expected seconds"
    echo "$value"
}
deadline=$(seconds_of DEADLINE $deadline) || exit 2
for name in tests huge memcheck racecheck bench; do
    budget[$name]=$(seconds_of "${name^^}" "${budget[$name]}") || exit 2
done
to_kill=15     # a stage may take that much longer until it is gone; pytest waits 10 s for its workers
to_finish=5    # for the summary
worthwhile=15  # with less left, a stage would hardly have loaded torch

mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
results=$folder/results.json
if [ -z "${RESUME:-}" ]; then
    # What an earlier check left is kept under another name.
    [ ! -f "$results" ] || mv --backup=numbered "$results" "$folder/earlier.json" || exit 2
    rm -f "$results.begun"
else
    [ $quick = no ] || fail "RESUME: expected no --quick, whose results are no part of another run"
    [ -f "$RESUME" ] || fail "RESUME=$RESUME: no such file"
    if ! [ "$RESUME" -ef "$results" ]; then
        rm -f "$results.begun"
        cp "$RESUME" "$results" || exit 2
        [ ! -f "$RESUME.begun" ] || cp "$RESUME.begun" "$results.begun" || exit 2
    fi
fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1  # what is killed leaves a whole log
unset TRITON_INTERPRET     # the real compiler

declare -a summary=() logs=()
failed=no running='' interrupted=no
trap 'interrupted=yes; [ -z "$running" ] || kill -INT "$running"' INT TERM

note() {  # NAME OUTCOME
    summary+=("$(printf '%-14s %s' "$1" "$2")")
    echo "== $1: $2"
}

measured() {  # what the benchmark has left, in words; fails if that is nothing, or if one of our ops failed
    if [ ! -f "$results" ]; then echo "nothing was measured"; return 1; fi
    "$python" - "$results" <<'END'
import sys
from pathlib import Path
from bench.results import OURS, read
rows = read(Path(sys.argv[1])).rows
failed = sum(row.impl == OURS and row.failed for row in rows)
print(f"results.json has {len(rows)} rows; {failed} of ours failed")
sys.exit(failed > 0 or not rows)
END
}

limited() {  # SECONDS LOG COMMAND…: interrupted then, so that it shows what it has; killed if it does not hear
    local seconds=$1 log=$2 code
    shift 2
    "$python" -m bench.limited "$seconds" $to_kill "$@" >>"$log" 2>&1 &
    running=$!
    wait $running
    code=$?
    while kill -0 $running 2>/dev/null; do wait $running; code=$?; done  # a signal to us ends a wait early
    running=''
    return $code
}

stage() {  # NAME COMMAND…: runs the command, its output in NAME.log as well; true if nothing failed
    local name=$1 seconds=${budget[$1]} began=$SECONDS left code took again=0 detail='' good=yes
    local variable=${1^^}
    shift
    left=$((deadline - began - to_kill - to_finish))
    if [ "$seconds" -eq 0 ]; then
        note "$name" "left out; $variable=60 gives it 60 s"
        return 1
    elif [ $interrupted = yes ] || { [ $left -lt "$seconds" ] && [ $left -lt $worthwhile ]; }; then
        failed=yes
        note "$name" "FAILED: left out, $([ $interrupted = yes ] && echo interrupted || echo "$left s are left for it")"
        return 1
    fi
    [ $left -ge "$seconds" ] || seconds=$left
    echo "== $name: at most $seconds s: $*"
    : >"$folder/$name.log"
    logs+=("$name.log")
    limited "$seconds" "$folder/$name.log" "$@"
    code=$?
    # The benchmark's 3: the GPU answers no more; another process goes on after what lost it.
    while [ "$name $quick $code $interrupted" = "bench no 3 no" ]; do
        left=$((began + seconds - SECONDS))
        [ $left -ge $worthwhile ] || break
        again=$((again + 1))
        limited $left "$folder/$name.log" "$@"
        code=$?
    done
    took=$((SECONDS - began))
    tail -n 40 "$folder/$name.log"
    if [ "$name" = bench ]; then
        detail="; $(measured)" || good=no
        [ ! -f "$results.begun" ] || detail+="; killed while it measured $(cat "$results.begun")"
        [ $again -eq 0 ] || detail="; the GPU was lost $again times, and it went on$detail"
    fi
    if [ $interrupted = yes ]; then
        good=no
        note "$name" "FAILED: interrupted after $took s$detail"
    elif [ $code -eq 0 ] && [ $good = yes ]; then
        note "$name" "ok ($took s)$detail"
    elif [ $took -ge "$seconds" ] && [ "$name $quick" = "bench no" ] && [[ $code =~ ^13[07]$ ]]; then
        note "$name" "stopped when its $seconds s were over$detail"
    elif [ $took -ge "$seconds" ]; then
        good=no
        note "$name" "FAILED: not done within $seconds s$detail"
    else
        good=no
        note "$name" "FAILED with code $code ($took s)$detail"
    fi
    [ $good = yes ] || failed=yes
    [ $good = yes ]
}

gpu=$(timeout -k 5 90 "$python" -c \
    'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') \
    || fail "torch does not load, or not within 90 s"
echo "GPU: ${gpu:-none}"
[ -n "$gpu" ] || budget[bench]=$(seconds_of BENCH $deadline)  # nothing else runs
if command -v nvidia-smi >/dev/null; then
    timeout -k 2 20 nvidia-smi >"$folder/nvidia-smi.txt" 2>&1 || note nvidia-smi "failed, or not done within 20 s"
    logs+=(nvidia-smi.txt)
fi

has() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }
if [ -z "${BENCH_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1; then
    note commit "unknown: without .git, BENCH_COMMIT has to say it; the benchmark cannot be continued"
fi
for package in fvcore deformops; do
    has $package || note $package "not installed; what needs it is left out"
done

# What needs no GPU, the compile checks, is left to make test, and so are hundreds of random calls, each of
# which would have to be compiled. Skips are shown before failures, which the log then ends with.
pytest=(-m pytest -q -p no:cacheprovider -o addopts= --tb=short --durations=15 -rsfE)
if has pytest_timeout; then
    pytest+=(--timeout 180 --timeout-method thread)  # for dozens of kernels to compile
else
    note pytest-timeout "not installed; a test that hangs takes the time of those after it"
fi
workers=()
if has xdist; then
    cores=$(nproc)
    workers=(-n $((cores < 14 ? cores : 14)))
else
    note pytest-xdist "not installed; tests run one after the other"
fi
huge=tests/kernels/test_deform_conv_gpu.py::test_beyond_32_bits  # 24 to 34 GB each: one at a time
random=tests/kernels/test_deform_conv_properties.py
if [ $quick = yes ]; then
    tests=(tests/test_contract.py -k "values_and_gradients or deterministic")
else
    tests=(tests/test_contract.py tests/kernels --deselect=$huge --ignore=$random
        --ignore=tests/kernels/test_compile.py --ignore=tests/kernels/test_front_end.py
        --ignore=tests/kernels/test_deform_conv_compile.py)
    note random "$random is left to make test"
fi

test_gpu() {
    stage tests env OMP_NUM_THREADS=1 "$python" "${pytest[@]}" "${workers[@]}" "${tests[@]}"
    stage huge "$python" "${pytest[@]}" $huge
}

sanitize() {
    local sanitizer tool why=''
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -z "$sanitizer" ]; then
        why="not run: compute-sanitizer is not installed"
    elif [ $((budget[memcheck] + budget[racecheck])) -gt 0 ]; then
        stage sanitizer "$sanitizer" --error-exitcode 9 "$python" -c 'import torch; torch.ones(1, device="cuda")' \
            || why="not run, as sanitizer failed"
    fi
    for tool in memcheck racecheck; do
        if [ -n "$why" ] && [ "${budget[$tool]}" -gt 0 ]; then
            note $tool "$why"
        else
            # Without PyTorch's cache every tensor is an allocation of its own, so its ends are known.
            stage $tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                "$sanitizer" --tool $tool --error-exitcode 9 "$python" -m bench.small_calls
        fi
    done
}

if [ -z "$gpu" ]; then
    for name in tests huge memcheck racecheck; do note $name "not run: no GPU"; done
    if [ -n "${RESUME:-}" ]; then
        note bench "not run: no GPU to continue it on"
    else
        echo "The benchmark runs at small sizes on the CPU; its times say nothing about the kernels."
        stage bench "$python" -m bench --quick --json "$results"
    fi
elif [ $quick = yes ]; then
    stage bench "$python" -m bench --quick --json "$results"
    test_gpu
    sanitize
else
    test_gpu
    sanitize
    stage bench "$python" -m bench --resume "$results"
fi

{
    echo "gpu_check$([ $quick = yes ] && echo ' --quick'), GPU: ${gpu:-none}, $SECONDS s"
    printf '  %s\n' "${summary[@]}"
} | tee "$folder/summary.txt"
cd "$folder" || exit 1
rm -f .results.json.*  # of a benchmark that was killed while it wrote
[ ${#logs[@]} -eq 0 ] || { tar czf logs.tgz "${logs[@]}" && rm -f "${logs[@]}"; }
echo "Everything is in $folder"
[ $failed = no ] || exit 1
[ -n "$gpu" ] || exit 3
