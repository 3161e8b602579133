#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a card is needed for, in three plans of some minutes each, without a network.
#
#   bench/gpu_check.sh correctness|performance|evidence [--output FOLDER] [--python PYTHON] [--device cuda|cpu]
#                      [--minutes 8] [--stages NAME,NAME,...] [--assets FOLDER] [--resume FILE]
#
# correctness: machine build smoke tests memcheck racecheck. performance: machine build rates model profile linear svd step.
# evidence: machine build compare.
# Correctness first. Evidence is examples/compare.py on the models and data in --assets (gpu_pack.sh), which goes on
# from the cells.jsonl of --resume. PYTHON (default: python3) must have torch (a CUDA build), pybind11, cmake, ninja, rich,
# safetensors, pytest and pytest-xdist; step wants transformers and peft too; nvcc must be found. osora is built into
# build/gpu, where the next build is quick, and what is installed stays as it is. --device cpu is a rehearsal without
# a card on tiny sizes, with the osora that PYTHON has (OSORA_GPU_BUILD=1: with one built for it).
#
# --minutes is for the whole: a stage gets its own limit or what is left, and is cut there. What becomes of one stage
# stops no other, but nothing runs on a build that failed. Everything stands in FOLDER (default: $OUT, or
# bench/results/gpu-DATE) as it comes, in at most 8 files: log.txt (stages, limits, seconds, the machine), build.txt,
# smoke.txt, tests.txt, sanitizer.txt, performance.txt, results.jsonl (a line for each check and case) and report.json,
# written anew around each stage. Evidence wants a folder of its own, for evidence.txt, cells.jsonl (a line for each
# training run), comparison.md and comparison.png. So whoever kills this loses only what was not yet found.
# Exit code: 0 all stages passed, 1 one failed, 2 wrong words, 3 one was cut or skipped and none failed, or there is no
# card.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A plans=(
  [correctness]="machine build smoke tests memcheck racecheck"
  [performance]="machine build rates model profile linear svd step"
  [evidence]="machine build compare"
)
# Seconds: about twice what each should take on a card, so that one that hangs costs the others little.
declare -A limits=(
  [machine]=60 [build]=150 [smoke]=120 [tests]=150 [memcheck]=80 [racecheck]=80
  [rates]=45 [model]=110 [profile]=100 [linear]=110 [svd]=100 [step]=80
  [compare]=420
)
# Where the output of a stage goes.
declare -A texts=(
  [machine]=log [build]=build [smoke]=smoke [tests]=tests [memcheck]=sanitizer [racecheck]=sanitizer
  [rates]=performance [model]=performance [profile]=performance [svd]=performance [linear]=performance
  [step]=performance
  [compare]=evidence
)
grace=5   # seconds between asking a stage to end and ending it
absent=77 # what a stage returns that finds nothing to run
again=75  # and one that stopped by itself when its time was over: it goes on where it was

usage() { sed -n '3,/^set -uo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
wrong() { echo "$1" >&2; exit 2; }

# ---- what was asked for -----------------------------------------------------------------------------------------

plan="" python=python3 device=cuda minutes=8 output="" chosen="" assets="" resume=""
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --output | --python | --device | --minutes | --stages | --assets | --resume)
      [[ -n ${2:-} ]] || wrong "$1 needs a value"
      case $1 in
        --output) output=$2 ;;
        --python) python=$2 ;;
        --device) device=$2 ;;
        --minutes) minutes=$2 ;;
        --stages) chosen=${2//,/ } ;;
        --assets) assets=$2 ;;
        --resume) resume=$2 ;;
      esac
      shift 2 ;;
    -*) wrong "unknown option $1: there are --output, --python, --device, --minutes, --stages, --assets, --resume, --help" ;;
    *) [[ -z $plan ]] || wrong "one plan at a time: $plan or $1"; plan=$1; shift ;;
  esac
