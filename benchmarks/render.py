"""docs/benchmarks.md, the picture in it, and docs/gallery.md, from the result files.

python benchmarks/render.py            # writes the two pages and docs/benchmarks.svg
python benchmarks/render.py --check    # exit code 1 where a page is not what the result files say
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

INTRODUCTION = """\
# Benchmarks

`python benchmarks/render.py` makes this page from `benchmarks/results/`. Each section names the command that measures
it again.

All contestants of a table take turns in one process, on the machine that the section names. Every figure is a median
over these rounds, and ratios are medians of the ratios within a round. Nothing is timed before results have been
compared.

## What a meta-step is here

A meta-step adapts every task and takes the query gradient. Conjugate gradients on (H + (λ + δ) I) u = v follow, with a
fixed number of products with the Hessian. The mean of λu and one Adam step end it. Loading of data is left out. The
network is Conv4 with stride 2 on 28×28 images, in float32.

All contestants compute the same meta-gradient from the same θ and the same tasks. They use the algorithm of the paper's
public code: plain gradient steps, then one step of the penalty towards θ, λ = 2, δ = 22. `benchmarks/peers.py` says how
each is called:

| name | what it is |
|---|---|
| imaml_ext | `IMAML` with `Conv4` |
| imaml_ext, nn.Module | `IMAML` with the same network as an `nn.Module`, through `from_module` |
| imaml_ext, replayed | the first, captured once as a CUDA graph |
| grouped conv2d | plain PyTorch: every task is one group of a convolution, H linearised once |
| imaml_dev | the code published with the paper, github.com/aravindr93/imaml_dev; a loop over tasks |
| hypertorch | github.com/prolearner/hypertorch; a loop over tasks |
| TorchOpt | `ImplicitMetaGradientModule` with `solve_cg`; a loop over tasks |
| JAX | the whole meta-step jitted, tasks by `vmap`, H by `jax.linearize` |

"Off by" is the relative distance of the meta-gradient from that of a float64 calculation. It is 1e-4 at most, on tasks
for which it does not hang on the rounding of one activation.

"Of sgemm" is the rate of the arithmetic in convolutions and linear layers, as a share of what a large float32
`torch.mm` reaches in the same rounds. `benchmarks/meta_step.py` counts this arithmetic. The share can be above 100 %:
pixels of the padding are counted and not computed, and the `torch.mm` of some builds does without AVX-512 where a
processor has it.

## On a GPU

One command checks and measures the CUDA kernels:

    benchmarks/gpu_check.sh --prebuilt FOLDER --wheels FOLDER --imaml-dev FOLDER

It needs no network. The steps come in the order of what they settle, so that a visit that is cut short has answered the
first questions. Their times are estimates for an H100 with 16 processor cores, 535 seconds together.

| step | s | what it settles |
|---|--:|---|
| `device` | 5 – 75 | the extension loads and solves a system; the prebuilt one, or one built for this GPU |
| `every_kernel` | 35 | every kernel agrees with the CPU; where not, memcheck of that case follows |
| `tests` | 55 | `pytest -m "cuda and not opcheck"` in eight processes, graph capture included |
| `device_loop` | 10 | a solve that ends on the device, inside a captured CUDA graph |
| `cg` | 35 | five shapes of batch: a step against the rate of a copy, a solve against plain PyTorch |
| `meta_step` | 40 | 32, 1 and 8 tasks, eager, replayed and by grouped convolutions; a product in gradients |
| `profile` | 10 | where the time of a replayed step goes, by kernel and grid; how many launches it is |
| `ncu` | 50 | issue rate, occupancy and sectors per request of 14 launches, in `ncu.csv` |
| `yardsticks` | 15 | the product of layer 2 by `torch.bmm` and by Triton in three TF32 products, with their errors |
| `rivals` | 75 | the meta-step beside imaml_dev, hypertorch, TorchOpt and JAX, as far as they are there |
| `memcheck`, `synccheck`, `racecheck` | 190 | no access out of bounds, no wrong barrier, no race in shared memory |
| `short_training` | 15 | 1,000 captured meta-steps, from the command line to the test |

