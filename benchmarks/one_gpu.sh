#!/usr/bin/env bash
# The figures of docs/results.md and RESULTS.md that one GPU gives, from nothing:
#
#     benchmarks/one_gpu.sh HUB_ROOT FOLDER
#
# Trained adapters, predictions, tables, JSON and logs come to lie in FOLDER. A step that fails or takes too long is told of, and
# does not stop the others. Run again, trainings and comparisons go on where they stopped; the rest is measured anew.
#
# Processes on one GPU take turns, kernel by kernel, unless NVIDIA's Multi-Process Service lets them compute side by side. It is
# used where it is installed; MPS=no goes without.
set -u
hub=$(realpath "$1")
mkdir -p "$2/logs"
out=$(realpath "$2")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

step() { # name, most seconds, command
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout --kill-after=15 "$seconds" "$@" >"$out/logs/$name.log" 2>&1
    local code=$?
    echo "$(date +%T) $name: exit code $code after $((SECONDS - began)) s"
    return $code
}

side_by_side() {
    [ "${MPS:-yes}" = yes ] && command -v nvidia-cuda-mps-control >/dev/null || return
    export CUDA_MPS_PIPE_DIRECTORY=$out/mps CUDA_MPS_LOG_DIRECTORY=$out/mps
    mkdir -p "$out/mps"
    nvidia-cuda-mps-control -d
    step side-by-side 60 "$python" -c "import torch; print(torch.ones(8, device='cuda').sum())" || in_turns
}

in_turns() {
    [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || return
    echo quit | timeout 30 nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

side_by_side
results=("$python" -m benchmarks.results --hub-root "$hub" --state "$out/state")
# A second time goes on with what failed.
step fleet 400 "${results[@]}" --only fleet || step fleet-again 150 "${results[@]}" --only fleet
compared=("${results[@]}" --only comparisons --at-once 2)
step comparisons 640 "${compared[@]}" || step comparisons-again 150 "${compared[@]}"
step tables 60 "${results[@]}" --tables
cp "$out/logs/tables.log" "$out/tables.md"

application=("$python" -m benchmarks.application --rank 64 --in-flight 64 --gateways 2 --tokens 64 --tokens 256)
halves=("${application[@]}" --replicas 2 --gpus 0.45)
step application-2 300 "${halves[@]}" --json "$out/application-2.json"
batch=("$python" -m benchmarks.serve_batch --rank 8 --requests 512 --rows 64 --files --padded 0 --merged 0)
step adapters-1000 260 "${batch[@]}" --adapters 1000 --json "$out/adapters-1000.json"
step adapters-22 120 "${batch[@]}" --adapters 22 --json "$out/adapters-22.json"
in_turns
step application-2-in-turns 300 "${halves[@]}" --json "$out/application-2-in-turns.json"
step application-1 300 "${application[@]}" --replicas 1 --gpus 0.9 --json "$out/application-1.json"
touch "$out/done"