done
[[ -n $plan && -n ${plans[$plan]:-} ]] || wrong "the plan is correctness, performance or evidence, got ${plan:-none}"
[[ $device == cuda || $device == cpu ]] || wrong "--device is cuda or cpu, got $device"
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || wrong "--minutes is a number such as 8 or 2.5, got $minutes"
for name in $chosen; do
  [[ " ${plans[$plan]} " == *" $name "* ]] || wrong "$plan has no stage $name; it has: ${plans[$plan]}"
done
[[ -z $assets || -d $assets ]] || wrong "there is no folder $assets"
[[ -z $resume || -e $resume ]] || wrong "there is no $resume to go on from"
[[ -z $assets ]] || assets=$(realpath "$assets")
[[ -z $resume ]] || resume=$(realpath "$resume")
command -v "$python" > /dev/null || wrong "there is no $python: name one with --python"
python=$(command -v "$python")
[[ $python == /* ]] || python=$PWD/$python
folder=${output:-${OUT:-$root/bench/results/gpu-$(date -u +%Y%m%dT%H%M%SZ)}}
[[ $folder == /* ]] || folder=$PWD/$folder
deadline=$(awk -v minutes="$minutes" 'BEGIN { printf "%d", 60 * minutes }')
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which heeds them
threads=$cores
[[ $device == cuda ]] || threads=1
cd "$root" || exit 2

# Nothing is fetched, nothing waits in a buffer, and no test takes this for one of its own processes.
export PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8
unset "${!PYTEST_@}"

if [[ $device == cuda ]] && ! nvidia-smi -L 2> /dev/null | grep -q '^GPU' &&
  ! timeout 90 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' > /dev/null 2>&1; then
  echo "no GPU on this machine, so nothing was checked (--device cpu: a rehearsal)"
  exit 3
fi

# ---- stages -----------------------------------------------------------------------------------------------------
# Each is run by a bash of its own, and ends with what it may return: all that it uses is exported below.

machine() { exec "$python" bench/gpu_machine.py --device "$device"; }

build() {
  if [[ $device == cuda || ${OSORA_GPU_BUILD:-0} == 1 ]]; then
    "$python" bench/gpu_build.py "$built" --device "$device" || return
    export PYTHONPATH=$built/site${PYTHONPATH:+:$PYTHONPATH}
  fi
  "$python" -c 'import osora; print(osora.build_info())'
}

smoke() { exec "$python" bench/gpu_smoke.py --device "$device"; }

tests() {  # the card's alone. Warnings are no errors: other versions have others
  local common=(-m pytest -q --tb=short -p no:benchmark -p no:cacheprovider -m "not slow" -o filterwarnings=)
  if [[ $device == cpu ]]; then
    exec "$python" "${common[@]}" -p no:xdist -k "cpu and float32" tests/ops/test_decode.py
  fi
  export OSORA_REQUIRE_CUDA=1 OMP_NUM_THREADS=1
  exec "$python" "${common[@]}" -n "$cores" --dist worksteal --maxfail=80 --continue-on-collection-errors \
    -k "(cuda and not emulated) or capture" tests/ops tests/svd/test_cuda.py tests/svd/test_drivers.py
}

sanitize() {  # our own kernels; without torch's cache, which would hide what lies out of bounds
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  exec "$sanitizer" --tool "$1" --error-exitcode 9 --report-api-errors no --kernel-regex kns=osora \
    "$python" bench/gpu_smoke.py --device "$device" --small
}

memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

rates() { exec "$python" bench/gpu_rates.py --device "$device"; }
profile() { exec "$python" bench/gpu_profile.py --device "$device"; }

model() {  # all linears of a model, a block's step, a token
  local common=(bench/llama.py --device "$device" --threads "$threads" --output "$scratch")
  [[ $device == cuda ]] || exec "$python" "${common[@]}" --scale 64 --blocks 1 --rows 4 --rank 8 --repetitions 1
  exec "$python" "${common[@]}" --repetitions 3
}

svd() {  # batches against what PEFT calls; then cuSOLVER's drivers for one matrix
  local common=(bench/svd.py --device "$device" --threads "$threads" --no-memory --source stored --output "$scratch")
  if [[ $device == cpu ]]; then
    exec "$python" "${common[@]}" --preset quick --shapes 64x48 --batch 1 --peers lowrank-4
  fi
  local rc=0
  "$python" "${common[@]}" --shapes 4096x4096 --ranks 64 128 --batch 32 --tols 1e-3 --reference osora --peers \
    --repetitions 3 || rc=$?
  "$python" "${common[@]}" --shapes 4096x4096 11008x4096 --ranks 64 128 --batch 1 8 --tols 1e-3 \
    --peers lowrank-4 lowrank-16 --repetitions 3 --slow 1 || rc=$?
  "$python" "${common[@]}" --shapes 4096x4096 --ranks 64 --batch 1 --tols 1e-3 --peers gesvdr gesvda gesvdp \
    --repetitions 3 --slow 1 || rc=$?
  return "$rc"
}

linear() {
  local common=(bench/linear.py --device "$device" --threads "$threads" --output "$scratch")
  if [[ $device == cpu ]]; then
    exec "$python" "${common[@]}" --preset quick --rows 3 --ranks 4 --dtypes float32 --no-multi \
      --peers frozen osora op-by-op
  fi
  local peers=(frozen osora op-by-op)
  "$python" -c 'import peft' 2> /dev/null && peers+=(vera lora)
  local rc=0 more=(--ranks 64 --dtypes bfloat16 --peers "${peers[@]}" --repetitions 5 --spend 0.2)
  "$python" "${common[@]}" --shapes 4096x4096 --rows 8192 1 512 --multi-shapes 4096x4096 "${more[@]}" || rc=$?
  "$python" "${common[@]}" --models llama3-8b --rows 512 2048 8192 --no-multi "${more[@]}" || rc=$?
  return "$rc"
}

step() {
  "$python" -c 'import peft, transformers' > /dev/null 2>&1 ||
    { echo "transformers and peft cannot be imported"; return "$absent"; }
  local common=(bench/step.py --device "$device" --threads "$threads" --no-memory --output "$scratch")
  [[ $device == cuda ]] || exec "$python" "${common[@]}" --quick --dtype float32
  exec "$python" "${common[@]}" --model random --dtype bfloat16 --batch 8 --tokens 512 --repetitions 5
}

compare() {  # ends by itself before its limit, so that the report is of all that was done
  local words=(--device "$device" --output "$scratch/compare" --cells "$folder/cells.jsonl") tasks rc=0
  [[ -z $resume ]] || words+=(--resume "$resume")
  if [[ $device == cpu ]]; then
    words+=(--size tiny --jobs 1 --methods base osora lora)
  else
    [[ -z $assets ]] || export PYTHONPATH=$assets/site${PYTHONPATH:+:$PYTHONPATH}
    local wordnet=${assets:-/usr/share/wordnet}
    read -r -a tasks < <("$python" examples/compare_assets.py "$wordnet" 2>> "$folder/evidence.txt")
    ((${#tasks[@]})) || { echo "no model and data of examples/compare.py are here"; return "$absent"; }
    words+=(--size card --tasks "${tasks[@]}" --wordnet "$wordnet")
    words+=(--minutes "$(awk -v limit="$limit" 'BEGIN { printf "%.2f", (limit - 30) / 60 }')")
    [[ ! -f $assets/gsm8k_train.jsonl ]] || words+=(--gsm8k "$assets/gsm8k_train.jsonl")
  fi
  "$python" examples/compare.py "${words[@]}" || rc=$?
  for file in comparison.md comparison.png; do
    [[ ! -f $scratch/compare/$file ]] || cp "$scratch/compare/$file" "$folder/"
  done
  [[ ! -f $folder/comparison.md ]] || cat "$folder/comparison.md"
  ((rc == 3)) && return "$again"
  return "$rc"
}

# ---- running them -----------------------------------------------------------------------------------------------

mkdir -p "$folder" || exit 2
scratch=$(mktemp -d) || exit 2
built=$root/build/gpu
sanitizer=$(command -v compute-sanitizer || true)
[[ -n $sanitizer || ! -x /usr/local/cuda/bin/compute-sanitizer ]] || sanitizer=/usr/local/cuda/bin/compute-sanitizer
export python device cores threads built sanitizer scratch absent again folder assets resume OSORA_RESULTS_JSONL=$folder/results.jsonl
export -f machine build smoke tests sanitize memcheck racecheck rates model profile svd linear step compare
touch "$OSORA_RESULTS_JSONL"
failed=0 unfinished=0 unbuilt=no ours=no running="" current="" began=0

say() { echo "== $*" | tee -a "$folder/log.txt"; }
report() { "$python" bench/gpu_report.py "$folder" "$@" || echo "the report could not be written" >&2; }

stop_stage() {  # nothing of a stage outlives it
  [[ -z $running ]] || kill -KILL -- "-$running" 2> /dev/null
}

interrupted() {
  stop_stage
  [[ -z $current ]] || say "end $current: cut, rc 143, $((SECONDS - began)) s"
  say "interrupted at $SECONDS s"
  report
  ((failed)) && exit 1
  exit 3
}
trap interrupted INT TERM
trap 'rm -rf "$scratch"' EXIT

skip() {  # skip NAME REASON
  say "skipped $1: $2"
  unfinished=1
}

stage() {  # stage NAME: run it under its limit, log and report, whatever becomes of it
  local left=$((deadline - SECONDS - grace)) text=$folder/${texts[$1]}.txt rc state
  local limit=${OSORA_GPU_STAGE_SECONDS:-${limits[$1]}} # the tests' clock is not a card's
  ((limit < left)) || limit=$left
  if ((limit < 1)); then
    skip "$1" "no time is left"
    return
  fi
  current=$1 began=$SECONDS
  say "begin $1: limit $limit s, at $SECONDS s"
  [[ ${texts[$1]} == log ]] || echo "== begin $1" >> "$text"
  report
  limit=$limit timeout -k "$grace" "$limit" bash -c "$1" >> "$text" 2>&1 < /dev/null &
  running=$!
  { wait "$running"; } 2> /dev/null # what bash says of a process that was killed
  rc=$?
  stop_stage
  running=""
  state=failed
  ((rc == 0)) && state=passed
  ((rc == absent)) && state=skipped
  ((rc == again)) && state=cut
  # timeout's own codes; whoever is ended by somebody else before the limit has failed
  if ((rc == 124 || (rc == 137 && SECONDS - began >= limit))); then state=cut; fi
  case $state in
    failed) failed=1 ;;
    cut | skipped) unfinished=1 ;;
  esac
  [[ ${texts[$1]} == log ]] || tail -n 12 "$text"
  say "end $1: $state, rc $rc, $((SECONDS - began)) s"
  current=""
  report
  if [[ $1 == build && $rc != 0 ]]; then unbuilt=yes; fi
}

say "plan $plan: device $device, limit $deadline s, $(date -u +%Y-%m-%dT%H:%M:%SZ)," \
  "commit $(git describe --always --dirty 2> /dev/null || echo unknown)"
for name in ${plans[$plan]}; do
  if [[ -n $chosen && " $chosen " != *" $name "* ]]; then continue; fi
  case $name in
    memcheck | racecheck)
      if [[ $device == cpu ]]; then skip "$name" "it is for a card"; continue; fi
      if [[ -z $sanitizer ]]; then skip "$name" "there is no compute-sanitizer"; continue; fi ;;
  esac
  if [[ $unbuilt == yes && $name != build ]]; then skip "$name" "osora was not built"; continue; fi
  # From here on it is what the build made; one made before serves where the build was not asked for.
  if [[ $name != machine && $name != build && $ours == no && -d $built/site ]]; then
    if [[ $device == cuda || ${OSORA_GPU_BUILD:-0} == 1 ]]; then
      export PYTHONPATH=$built/site${PYTHONPATH:+:$PYTHONPATH}
      ours=yes
    fi
  fi
  stage "$name"
done
say "plan $plan ended after $SECONDS s"
if [[ $plan == performance ]]; then report --goals | tee -a "$folder/performance.txt"; else report; fi
((failed)) && exit 1
((unfinished)) && exit 3
exit 0
