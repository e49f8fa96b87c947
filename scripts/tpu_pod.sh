#!/usr/bin/env bash
# A Cloud TPU slice for sav_jax: made, installed on, run on all workers, results fetched, given back.
#
#   export TPU_NAME=sav TPU_ZONE=us-west4-a
#   bash scripts/tpu_pod.sh create v5litepod-16 v2-alpha-tpuv5-lite
#   bash scripts/tpu_pod.sh install
#   bash scripts/tpu_pod.sh run extract --model llava-hf/llava-onevision-qwen2-7b-ov-hf --data rows.jsonl \
#       --output gs://bucket/heads --cache gs://bucket/cache --mesh fsdp=16
#   bash scripts/tpu_pod.sh fetch results/ here/        # from the first worker: the one that writes
#   bash scripts/tpu_pod.sh delete
#
# With --dry-run in front the commands are printed and nothing is done. "run" adds --distributed: every worker runs the
# same command in ~/sav_jax, over files that all of them see (a bucket, or a folder copied there by "put LOCAL REMOTE").
set -euo pipefail
unset CDPATH # with it, cd prints
root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"

usage() {
    sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
}

dry=
if [[ "${1:-}" == --dry-run ]]; then
    dry=1
    shift
fi
[[ $# -ge 1 && "$1" != --help && "$1" != -h ]] || usage
for word in "$@"; do
    if [[ "$word" == --dry-run ]]; then
        echo "error: --dry-run goes in front: tpu_pod.sh --dry-run $1 ..." >&2
        exit 2
    fi
done
for name in TPU_NAME TPU_ZONE; do
    if [[ -z "${!name:-}" ]]; then
        echo "error: $name is not set" >&2
        exit 2
    fi
done
where=("$TPU_NAME" --zone "$TPU_ZONE")

do_it() {
    if [[ -n "$dry" ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_all() {
    do_it gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command "$1"
}

action="$1"
shift
case "$action" in
create)
    [[ $# -eq 2 ]] || usage
    do_it gcloud compute tpus tpu-vm create "${where[@]}" --accelerator-type "$1" --version "$2"
    ;;
install)
    [[ $# -eq 0 ]] || usage
    packed="$(mktemp -d)/sav_jax.tar.gz"
    trap 'rm -rf "$(dirname "$packed")"' EXIT
    do_it git -C "$root" archive --format tar.gz --output "$packed" HEAD
    do_it gcloud compute tpus tpu-vm scp "$packed" "$TPU_NAME:sav_jax.tar.gz" --zone "$TPU_ZONE" --worker=all
    on_all 'mkdir -p sav_jax && tar xzf sav_jax.tar.gz -C sav_jax && cd sav_jax && python3.11 -m venv .venv && .venv/bin/python -m pip install -q -e . "jax[tpu]"'
    ;;
put)
    [[ $# -eq 2 ]] || usage
    do_it gcloud compute tpus tpu-vm scp --recurse "$1" "$TPU_NAME:sav_jax/$2" --zone "$TPU_ZONE" --worker=all
    ;;
run)
    [[ $# -ge 1 ]] || usage
    on_all "cd sav_jax && .venv/bin/sav-jax $(printf '%q ' "$@")--distributed"
    ;;
fetch)
    [[ $# -eq 2 ]] || usage
    do_it gcloud compute tpus tpu-vm scp --recurse "$TPU_NAME:sav_jax/$1" "$2" --zone "$TPU_ZONE" --worker=0
    ;;
delete)
    [[ $# -eq 0 ]] || usage
    do_it gcloud compute tpus tpu-vm delete "${where[@]}" --quiet
    ;;
*)
    usage
    ;;
esac
