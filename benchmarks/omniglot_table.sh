#!/usr/bin/env bash
# The eight cells of the paper's Omniglot table, 1,200 / 423 characters, on a GPU; begun again, it goes on where it stopped.
#
#   benchmarks/omniglot_table.sh PYTHON FOLDER RESULTS.json [--knob value …]
#
# 576,000 tasks of 5-way 1-shot by gradient descent from random parameters, with a last layer that the classes share; from
# these, each cell by its own preset, with 16 tasks a meta-step for 2,000 of them, tested on 2,000 tasks. Knobs go to every
# training (to try it without a GPU: --run.device cpu --run.no-capture --outer.steps 2 --evaluation.tasks 2).
set -euo pipefail
python=$1 folder=$2 results=$3
shift 3
mkdir -p "$folder"
train() { # train NAME PRESET KNOB...
  local name=$1; shift
  "$python" -m imaml_ext train "$@" --run-dir "$folder/$name" --resume
}

train start omniglot-5w1s-gd --model.head shared --meta.cg-steps 5 --run.device cuda --run.capture "$@"
"$python" -m imaml_ext export "$folder/start" "$folder/start.safetensors"
for preset in omniglot-{5w1s-gd-longer,5w1s-hf-longer,5w5s-gd,5w5s-hf,20w1s-gd,20w1s-hf-longer,20w5s-gd,20w5s-hf}; do
  # As omniglot-5w1s-hf-longer has it, from whose weights the other presets of Hessian-free begin elsewhere.
  if [[ $preset == *-hf* ]]; then scale=3; else scale=1; fi
  train $preset $preset --model.weights "$folder/start.safetensors" --model.feature-scale $scale --outer.steps 2000 \
    --outer.meta-batch 16 --evaluation.tasks 2000 --run.device cuda --run.capture "$@"
done
"$python" - "$folder" "$results" <<'PYTHON'
import json, pathlib, sys

folder, results = map(pathlib.Path, sys.argv[1:])
found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))}
results.write_text(json.dumps(found, indent=2) + "\n")
for name, result in found.items():
    test = result["test"]
    print(f"{name}: {100 * test['accuracy']:.2f} ± {100 * test['accuracy_interval']:.2f} %")
PYTHON
