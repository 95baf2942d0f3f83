#!/usr/bin/env bash
# The eight cells of the paper's Omniglot table, 1,200 / 423 characters, on a GPU; begun again, it goes on where it stopped.
#
#   benchmarks/omniglot_table.sh PYTHON FOLDER RESULTS.json [--setting value …]
#
# 576,000 tasks of 5-way 1-shot by gradient descent from random parameters, with a last layer that the classes share; from
# these, each cell by its own recipe, with 16 tasks per meta-step for 2,000 of them, tested on 2,000 tasks. Settings go to every
# training (to try it without a GPU: --run.device cpu --run.no-capture --outer.steps 2 --evaluation.tasks 2).
set -euo pipefail
python=$1 folder=$2 results=$3
shift 3
mkdir -p "$folder"
train() { # train NAME RECIPE SETTING...
  local name=$1; shift
  "$python" -m imaml_ext train "$@" --run-dir "$folder/$name" --resume
}

train start omniglot-5w1s-gd --theta.shared-head --linear-solver.max-iterations 5 --run.device cuda --run.capture "$@"
"$python" -m imaml_ext export "$folder/start" "$folder/start.safetensors"
for recipe in omniglot-{5w1s-gd-longer,5w1s-hf-longer,5w5s-gd,5w5s-hf,20w1s-gd,20w1s-hf-longer,20w5s-gd,20w5s-hf}; do
  # As omniglot-5w1s-hf-longer has it, from whose weights the other recipes with NewtonCG begin elsewhere.
  if [[ $recipe == *-hf* ]]; then scale=3; else scale=1; fi
  train $recipe $recipe --theta.weights "$folder/start.safetensors" --theta.feature-scale $scale --outer.steps 2000 \
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
