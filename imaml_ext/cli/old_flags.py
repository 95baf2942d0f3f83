"""The options as they were called before 0.2: they are understood with a warning, and leave with the next release."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_NAMES = {
    "--data-root": "--data.root",
    "--data.name": "--data",
    "--data.image-size": "--data.pictures.size",
    "--data.split-protocol": "--data.split",
    "--data.ways": "--tasks.ways",
    "--data.shots": "--tasks.shots",
    "--data.train-shots": "--tasks.train-shots",
    "--data.queries": "--tasks.queries",
    "--model.name": "--model",
    "--model.weights": "--theta.weights",
    "--model.feature-scale": "--theta.feature-scale",
    "--inner.lam": "--lam",
    "--inner.cg-steps": "--inner.linear-solver.max-iterations",
    "--meta.algorithm": "--algorithm",
    "--meta.solver": "--linear-solver",
    "--meta.solver-lr": "--linear-solver.lr",
    "--meta.cg-steps": "--linear-solver.max-iterations",
    "--meta.cg-rtol": "--linear-solver.rtol",
    "--meta.damping": "--damping",
    "--meta.curvature": "--curvature",
    "--meta.negative-curvature": "--on-breakdown",
    "--meta.checkpoint-steps": "--checkpoint",
    "--meta.no-checkpoint-steps": "--no-checkpoint",
    "--outer.lam-lr": "--outer.learnt-lr",
}
# Where the value has another name too.
_VALUES = {
    ("--data.greyscale", ""): "--data.pictures.colours grey",
    ("--model.head", "own"): "--theta.no-shared-head",
    ("--model.head", "shared"): "--theta.shared-head",
    ("--inner.solver", "gradient_descent"): "--inner gradient_descent",
    ("--inner.solver", "hessian_free"): "--inner newton_cg",
    ("--inner.proximal", "pullback"): "--inner.proximal after",
    ("--meta.learn-lam", "none"): "--learn",
    ("--meta.learn-lam", "global"): "--learn lam global",
    ("--meta.learn-lam", "layer"): "--learn lam tensor",
    ("--meta.learn-lam", "parameter"): "--learn lam parameter",
}


def renamed(arguments: Sequence[str], *, command: str = "train") -> list[str]:
    """The command line with the new names of its options; each old one is named on stderr."""
    words, result = list(arguments), []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if not equals and words:
            value = words[0]
        if (flag, value) in _VALUES:
            new = _VALUES[flag, value].split()
            words = words if equals else words[1:]
            _warn(f"{flag} {value}", " ".join(new))
        elif flag in _NAMES:
            new = [f"{_NAMES[flag]}{equals}{value if equals else ''}"]
            _warn(flag, _NAMES[flag])
        elif command == "train" and flag == "--checkpoint" and value and not value.startswith("--"):
            # MAML's option of this name has no value.
            new = [f"--from-checkpoint{equals}{value if equals else ''}"]
            _warn(flag, "--from-checkpoint")
        else:
            new = [word]
        result += new
    return result


def _warn(old: str, new: str) -> None:
    print(f"warning: the option {old} is now {new}; the old name goes with the next release", file=sys.stderr)
