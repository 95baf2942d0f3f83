"""The examples of examples/ at full size: what each finds, beside its reference, in one result file.

python benchmarks/gallery.py [NAME ...] [--json FILE]

One thread. `hyper_cleaning` has a row of hypertorch where that is installed, and `deblurring` takes photographs where
IMAML_DATA_ROOT has them. `python benchmarks/render.py` makes docs/gallery.md of the result file.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import write_result

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
NAMES = ("hyper_cleaning", "influence", "federated", "penalties", "deblurring")


def measured(name: str, **sizes: Any) -> dict[str, Any]:
    """One entry of the result file: the rows of the example, and the CPU seconds that they took."""
    example = import_module(name)
    begin = time.process_time()
    rows = example.main(**sizes)
    return {"rows": rows, "cpu_seconds": round(time.process_time() - begin, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them if none is given")
    parser.add_argument("--json", type=Path, help="the result file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if find_spec("hypergrad") is None:
        print("hypertorch is not installed: hyper_cleaning has no row of it", file=sys.stderr)
    torch.set_num_threads(1)
    results = {}
    for name in options.names or NAMES:
        results[name] = measured(name)
        print(f"{name}, {results[name]['cpu_seconds']} s of CPU time")
        import_module("common").show(results[name]["rows"])
        sys.stdout.flush()
    if options.json:
        write_result(
            options.json, script="gallery", device=torch.device("cpu"), packages=("hypergrad",), results=results
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
