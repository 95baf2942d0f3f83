#!/usr/bin/env bash
# Builds the extension in place, checks it on a GPU, measures it, and writes one result file. Needs no network.
#
#   benchmarks/gpu_check.sh [--wheels FOLDER] [--output FILE] [--limit SECONDS]
#                           [--imaml-dev FOLDER] [--hypertorch FOLDER] [STEP ...]
#
# Steps, all by default: build tests cpp memcheck racecheck benchmarks meta_step scaling training omniglot. One that fails does
# not stop the rest; steps run earlier on the same hardware and versions stay in the result file, so the steps can be spread
# over several calls. omniglot, the paper's table, needs Omniglot in IMAML_DATA_ROOT; where its time is up, another call of it
# goes on from its checkpoints.
# --wheels: a folder of wheels with Python packages that are missing. --limit: the most that one step may take (480).
# --imaml-dev, --hypertorch: sources of these peers for meta_step; TorchOpt and JAX take part where they are installed.
# PYTHON: the Python to use, with torch, ninja, setuptools, pytest in it. Logs: build/gpu_check/.
# Without a GPU every step goes as far as it can, and the result file says what was skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
output=benchmarks/results/gpu_check.json wheels='' limit=480 steps=() peers=()
all_steps=(build tests cpp memcheck racecheck benchmarks meta_step scaling training omniglot)
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=$2; shift ;;
    --output) output=$2; shift ;;
    --limit) limit=$2; shift ;;
    --imaml-dev | --hypertorch) peers+=("$1" "$(realpath "$2")"); shift ;;
    build | tests | cpp | memcheck | racecheck | benchmarks | meta_step | scaling | training | omniglot) steps+=("$1") ;;
    *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
  esac
  shift
