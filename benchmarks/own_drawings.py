"""How well published weights tell drawings of one's own apart, and other numbers of classes than they were trained on.

    IMAML_DATA_ROOT=FOLDER python benchmarks/own_drawings.py --json benchmarks/results/own_drawings.json

Both on Omniglot's test characters, of which the folder has to hold `omniglot/omniglot105.npz` and the data set.
`photographs`: 5-way 1-shot tasks of photographs that `python_tests/drawn_photographs.py` makes of the drawings, the
support and two queries per class; every picture is made by itself, and judged alone. `ways`: tasks of other numbers of
classes, with the last layer that `Weights.for_ways` gives. Accuracies with their 95 % intervals; nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_result

from imaml_ext.data import omniglot_split
from imaml_ext.pretrained import load_pretrained, read_images, read_weights, save_weights
from imaml_ext.train import evaluate_pretrained

sys.path.append(str(Path(__file__).parents[1] / "python_tests"))
from drawn_photographs import CONDITIONS, save_photographs

WEIGHTS = ("omniglot-5w1s-newton", "omniglot-5w1s")
WAYS = {"omniglot-5w1s": (2, 3, 4, 6, 10), "omniglot-20w1s-newton": (4, 10)}


def photographs(tasks: int, seed: int) -> list[dict[str, Any]]:
    """Accuracy of each of `WEIGHTS` under every condition; all of them see the same pictures."""
    learners = {name: load_pretrained(name) for name in WEIGHTS}
    labels, rows = torch.arange(5), []
    for condition in CONDITIONS:
        rng, right = np.random.default_rng(seed), {name: [] for name in WEIGHTS}
        for _ in range(tasks):
            characters = rng.choice(omniglot_split()["test"], 5, replace=False).tolist()
            with tempfile.TemporaryDirectory() as folder:
                pictures = save_photographs(Path(folder), characters, [condition], rng, each=3)
                x = torch.stack([read_images(paths, learners[WEIGHTS[0]].reading) for paths in pictures.values()])
            for name, learner in learners.items():
                guess = learner.adapt(x[:, 0], labels).predict(x[:, 1:].flatten(0, 1)).argmax(-1)
                right[name].append((guess == labels.repeat_interleave(2)).double().mean().item())
        row = {"condition": condition, "tasks": tasks}
        for name, each in right.items():
            row[name] = {"accuracy": float(np.mean(each)), "interval": float(1.96 * np.std(each, ddof=1) / tasks**0.5)}
        rows.append(row)
        shown = "   ".join(
            f"{name} {100 * row[name]['accuracy']:.1f} ± {100 * row[name]['interval']:.1f} %" for name in WEIGHTS
        )
        print(f"{condition:<24}{shown}", flush=True)
    return rows


def other_ways(tasks: int) -> list[dict[str, Any]]:
    """Accuracy with the last layer of `Weights.for_ways`, and with the mean of the trained rows for every class."""
    rows = []
    for name, numbers in WAYS.items():
        for ways in numbers:
            row: dict[str, Any] = {"weights": name, "ways": ways, "tasks": tasks}
            for last_layer in ("own rows", "mean"):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"{name}.safetensors"
                    save_weights(path, read_weights(name).for_ways(ways, shared=last_layer == "mean"))
                    found = evaluate_pretrained(path, {"evaluation.tasks": tasks})
                row[last_layer] = {"accuracy": found.accuracy, "interval": found.accuracy_interval}
                print(f"{name}, {ways} ways, {last_layer}: {found}", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20, help="tasks of photographs per condition")
    parser.add_argument("--ways-tasks", type=int, default=300, help="tasks per number of ways")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    body = {"photographs": photographs(options.tasks, options.seed), "ways": other_ways(options.ways_tasks)}
    if options.json is not None:
        packages = ("pillow", "numpy")
        write_result(options.json, script="own_drawings", device=torch.device("cpu"), packages=packages, **body)


if __name__ == "__main__":
    main()