`training` (20,000 meta-steps), `precision`, `scaling` and `omniglot` (the paper's table) run only if they are named.
`benchmarks/gpu_check.sh cg profile` takes these two steps alone.

- Every step has a limit of its own, and all together have 540 seconds (`gpu_check.sh --budget SECONDS`). What no time
  is left for is recorded as left out.
- `gpu_check.json` is replaced as a whole after every command. A check that is stopped, or killed, leaves all that it
  has measured, and names the step that was under way.
- A later call keeps the results of the steps that it does not take, if hardware, versions and sources are the same.
- `gpu_check.sh --copy FOLDER` keeps three files up to date there: the results, all logs in one, and `ncu.csv`.
- `gpu_check.sh --rehearse` runs every program on the CPU at its smallest size, so that errors show before a GPU is at
  hand.

Put `gpu_check.json` into `benchmarks/results/`, under a name that begins with `gpu_check`, and `benchmarks/render.py`
adds its tables to this page.
"""

NOT_YET = "\nIt is not there yet: no figure on this page comes from a GPU.\n"

NOT_RUN = "Nothing has run on a GPU yet: every time that these pages give for a GPU is an estimate.\n\n"

KERNELS_INTRODUCTION = """\
## What nvcc makes of the kernels

{not_run}What the compiler makes of the kernels can be read without a GPU: `benchmarks/kernel_report.py` counts it in
the machine code.

Before is commit {before[commit]}; after is {after[commit]}. A + says that files differed from the commit. Both are
compiled by nvcc {after[nvcc]} for {after[architecture]}:

    IMAML_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 pip install --no-build-isolation -e .
    python benchmarks/kernel_report.py --json benchmarks/results/kernel_report.json

For `kernel_report_before.json`, check out the commit before, copy today's `kernel_report.py` into its `benchmarks/`,
and run the same two commands there. `kernel_report.py --compare FILE` shows every kernel and more columns.

| column | what it counts |
|---|---|
| registers | registers of a thread |
| shared | bytes of static shared memory; **dynamic shared memory is not in this column** |
| blocks | how many blocks fit on a multiprocessor by registers and static shared memory |
| 16 bytes | instructions that store 16 bytes at once to global memory |
| ≤ 4 bytes, 8 bytes | places that store 16 bytes in a row in pieces of this size |
| stack | bytes of stack per thread; registers are spilled where it is not 0 |

Instructions are counted as they stand in the code, not as they are executed. Products and norms are those of float32,
where no other type is named. Rows are those of one task in the result; the layer has more than 32 channels.
"""

KERNELS_READING = """\
- The buffers of products are dynamic shared memory now, and were static. A block takes at most 60 KB of both kinds.
- A CG step takes up to 110 KiB of dynamic shared memory, so that two blocks fit. A row that needs more takes up to
  227 KiB, and one block fits. `CUDA_ON_CPU_REPORT` lists the blocks that fit with both kinds
  ([building.md](building.md#cuda-kernels-without-a-gpu)).
- The transposed and the outer product of a layer were two kernels, and are one. Both lines show that one.
- From 512 rows on, a block of a product has 128 threads; before it had 256.
- A norm keeps up to 32 numbers per thread in registers, which costs the second block. Norms of at most 256 rows have
  kernels of their own, with 64 to 118 registers.
- The pieces of 8 bytes in CG kernels are stores of a row's state and sums by one thread.
- CG begin and CG step in float16 and bfloat16 spill registers now; before they did not. `kernel_report.py --check`
  allows 64 bytes per thread there, and none elsewhere. In float32, rows that are not aligned spilled before, and do not
  now.
"""

LAUNCHES_INTRODUCTION = """\
### Launches

A meta-step here is 16 inner steps and 5 CG steps with `Conv4` on images of Omniglot's size, 5-way 1-shot. Its launches
do not depend on the number of tasks. Two tests count those of the package's own kernels, which the CPU runs, and fail
where there are more than today:

    pytest --native build/cmake/cpp_tests/cuda_on_cpu/_C.so python_tests/test_emulated.py python_tests/test_launches.py

Of the kernels before, `python_tests/test_emulated.py` of commit 59e996e counts 649. The 28 of an inner step come from
reading the code. The same reading gave about 700 for a meta-step, 50 of torch's among them.
"""

KERNEL_REPORTS = ("kernel_report_before.json", "kernel_report.json")

# Kernels before and after by what they do. A tile is named as in csrc/network/cuda/products.cuh.
_BACK_OF_MANY = "back_kernel<Tile<float, 128, 32, 8, 4, 1, 3>, Tile<float, 64, 64, 8, 4, 1, 3>>"
_BACK_OF_SOME = "back_kernel<Tile<float, 64, 64, 8, 4, 2, 3>, Tile<float, 64, 64, 8, 4, 2, 3>>"
_SMALL_BEFORE = "product_kernel<Tile<float, 32, 32, 4, 4, 4>, {}>"
_LARGE_BEFORE = "product_kernel<Tile<float, 128, 64, 8, 4, 1>, {}>"
KERNELS = {
    "CG step, float32": ("step_kernel<float, 4, true>", "row_kernel<CgStep<float>>"),
    "CG step, float64": ("step_kernel<double, 2, true>", "row_kernel<CgStep<double>>"),
    "CG step, float16": ("step_kernel<c10::Half, 8, true>", "row_kernel<CgStep<c10::Half>>"),
    "CG begin, float32": ("begin_kernel<float, 4>", "row_kernel<CgBegin<float>>"),
    "CG begin, float64": ("begin_kernel<double, 2>", "row_kernel<CgBegin<double>>"),
    "CG begin, float16": ("begin_kernel<c10::Half, 8>", "row_kernel<CgBegin<c10::Half>>"),
    "CG direction, float32": ("direction_kernel<float, 4>", "row_kernel<CgDirection<float>>"),
    "CG direction, float64": ("direction_kernel<double, 2>", "row_kernel<CgDirection<double>>"),
    "CG direction, float16": ("direction_kernel<c10::Half, 8>", "row_kernel<CgDirection<c10::Half>>"),
    "product, up to 32 rows": (_SMALL_BEFORE.format("false"), "product_kernel<Tile<float, 32, 16, 4, 4, 8, 2>>"),
    "product, 33 to 128 rows": (_SMALL_BEFORE.format("false"), "product_kernel<Tile<float, 128, 16, 4, 4, 2, 3>>"),
    "product, 129 to 511 rows": (_SMALL_BEFORE.format("false"), "product_kernel<Tile<float, 64, 64, 8, 4, 2, 3>>"),
    "product, from 512 rows on": (_LARGE_BEFORE.format("false"), "product_kernel<Tile<float, 128, 32, 8, 4, 1, 3>>"),
    "product in float64, 33 to 511 rows": (
        "product_kernel<Tile<double, 32, 32, 4, 4, 4>, false>",
        "product_kernel<Tile<double, 64, 32, 4, 4, 2, 3>>",
    ),
    "transposed product, 129 to 511 rows": (_SMALL_BEFORE.format("true"), _BACK_OF_SOME),
    "transposed product, from 512 rows on": (_LARGE_BEFORE.format("true"), _BACK_OF_MANY),
    "outer product, 129 to 511 rows": ("outer_kernel<Tile<float, 64, 64, 4, 4, 1>>", _BACK_OF_SOME),
    "outer product, from 512 rows on": ("outer_kernel<Tile<float, 64, 64, 4, 4, 1>>", _BACK_OF_MANY),
    "norm, forward": ("norm_kernel<float>", "norm_kernel<float, (NormWay)1, 32>"),
    "norm, tangent": ("norm_tangent_kernel<float>", "norm_kernel<float, (NormWay)2, 32>"),
    "norm, backward": ("norm_backward_kernel<float>", "norm_kernel<float, (NormWay)3, 32>"),
    "norm, second derivative": ("norm_second_kernel<float>", "norm_kernel<float, (NormWay)4, 32>"),
}

# Launches before and after; those after are the bounds of two tests.
LAUNCHES = {
    "a meta-step, the package's own kernels": (649, 355),
    "an inner step": (28, 15),
}


GALLERY_INTRODUCTION = """\
# Gallery

Five uses of `imaml_ext.argmin` ([bilevel.md](bilevel.md#any-hyperparameter)). Each is a script of at most 100 lines in
`examples/`, whose first lines state the problem and its source. Each compares itself with a named reference in the same
run, on the same data:

    python examples/hyper_cleaning.py

`main(…)` of a script takes its size; the tests run all of them at small sizes. Two commands make this page again:

    python benchmarks/gallery.py --json benchmarks/results/gallery.json
    python benchmarks/render.py

hypertorch is not on PyPI, where another package has its name. Without it, its row is missing:

    pip install git+https://github.com/prolearner/hypertorch@6241dfafcf37ddaf14e152ba5e5a3aa7165396d3

"""

GALLERY = {
    "hyper_cleaning": (
        "Wrong labels, found by learnt weights of examples",
        "Half of the training labels are drawn at random. A weight per example is learnt on a few clean images, and "
        "labels of small weight are called wrong. AUC is the area under the ROC curve of that. 60 classes, and eight "
        "draws of the noise.\n\n"
        "- `argmin` and hypertorch find the same weights, by the same outer steps.\n"
        "- The weights rank wrong labels better than the loss after plain training, and give a better classifier.\n"
        "- They are **not** the best here. A classifier that was trained on the clean images alone is better, and its "
        "loss ranks the labels better. Four clean images tell a class of these built-in glyphs well.\n",
    ),
    "influence": (
        "The influence of every training image on a test loss",
        "A CNN of about 1,900 parameters, and 20 test images. The table has the rank correlation over the training "
        "images with the exact inverse of the Hessian in float64, the mean and the least of the test images. The last "
        "column is the relative distance.\n",
    ),
    "federated": (
        "Personalised federated learning by pFedMe",
        "100 clients, and 100 rounds of which each takes the models of ten. Accuracy on the clients' own test "
        "examples.\n\n"
        "- The settings are those of the command that the authors published for such data, with 100 rounds in place of "
        "600. Their clients can be larger: here none has more than 1,250 examples.\n"
        "- FedAvg is the reference as published. If each client takes 20 more steps from its model, that is **better** "
        "than pFedMe on these data.\n",
    ),
    "penalties": (
        "A penalty per parameter",
        "Ten data sets of 200 examples and 40 features, ten of which matter. Losses are means over the data sets.\n\n"
        "- The learnt penalties need fewer fits, although they are 40 and the grid has one.\n"
        "- 40 penalties adapt to the validation folds, so that the validation loss promises more than the test loss "
        "keeps. With 100 examples in place of 200, logistic regression is **worse** than the grid search on new ones, "
        "and the more so the more outer steps are taken.\n",
    ),
    "deblurring": (
        "Deblurring with a learnt penalty per filter",
        "24 training and 24 test images, blurred by motion over seven pixels, with noise of standard deviation 0.01. "
        "Peak signal-to-noise ratios in dB, the means over the images. The gain over a well tuned single λ is small, "
        "and no less on images that were not trained on.\n",
    ),
}

MATRICES = {"gauss_newton": "Gauss-Newton", "hessian": "Hessian"}


def render() -> str:
    """The document."""
    has_run = (RESULTS / "gpu_check.json").exists()
    before, after = (json.loads((RESULTS / name).read_text()) for name in KERNEL_REPORTS)
    parts = [INTRODUCTION + (_checks() if has_run else NOT_YET), _kernels(before, after, has_run=has_run)]
    for name, result in _results():
        parts.append(_SECTIONS[name](result))
    return "\n".join(parts)


def _checks() -> str:
    """How each step of each check on a GPU has ended; the logs are beside the results."""
    parts = []
    for path in sorted(RESULTS.glob("gpu_check*.json")):
        check = json.loads(path.read_text())
        stamp = check["stamp"]
        rows = [[f"`{name}`", step["status"], f"{step['seconds']:.0f}"] for name, step in check["steps"].items()]
        where = f"{stamp['gpu']}, torch {stamp['torch']}, driver {stamp['driver']}"
        parts.append(
            f"\n`{path.name}`: {where}. Sources {stamp['sources']}.\n\n" + _table(["step", "ended", "s"], rows)
        )
    return "".join(parts)


def _results() -> Iterator[tuple[str, dict[str, Any]]]:
    """CPU first, then what a GPU machine measured in benchmarks/gpu_check.sh."""
    for name in _SECTIONS:
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            yield name, json.loads(path.read_text())
    for path in sorted(RESULTS.glob("gpu_check*.json")):
        measured = json.loads(path.read_text())["benchmarks"]
        yield from ((name, measured[key]) for name in _SECTIONS for key in measured if key.partition("-")[0] == name)


def _heading(title: str, result: dict[str, Any]) -> str:
    stamp = result["stamp"]
    with_instructions = f" ({stamp['instructions']})" if stamp.get("instructions") else ""
    where = stamp.get("gpu") or f"{stamp['cpu']}{with_instructions}, {stamp['threads']} threads"
    versions = ", ".join(
        f"{name} {stamp[name]}"
        for name in ("torch", "torchopt", "jax", "linear_operator", "pillow", "cuda")
        if stamp.get(name)
    )
    return f"## {title}: {where}\n\n`{result['command']}`\n\n{versions}, Python {stamp['python']}.\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _ms(row: dict[str, Any]) -> list[str]:
    digits = 1 if row["median_ms"] >= 10 else 2 if row["median_ms"] >= 1 else 3
    return [f"{row['median_ms']:,.{digits}f}", f"{row['min_ms']:,.{digits}f} – {row['max_ms']:,.{digits}f}"]


def _words(w: dict[str, Any]) -> str:
    return (
        f"{w['ways']}-way {w['shots']}-shot, {w['queries']} {'query' if w['queries'] == 1 else 'queries'} per class, "
        f"{w['tasks']} {'task' if w['tasks'] == 1 else 'tasks'}, {w['inner_steps']} inner steps, "
        f"{w['cg_steps']} CG steps, {w['filters']} filters"
    )


def _not_timed(result: dict[str, Any]) -> list[str]:
    return [f"Not timed: {name} ({what}).\n" for name, what in result.get("wrong", {}).items()]


def _mib(row: dict[str, Any]) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"


def _kernels(before: dict[str, Any], after: dict[str, Any], *, has_run: bool) -> str:
    """What nvcc makes of the kernels, by two reports of benchmarks/kernel_report.py."""

    def change(old: int, new: int) -> str:
        return f"{old:,}" if old == new else f"{old:,} → {new:,}"

    def changes(old: list[int], new: list[int]) -> list[str]:
        return [change(*pair) for pair in zip(old, new, strict=True)]

    def pieces(kernel: dict[str, Any], *, wide: bool) -> int:
        return sum(count for size, count in kernel["in_pieces"].items() if (int(size) == 8) == wide)

    def columns(kernel: dict[str, Any]) -> list[int]:
        stores = [kernel["stores"].get("16", 0), pieces(kernel, wide=False), pieces(kernel, wide=True)]
        return [*(kernel[key] for key in ("registers", "shared", "blocks")), *stores, kernel["stack"]]

    def totals(report: dict[str, Any]) -> list[int]:
        kernels = report["kernels"].values()
        spilled = sum(kernel["stack"] > 0 for kernel in kernels)
        return [len(kernels), spilled, sum(pieces(kernel, wide=False) > 0 for kernel in kernels)]

    rows = [
        [what, *changes(columns(before["kernels"][old]), columns(after["kernels"][new]))]
        for what, (old, new) in KERNELS.items()
    ]
    named = ("kernels", "that spill", "that store in pieces of 4 bytes or less")
    counts = zip(named, changes(totals(before), totals(after)), strict=True)
    return "\n".join(
        [
            KERNELS_INTRODUCTION.format(
                not_run="" if has_run else NOT_RUN, before=before["stamp"], after=after["stamp"]
            ),
            _table(["", "registers", "shared", "blocks", "16 bytes", "≤ 4 bytes", "8 bytes", "stack"], rows),
            KERNELS_READING,
            _table(["in all", "before → after"], [list(count) for count in counts]),
            LAUNCHES_INTRODUCTION,
            _table(["launches", "before → after"], [[what, change(*pair)] for what, pair in LAUNCHES.items()]),
        ]
    )


def _meta_step(result: dict[str, Any]) -> str:
    parts = [_heading("Meta-step", result)]
    for name, why in result["left_out"].items():
        parts.append(f"Left out: {name} ({why}).\n")
    for run in result["runs"]:
        machine = run["machine"]
        gpu = any(row["peak_bytes"] is not None for row in run["results"].values())
        parts.append(
            f"### {run['name']}\n\n{_words(run['workload'])}; {run['data']}. {run['flop'] / 1e9:.1f} GFLOP; "
            f"`torch.mm` {machine['sgemm_gflops']:,.0f} GFLOP/s, "
            f"copy {machine['copy_gbytes']:,.0f} GB/s.\n"
        )
        header = ["", "median ms", "min – max", "÷ imaml_ext", "of sgemm", "off by"] + ["peak MiB"] * gpu
        rows = []
        for contestant, row in run["results"].items():
            cells = [contestant, *_ms(row), f"{row['ratio_to_ours']:.2f}", f"{row['share_of_sgemm']:.0%}"]
            rows.append([*cells, f"{row['distance_from_float64']:.1e}"] + [_mib(row)] * gpu)
        parts.append(_table(header, rows))
        parts += _not_timed(run)
        if "product" in run:
            rows = [[what, *_ms(row), f"{row['ratio_to_gradient']:.2f}"] for what, row in run["product"].items()]
            parts.append("On the support sets of these tasks, by imaml_ext:\n")
            parts.append(_table(["", "median ms", "min – max", "÷ gradient"], rows))
    return "\n".join(parts)


def _scaling(result: dict[str, Any]) -> str:
    parts = [
        _heading("Scaling", result),
        f"One number varied, the others as in: {_words(result['base'])}; {result['data']}.\n",
    ]
    if "gpu" not in result["stamp"] and result["axes"]:
        parts.append("![Time of a meta-step over each axis](benchmarks.svg)\n")
    for axis, measured in result["axes"].items():
        rows = [
            [str(p["value"]), f"{p['parameters']:,}", f"{p['flop'] / 1e9:.2f}", *_ms(p), f"{p['share_of_sgemm']:.0%}"]
            for p in measured["points"]
        ]
        title = axis.replace("_", " ")
        parts.append(_table([title, "parameters", "GFLOP", "median ms", "min – max", "of sgemm"], rows))
        if "deviation_from_linear" in measured:
            most = measured["points"][-1]["value"]
            parts.append(
                f"From 4 tasks on, the time per task is within {measured['deviation_from_linear']:.1%} of that at "
                f"{most}."
                "\n"
            )
    if "training" in result:
        t = result["training"]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in t["shares"].items())
        parts.append(
            f"Training `{t.get('recipe') or t['preset']}` for {t['steps']} meta-steps: {t['outside']:.1%} of the time "
            f"outside the meta-step ({shares}).\n"
        )
    return "\n".join(parts)


def _cg(result: dict[str, Any]) -> str:
    s = result["systems"]
    rows = [
        [
            name,
            *_ms(row),
            f"{row['ratio_to_ours']:.2f}",
            "" if (e := row["largest_relative_error"]) is None else f"{e:.1e}",
        ]
        for name, row in result["results"].items()
    ]
    return "\n".join(
        [
            _heading("Conjugate gradients", result),
            f"{s['rows']} systems of {s['cols']:,} unknowns, {s['iterations']} iterations, {result['dtype']}, a "
            "diagonal operator; the error is the largest of a system after these iterations.\n",
            _table(["", "median ms", "min – max", f"÷ {result['best_of_ours']}", "error"], rows),
            *(
                f"{name} and its callback move {bound['words_moved_per_unknown']} words per unknown: "
                f"{bound['ms_at_copy_speed']:.1f} ms at the speed of a copy, {result['copy_gb_per_s']:.1f} GB/s.\n"
                for name, bound in result["bounds"].items()
            ),
            *_not_timed(result),
            *_cg_step(result),
        ]
    )


def _cg_step(result: dict[str, Any]) -> Iterator[str]:
    if (step := result.get("step")) is not None:
        yield (
            f"A step alone, without its callback, moves {step['words_moved_per_unknown']} words per unknown in "
            f"{step['median_ms']:.3f} ms: {step['share_of_copy_rate']:.0%} of the rate of a copy.\n"
        )


def _profile_step(result: dict[str, Any]) -> str:
    parts = [_heading("Where the time of a meta-step goes", result)]
    for way, measured in result["results"].items():
        rows = [
            [row["name"][:80].replace("|", "\\|"), row["grid"], str(row["count"]), f"{row['total_us']:,.1f}"]
            for row in measured["by_kernel"][:20]
        ]
        parts.append(
            f"{_words(result['workload'])}; {way}: {measured['launches']} launches, {measured['busy_us'] / 1e3:.3f} ms "
            f"of a span of {measured['span_us'] / 1e3:.3f} ms.\n"
        )
        parts.append(_table(["kernel", "grid", "launches", "µs together"], rows))
    return "\n".join(parts)


def _yardsticks(result: dict[str, Any]) -> str:
    product = result["product"]
    sizes = "[{tasks}, {rows}, {inner}] × [{tasks}, {inner}, {cols}]".format(**product)
    rows = [
        [name, *_ms(row), f"{row['tflops']:.2f}", f"{row['relative_error']:.1e}"]
        for name, row in result["results"].items()
    ]
    return "\n".join(
        [
            _heading("The products of layer 2 by others", result),
            f"{sizes}, {product['flop'] / 1e9:.3f} GFLOP.\n",
            _table(["", "median ms", "min – max", "TFLOP/s", "error"], rows),
        ]
    )


def _precision(result: dict[str, Any]) -> str:
    rows = [
        [f"{run['theta']}, {MATRICES[run['curvature']]}", precision, *(f"{value:.1e}" for value in row.values())]
        for run in result["runs"]
        for precision, row in run["results"].items()
    ]
    return "\n".join(
        [
            _heading("Precision of the products", result),
            f"{result['tasks']} tasks of glyphs, {result['inner_steps']} inner steps, {result['cg_steps']} CG steps, "
            f"{result['filters']} filters. Relative distances from float64, the median over tasks.\n",
            _table(["", "products in", "support gradient at θ", "meta-gradient", "its mean over the tasks"], rows),
        ]
    )


def _precondition(result: dict[str, Any]) -> str:
    spectra = []
    for row in result["decaying"]:
        plain, nystrom = (f"{row[name]['median_total']:g}" for name in ("plain", "nystrom"))
        spectra.append([f"`{row['eigenvalues']}`", plain, f"{row['rank']}", nystrom, f"{row['part_of_plain']:.2f}"])
    size, shift = (result["decaying"][0][name] for name in ("size", "shift"))
    parts = [
        _heading("Products with the matrix, preconditioned", result),
        "Counts of products per system, the set-up and the product that measures included; nothing is timed.\n",
        f"**Spectra that decay**: {size} unknowns, condition number {1 / shift:.0e}, relative residual 1e-06.\n",
        _table(["eigenvalues", "plain", "rank of Nyström", "Nyström", "part of plain"], spectra),
    ]
    for weights in result.get("conv4", ()):
        names = list(weights["systems"][0]["results"])
        rows = [
            [
                f"{MATRICES[s['curvature']]}, λ = {s['lam']:g}, δ = {s['damping']:g}",
                _ended(s["results"]["plain"]),
            ]
            + [f"{s['results'][name]['mean_total']:g} ({s['results'][name]['mean_solve']:g})" for name in names]
            for s in weights["systems"]
        ]
        tasks = weights["systems"][0]["tasks"]
        parts.append(
            f"**`{weights['weights']}`**: implicit systems of {tasks} tasks after {weights['inner_steps']} inner "
            f"steps, relative residual {weights['rtol']:.0e}. Means over the tasks, in brackets those of the solves "
            "without set-up. A preconditioner that is kept was made for the first task, and served the others too.\n"
        )
        parts.append(_table(["", "converged", *names], rows))
    return "\n".join(parts)


def _ended(row: dict[str, Any]) -> str:
    return f"{row['ended'].get('CONVERGED', 0)} of {sum(row['ended'].values())}"


def _compiled_module(result: dict[str, Any]) -> str:
    rows = [
        [f"{what}, {name}", *_ms(row), f"{row['ratio_to_ours']:.2f}"]
        for what, measured in result["results"].items()
        for name, row in measured.items()
    ]
    return "\n".join(
        [
            _heading("An nn.Module, compiled", result),
            f"{result['tasks']} tasks of 5 images, {result['filters']} filters. Products "
            "forward over reverse compute the gradient and its derivative anew for every vector.\n",
            _table(["", "median ms", "min – max", "÷ imaml_ext"], rows),
        ]
    )


def _modules(result: dict[str, Any]) -> str:
    names = {"conv4": "Conv4", "resnet12-quarter": "ResNet-12, a quarter as wide", "resnet12": "ResNet-12"}
    header = ["network", "by", "seconds", "of the loop", "of native", "MiB", "rounds"]
    rows = [
        [
            names[network],
            name,
            f"{row['median_s']:.4g}",
            f"{row['ratio_to_loop']:.2f}",
            f"{row['ratio_to_native']:.2f}" if "ratio_to_native" in row else "",
            str(row["peak_mib"]),
            str(row["rounds"]),
        ]
        for network, found in result["results"].items()
        for name, row in found.items()
    ]
    text = (
        "A meta-gradient of 8 tasks by an nn.Module, 5-way 1-shot, float32, CPU time on one thread. Conv4 takes 5 "
        "inner steps and 5 products on 28 × 28 pixels, ResNet-12 one of each on 84 × 84. `loop` is the loop over tasks "
        "that one would write with `torch.func.functional_call`, `vmap` torch's vmap; `handlers` are our convolutions "
        "and batch norms in either. `one by one` has `tasks_per_chunk=1`. MiB are the peak beyond what was held "
        "before.\n"
    )
    return "\n".join([_heading("Any nn.Module", result), text, _table(header, rows)])


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f}"


def _own_drawings(result: dict[str, Any]) -> str:
    photographs, ways = result["photographs"], result["ways"]
    names = [name for name in photographs[0] if name not in ("condition", "tasks")]
    rows = [[row["condition"], *(_percent(row[name]) for name in names)] for row in photographs]
    others = [[row["weights"], str(row["ways"]), _percent(row["own rows"]), _percent(row["mean"])] for row in ways]
    return "\n".join(
        [
            _heading("Drawings of your own", result),
            "Accuracy in per cent, with the 95 % interval, on test characters of Omniglot. First 5-way 1-shot tasks of "
            f"photographs that `python_tests/drawn_photographs.py` makes, {photographs[0]['tasks']} tasks per "
            "condition; every picture is judged alone beside the examples.\n",
            _table(["condition", *names], rows),
            f"Then {ways[0]['tasks']} tasks per number of ways, five queries per class judged together. The last "
            "layer is that of `Weights.for_ways`, or has the mean of the trained rows for every class.\n",
            _table(["weights", "ways", "for_ways", "mean"], others),
        ]
    )


def _two_versions(result: dict[str, Any]) -> str:
    rows, commits = [], result["commits"]
    for name, row in result["results"].items():
        before, after, ratio = row["other"]["median_ms"], row["this"]["median_ms"], row["ratio"]
        spread = f"{ratio['min']:.3f} – {ratio['max']:.3f}"
        rows.append([name, f"{before:,.1f}", f"{after:,.1f}", f"{ratio['median']:.3f}", spread])
    return "\n".join(
        [
            _heading("A meta-step before and after a change", result),
            f"Before is commit {commits['other']}, after is {commits['this']}. They take turns, as processes. "
            "A time is the shortest of the rounds of a process; the median over the processes is shown.\n",
            _table(["", "before, ms", "after, ms", "after ÷ before", "min – max"], rows),
        ]
    )


def _integrations(result: dict[str, Any]) -> str:
    rows, texts = [], []
    for name, row in result["results"].items():
        theirs, ours, ratio = row["library"], row["ours"], row["ours_to_library"]
        seconds = [f"{theirs['median_s']:.3f}", f"{ours['median_s']:.3f}"]
        spread = [f"{ratio['median']:.2f}", f"{ratio['min']:.2f} – {ratio['max']:.2f}"]
        products = [f"{theirs['products']:,}", f"{ours['products']:,}"]
        rows.append([name, *seconds, *spread, *products, f"{row['difference']:.0e}"])
        versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
        before, after = row["change"]
        texts.append(f"**{name}** ({versions}). {row['example']}\n\n    - {before}\n    + {after}\n\n{row['reason']}\n")
    header = ["example", "library, s", "ours, s", "ours ÷ library", "min – max", "products", "ours", "apart by"]
    return "\n".join(
        [
            _heading("Other libraries with our solvers", result),
            "CPU time inside the solves, of one thread, with the products. Products are of the matrix with one vector. "
            "Results are apart by the largest difference, relative to the largest entry.\n",
            _table(header, rows),
            *texts,
        ]
    )


def _many_right_hand_sides(result: dict[str, Any]) -> str:
    matrices = {"gauss_newton": "Gauss-Newton", "hessian": "Hessian"}
    rows = [
        [
            f"{row['threads']}",
            f"{matrices[row['kind']]}, λ = {row['lam']:g}",
            name if name != "with Nystrom" else f"with Nyström of rank {row['rank']}",
            f"{way['cpu_ms']:,.0f}",
            f"{way['fraction']:.2f}",
            f"{way['products']:.1f}",
        ]
        for row in result["rows"]
        for name, way in row["ways"].items()
    ]
    return "\n".join(
        [
            _heading("Many right-hand sides on one curvature matrix", result),
            f"{result['rows'][0]['columns']} right-hand sides on the matrix of one Omniglot task for Conv4, to a "
            f"relative residual of {result['rtol']:g}, every one of which is measured. CPU time, the median of the "
            "rounds, and products per right-hand side, set-up included.\n",
            _table(["threads", "matrix", "way", "CPU ms", "÷ one by one", "products"], rows),
        ]
    )


_SECTIONS = {
    "meta_step": _meta_step,
    "two_versions": _two_versions,
    "scaling": _scaling,
    "cg": _cg,
    "profile_step": _profile_step,
    "yardsticks": _yardsticks,
    "precision": _precision,
    "precondition": _precondition,
    "compiled_module": _compiled_module,
    "modules": _modules,
    "own_drawings": _own_drawings,
    "many_right_hand_sides": _many_right_hand_sides,
    "integrations": _integrations,
}


def gallery() -> str:
    """The page of the examples."""
    result = json.loads((RESULTS / "gallery.json").read_text())
    seconds = sum(found["cpu_seconds"] for found in result["results"].values())
    parts = [
        GALLERY_INTRODUCTION + _heading("What was found", result),
        f"One thread, {seconds:,.0f} seconds of CPU time together.\n",
    ]
    for name, found in result["results"].items():
        title, text = GALLERY[name]
        figures = list(next(iter(found["rows"].values())))
        rows = [[who, *(f"{row[figure]:.4g}" for figure in figures)] for who, row in found["rows"].items()]
        parts += [
            f"### {title}\n",
            f"[`examples/{name}.py`](../examples/{name}.py), {found['cpu_seconds']:.0f} seconds.\n",
            _table(["", *figures], rows),
            text,
        ]
    return "\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """Time over each axis, both logarithmic, beside a line of slope 1 through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "imaml_ext"  # the same bytes for the same figures
    from matplotlib import pyplot

    axes = result["axes"]
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure, plots = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows), layout="constrained", squeeze=False
    )
    for plot in plots.flat[len(axes) :]:
        plot.axis("off")
    for plot, (axis, measured) in zip(plots.flat, axes.items(), strict=False):
        points = measured["points"]
        x, y = [p["value"] for p in points], [p["median_ms"] for p in points]
        spread = [[p["median_ms"] - p["min_ms"] for p in points], [p["max_ms"] - p["median_ms"] for p in points]]
        plot.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=2)
        plot.plot(x, [y[-1] * v / x[-1] for v in x], ":", color="grey", label="proportional")
        plot.set(xscale="log", yscale="log", xlabel=axis.replace("_", " "), ylabel="ms per meta-step")
        plot.set_xticks(x, [str(v) for v in x])
        plot.minorticks_off()
    plots.flat[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    pages = {"benchmarks.md": render(), "gallery.md": gallery()}
    paths = {ROOT / "docs" / name: page for name, page in pages.items()}
    if options.check:
        return int(not all(path.exists() and path.read_text() == page for path, page in paths.items()))
    for path, page in paths.items():
        path.write_text(page)
    scaling = RESULTS / "scaling.json"
    if scaling.exists():
        draw(json.loads(scaling.read_text()), ROOT / "docs" / "benchmarks.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
