#!/usr/bin/env bash
# Trains both bundled models at once on one GPU: scripts/train_tiny_gpu.sh DIR [options of scripts/train_tiny.py ...]
#
# States stay in WORK (default: /tmp/tiny). What is worth keeping, DIR/NAME/{model.safetensors,log.jsonl,...}, is renewed
# every SAVE seconds (default: 60), so that a machine that is taken away leaves weights that can be exported:
#   python scripts/train_tiny.py --preset NAME --run-dir DIR/NAME --output sav_jax/models/NAME --export-only
set -uo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
kept=${1:?the folder for weights and logs}
shift
work=${WORK:-/tmp/tiny}
python=${PYTHON:-python3}
models=${MODELS:-"tiny tiny-qwen"}
cores=$(nproc)
number=$(wc -w <<<"$models")
workers=${WORKERS:-$((cores / number))}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.$((90 / number))}
# A second run on the same machine finds what the first has compiled.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compiled} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# Prompts are short: scores fit in memory, and one back end serves every bucket.
export SAV_JAX_ATTENTION=${SAV_JAX_ATTENTION:-xla}

keep() {
  for name in $models; do
    mkdir -p "$kept/$name"
    for file in "$work/out-$name/model.safetensors" "$work/out-$name/evaluation.json" \
      "$work/$name/log.jsonl" "$work/$name/tokenizer.json"; do
      if [ -s "$file" ]; then cp "$file" "$kept/$name/.new" && mv "$kept/$name/.new" "$kept/$name/$(basename "$file")"; fi
    done
  done
}

mkdir -p "$work" "$kept"
pids=()
for name in $models; do
  "$python" scripts/train_tiny.py --preset "$name" --run-dir "$work/$name" --output "$work/out-$name" \
    --workers "$workers" --save-seconds "${SAVE:-60}" "$@" 2>&1 | sed -u "s/^/[$name] /" &
  pids+=($!)
done
(while sleep "${REPORT:-20}"; do
  keep
  for name in $models; do
    echo "[$name] $(grep -h loss "$work/$name/log.jsonl" 2>/dev/null | tail -1)"
  done
done) &
watcher=$!
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
kill "$watcher"
keep
for name in $models; do
  echo "[$name] $(grep -h all "$work/$name/log.jsonl" 2>/dev/null | tail -1 | cut -c 1-3000)"
done
exit $status