done
[ ${#steps[@]} -gt 0 ] || steps=("${all_steps[@]}")

logs=build/gpu_check
mkdir -p "$logs" "$(dirname "$output")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$logs/site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$PWD/$logs/site"
fi
gpu=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
toolkit=$("$PYTHON" imaml_ext/_build.py | sed -n 's/^CUDA_ROOT=//p')
sanitizer=$(command -v compute-sanitizer || ls "$toolkit/bin/compute-sanitizer" /usr/local/cuda/bin/compute-sanitizer 2> /dev/null | head -1)

# One line per step for the result file: name, status, seconds, a word on it.
record() { printf '%s\t%s\t%d\t%s\n' "$1" "$2" "$3" "$4" >> "$logs/steps.tsv"; printf '%-12s %s (%d s) %s\n' "$1" "$2" "$3" "$4"; }
run() { # run STEP COMMAND...: records passed or failed, with the last line that the command printed
  local name=$1 start=$SECONDS; shift
  if timeout -k 10 "$limit" "$@" > "$logs/$name.log" 2>&1; then local status=passed; else local status="failed ($?)"; fi
  record "$name" "$status" $((SECONDS - start)) "$(grep -v '^[[:space:]]*$' "$logs/$name.log" | tail -1 | cut -c1-300)"
  [ "$status" = passed ]
}
skip() { record "$1" "skipped: $2" "${3:-0}" ""; }

: > "$logs/steps.tsv"
rm -f "$logs"/benchmark-*.json
for step in "${steps[@]}"; do
  case $step in
    build)
      # On a machine with a GPU a build without CUDA is a failure.
      IMAML_EXT_CUDA=${IMAML_EXT_CUDA:-$([ "$gpu" = 1 ] && echo 1 || echo auto)} run build "$PYTHON" setup.py build_ext --inplace ;;
    tests)
      files=$(grep -l 'cuda' python_tests/test_*.py)
      if [ "$gpu" = 1 ]; then run tests "$PYTHON" -m pytest -m cuda $files
      else start=$SECONDS; "$PYTHON" -m pytest -q -m cuda --collect-only $files > "$logs/tests.log" 2>&1 || true
        skip tests "no CUDA device" $((SECONDS - start)); fi ;;
    cpp)
      run cpp bash -e -c '
        cmake -S . -B build/gpu_check/cmake -G Ninja -DPython3_EXECUTABLE="$(command -v "$0")"
        cmake --build build/gpu_check/cmake
        ctest --test-dir build/gpu_check/cmake --output-on-failure --no-tests=error' "$PYTHON" ;;
    memcheck | racecheck)
      if [ "$gpu" != 1 ]; then skip $step "no CUDA device"
      elif [ -z "$sanitizer" ]; then skip $step "no compute-sanitizer"
      else # without torch's cache every tensor is an allocation of its own, past whose end nothing may be touched
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run $step "$sanitizer" --tool $step --error-exitcode 9 --report-api-errors no \
          "$PYTHON" benchmarks/every_kernel.py --device cuda; fi ;;
    benchmarks)
      if [ "$gpu" != 1 ]; then skip benchmarks "no CUDA device"; continue; fi
      run every_kernel "$PYTHON" benchmarks/every_kernel.py --device cuda
      run benchmark-cg "$PYTHON" benchmarks/cg.py --device cuda --json "$logs/benchmark-cg.json"
      run precision "$PYTHON" benchmarks/precision.py --device cuda --json "$logs/benchmark-precision.json" ;;
    meta_step)
      # Every workload, eager and replayed, beside all peers that are there. JAX must leave memory to the others.
      if [ "$gpu" != 1 ]; then skip meta_step "no CUDA device"; continue; fi
      "$PYTHON" -c 'import jax' 2> /dev/null && peers+=(--jax)
      XLA_PYTHON_CLIENT_PREALLOCATE=false run meta_step "$PYTHON" benchmarks/meta_step.py all --hvp --device cuda \
        "${peers[@]}" --json "$logs/benchmark-meta_step.json" ;;
    scaling)
      if [ "$gpu" != 1 ]; then skip scaling "no CUDA device"; continue; fi
      run scaling "$PYTHON" benchmarks/scaling.py --device cuda --json "$logs/benchmark-scaling.json" ;;
    training)
      # 20,000 meta-steps of 5-way 1-shot with the paper's numbers, which are to take less than five minutes.
      if [ "$gpu" != 1 ]; then skip training "no CUDA device"; continue; fi
      rm -rf "$logs/run"
      run training "$PYTHON" -m imaml_ext train omniglot-5w1s --data glyphs --run.device cuda --run.capture \
        --outer.steps 20000 --run.checkpoint-every 10000 --run-dir "$logs/run" ;;
    omniglot)
      if [ "$gpu" != 1 ]; then skip omniglot "no CUDA device"
      elif [ -z "${IMAML_DATA_ROOT:-}" ]; then skip omniglot "IMAML_DATA_ROOT is not set"
      else run omniglot benchmarks/omniglot_table.sh "$PYTHON" "$logs/omniglot" "$logs/benchmark-omniglot.json"; fi ;;
  esac
done

"$PYTHON" - "$output" "$logs" <<'PYTHON'
import json, os, pathlib, platform, re, subprocess, sys, time
import torch, imaml_ext
from imaml_ext import _build, _native

def say(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except OSError:
        return None

output, logs = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
toolkit = _build.decide_for_torch({**os.environ, "IMAML_EXT_CUDA": "auto"}).toolkit
stamp = {
    "imaml_ext": imaml_ext.__version__,
    "commit": say("git", "rev-parse", "HEAD"),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "nvcc": toolkit and toolkit.version_string,
    "driver": gpu and say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
    "gpu": gpu and f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB",
    "cpu": cpu and cpu[1],
    "compiler": _build.compiler_version(),
    "extension": "does not load" if _native.error else "CUDA" if _native.native().with_cuda else "CPU only",
}
result = {"stamp": stamp, "steps": {}, "benchmarks": {}}
if output.exists():
    earlier = json.loads(output.read_text())
    if {**earlier["stamp"], "extension": 0} == {**stamp, "extension": 0}:
        result = {**earlier, "stamp": stamp}
now = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
for line in (logs / "steps.tsv").read_text().splitlines():
    name, status, seconds, word = line.split("\t")
    result["steps"][name] = {"status": status, "seconds": int(seconds), "last_line": word, "at": now}
for path in sorted(logs.glob("benchmark-*.json")):
    result["benchmarks"][path.stem.removeprefix("benchmark-")] = json.loads(path.read_text())
output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
print(f"{output}: " + ", ".join(f"{name} {step['status']}" for name, step in result["steps"].items()))
PYTHON
[ $? = 0 ] && ! grep -q $'\tfailed' "$logs/steps.tsv"
