"""The paper's Omniglot table: every algorithm by its recipe, in the paper's protocol and in another, beside what is
published.

A cell of iMAML is the recipe of that name, omniglot-5w1s and so on; the others are settings of this module. A cell that
is trained leaves a result file, SPLIT/COLUMN/ALGORITHM.json, and its weights. The table is drawn from the result files
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imaml_ext.data import Glyphs
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import Reptile
from imaml_ext.progress import say
from imaml_ext.reproduction.cells import chosen_cells
from imaml_ext.reproduction.equal_budget import algorithm_changes
from imaml_ext.reproduction.figures import LABELS, accuracies_beside_published
from imaml_ext.reproduction.options import ALGORITHMS, OmniglotTable
from imaml_ext.reproduction.paper import COLUMNS, PUBLISHED, paper_settings, size_of
from imaml_ext.reproduction.results import markdown_table, output_folder, read_json, write_results
from imaml_ext.settings import changed
from imaml_ext.train.config import Outer
from imaml_ext.train.evaluation import evaluate_run
from imaml_ext.train.experiment import resolve_device
from imaml_ext.train.export import export_run, without_folders
from imaml_ext.train.recipe import Recipe, load_recipe
from imaml_ext.train.reports import write_figure
from imaml_ext.train.run_directory import RunDirectory, explained, read_metrics, stage_summary
from imaml_ext.train.stages import take_finished_stages, train_recipe

SPLITS = {"1200/423": "1200-423", "vinyals": "vinyals"}  # and their folders
_NAMES = {"1200/423": "1,200 / 423 characters", "vinyals": "Vinyals' split"}

# How the same parameters are judged, beside the paper's protocol, which the test of a run has: distinct characters, as
# many queries per class as shots, all of them in one batch.
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "five": (
        "every orientation a class, five queries per class in one batch",
        {"changes": {"data.orientations": "classes", "tasks.queries": 5}},
    ),
    "alone": ("as in the paper, but each query alone beside the support set", {"transductive": False}),
}
_PAPER = "the paper's: distinct characters, as many queries as shots, in one batch"

# Networks of four convolutions, best figures first; each as its own authors have it, on random splits of their own.
OTHERS: dict[str, tuple[str, dict[str, float]]] = {
    "MAML++": (
        "Antoniou, Edwards, Storkey, ICLR 2019",
        {"5w1s": 99.47, "5w5s": 99.93, "20w1s": 97.65, "20w5s": 99.33},
    ),
    "Prototypical Networks, Vinyals' split": (
        "Snell, Swersky, Zemel, NeurIPS 2017",
        {"5w1s": 98.8, "5w5s": 99.7, "20w1s": 96.0, "20w5s": 98.9},
    ),
}


# Reptile's public code has, for transductive tests of 5 ways and 1 shot, an inner rate of 0.001, 10 tasks per meta-step
# and 100,000 meta-steps. Larger inner steps and smaller meta-batches learn faster: docs/reproduction/README.md.
_REPTILE: dict[str, Any] = {
    "algorithm": Reptile(
        inner=GradientDescent(3, lr=4e-3, optimizer="adam", betas=(0.0, 0.999), batch_size=25), keep_moments=True
    ),
    "tasks.train_shots": 15,
    "tasks.train_queries": 1,
    "outer.steps": 16_000,
    "outer.meta_batch": 5,
    "evaluation.inner_steps": 5,
}


def table_recipe(column: str, algorithm: str) -> Recipe:
    """Returns what trains a cell, in one stage or in several."""
    if algorithm in ("imaml-gd", "imaml-hf"):
        return load_recipe(f"omniglot-{column}{'-newton' if algorithm == 'imaml-hf' else ''}")
    ways, _ = size_of(column)
    settings = algorithm_changes(ways)[algorithm]
    steps, tasks = (5000, 16) if ways == 5 else (1000, 4)
    outer = {"outer": Outer(steps=steps, meta_batch=tasks, lr=3e-3, schedule="cosine")}
    changes = {"tasks.queries": None, "tasks.train_queries": 5, "evaluation.tasks": 3000 if ways == 5 else 1000}
    if algorithm == "reptile":
        settings = settings | _REPTILE
    return Recipe(changed(paper_settings(column), changes | outer | settings), name=f"{column}/{algorithm}")


def table_changes(options: OmniglotTable) -> dict[str, Any]:
    """Returns what the options change of every stage."""
    changes: dict[str, Any] = {"run.device": options.device, "run.threads": options.threads}
    changes |= {"run.capture": options.capture, "run.tensorboard": False}
    if options.trial:
        small = {"data": Glyphs(), "model.filters": 4, "outer.steps": 2, "outer.meta_batch": 2, "outer.warmup_steps": 0}
        return changes | small | {"evaluation.tasks": 4, "evaluation.every": 0, "run.log_every": 1}
    if options.data_root is not None:
        changes["data.root"] = options.data_root
    return changes | ({"data.split": "vinyals", "data.validation": 0} if options.split == "vinyals" else {})


def run(options: OmniglotTable, *, command: str = "") -> None:
    """Trains and judges the cells chosen that have no result yet, and draws the table after each of them."""
    if options.trial and options.split != "1200/423":
        raise ConfigError("split must be left out with trial, whose data have none")
    names = [f"{column}/{algorithm}" for column in COLUMNS for algorithm in ALGORITHMS]
    chosen = [] if options.draw_only else chosen_cells(names, options.cells)
    folder = output_folder(options) / SPLITS[options.split]
    for number, name in enumerate(chosen, 1):
        file, title = folder / f"{name}.json", f"{options.name} {number}/{len(chosen)}: {name}"
        if file.is_file():
            say(f"{title} is finished")
            continue
        say(title)
        with explained(f"{file.parent} cannot be made"):
            file.parent.mkdir(parents=True, exist_ok=True)
        content = _cell(options, name, folder / "runs" / name, command)
        others = {words: content["judged"][protocol] for protocol, (words, _) in PROTOCOLS.items()}
        export_run(folder / "runs" / name, file.with_suffix(".safetensors"), others=others)
        atomic_write(file, json_bytes(content))
        _draw(options, command)
    say(f"{_draw(options, command)} cells are finished; results are in {options.folder}")


def _cell(options: OmniglotTable, name: str, path: Path, command: str) -> dict[str, Any]:
    """Trains a cell, or goes on with it, and judges what it has learnt; returns the content of its result file."""
    recipe, changes = table_recipe(*name.split("/")), table_changes(options)
    if name.endswith("/reptile"):
        changes["run.capture"] = False  # neither plain SGD nor what it keeps of Adam can be captured
    take_finished_stages(recipe, path, changes, others=sorted(path.parent.parent.glob("[!.]*/[!.]*")))
    result = train_recipe(recipe, path, command=command, changes=changes, resume=True)
    ways = size_of(name.split("/")[0])[0]
    tasks = 4 if options.trial else 1000 if ways == 5 else 200
    judged = {"paper": result["test"]}
    for protocol, (_, how) in PROTOCOLS.items():
        given = dict(how)
        of_data = given.pop("changes", {})
        if options.trial:
            of_data = {path: value for path, value in of_data.items() if path != "data.orientations"}
        judged[protocol] = evaluate_run(path, {**of_data, "evaluation.tasks": tasks}, **given).to_json()
    return {
        "cell": name,
        "split": options.split,
        "recipe": recipe.name,
        "stages": [
            {**stage_summary(directory), "validations": _validations(directory)}
            for directory in RunDirectory.stages_in(path)
        ],
        "judged": judged,
        "command": without_folders(command),
        "environment": result["environment"],
    }


def _validations(directory: RunDirectory) -> list[dict[str, Any]]:
    """Lists the validations of a run: its learning curve."""
    names = ("step", "seconds", "val_accuracy", "val_accuracy_interval")
    rows = read_metrics(directory.metrics)
    return [{name: row[name] for name in names} for row in rows if "val_accuracy" in row]


# ---- the table ------------------------------------------------------------------------------------------------------

Found = Mapping[tuple[str, str], Mapping[str, Any]]  # result files by (split, cell)


def read_cells(folder: Path) -> Found:
    """Reads the result files of a folder, by split and cell.

    Raises:
        RunError: one is damaged.
    """
    found = {}
    for split, place in SPLITS.items():
        for column in COLUMNS:
            for algorithm in ALGORITHMS:
                content = read_json(folder / place / f"{column}/{algorithm}.json", "remove it; its cell is made again")
                if content is not None:
                    found[split, f"{column}/{algorithm}"] = content
    return found


def _draw(options: OmniglotTable, command: str) -> int:
    """Writes the tables and the figure; returns the number of cells that are in them."""
    found = read_cells(options.folder)
    if not found:
        raise RunError(f"{options.folder} holds no result of this experiment: there is nothing to draw")
    cells = {f"{SPLITS[split]}/{name}": content for (split, name), content in found.items()}
    write_results(options, resolve_device(options.device), command=command, published=PUBLISHED, cells=cells)
    atomic_write(options.folder / f"{options.name}.md", table(found).encode())
    judged = {name: content["judged"]["paper"] for (split, name), content in found.items() if split == "1200/423"}
    shown = {name: (100 * test["accuracy"], 100 * test["accuracy_interval"]) for name, test in judged.items()}
    title = "Omniglot, 1,200 / 423 characters: filled here, hollow published"
    write_figure(accuracies_beside_published(title, shown), options.folder / f"{options.name}.png")
    return len(found)


def _shown(test: Mapping[str, Any]) -> str:
    return f"{100 * test['accuracy']:.2f} ± {100 * test['accuracy_interval']:.2f}"


def table(found: Found) -> str:
    """Returns the tables in Markdown: each protocol of each split, with what is published beside the paper's."""
    text = "Test accuracy (%) with its 95 % interval.\n"
    for split, words in _NAMES.items():
        if not any(of == split for of, _ in found):
            continue
        for protocol, what in {"paper": _PAPER, **{name: words for name, (words, _) in PROTOCOLS.items()}}.items():
            rows = []
            for algorithm in ALGORITHMS:
                cells = [found.get((split, f"{column}/{algorithm}")) for column in COLUMNS]
                if any(cells):
                    rows.append(
                        [LABELS[algorithm], *(_shown(c["judged"][protocol]) if c else "not run" for c in cells)]
                    )
                if protocol == "paper" and split == "1200/423":
                    published = ("{:g} ± {:g}".format(*PUBLISHED[algorithm][column]) for column in COLUMNS)
                    rows.append([f"{LABELS[algorithm]}, published", *published])
            if protocol == "paper" and split == "1200/423":
                for name, (source, figures) in OTHERS.items():
                    rows.append([f"{name} ({source})", *(f"{figures[column]:g}" for column in COLUMNS)])
            sizes = sorted({c["judged"][protocol]["tasks"] for (of, _), c in found.items() if of == split})
            on = " or ".join(f"{size:,}" for size in sizes)
            text += f"\n**{words}**, {what}; {on} tasks.\n\n" + markdown_table(["", *COLUMNS.values()], rows)
    return text + "\nPublished: Rajeswaran et al., arXiv 1909.04630, table 2.\n"
