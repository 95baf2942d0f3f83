"""`imaml predict`: learns classes of pictures from a few examples of each, and names new pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from imaml_ext.cli.parser import last_value, parse
from imaml_ext.cli.table import table
from imaml_ext.data.listing import list_folder, pictures_below
from imaml_ext.errors import ConfigError, DataError, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.pictures import Reading
from imaml_ext.pictures.reading import unreadable
from imaml_ext.progress import say
from imaml_ext.settings import Settings
from imaml_ext.train.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from imaml_ext.pretrained import AdaptedLearner

WEIGHTS = "omniglot-5w1s-newton"  # the best 1-shot ones that come with the package


@dataclass(frozen=True)
class Pictures(Settings):
    """Says how pictures are read."""

    pictures: Reading = field(default_factory=Reading)


@dataclass(frozen=True)
class Options:
    """Learn classes of pictures from a few examples of each, and name new pictures."""

    # A folder that holds one folder of example pictures per class; or a learner that --save has written.
    examples: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="EXAMPLES")]
    # Pictures to name, or folders of them. Where a folder holds folders that are called as the classes are, the
    # accuracy is shown too.
    new: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[NEW ...]")] = ()
    weights: str = WEIGHTS  # What is adapted: weights by name, a file NAME.safetensors, or a run directory.
    # How pictures are read; unset: as in the training of the weights.
    how: Annotated[Pictures, tyro.conf.arg(name="")] = field(default_factory=Pictures)
    # Judge all new pictures together, which helps a little where they show all classes equally often, and harms where
    # they do not; else each picture is judged alone beside the examples.
    transductive: tyro.conf.FlagCreatePairsOff[bool] = False
    device: str = "cpu"  # Device.
    save: Path | None = None  # Write the learner, as it is after the examples, to this file NAME.safetensors.
    # Print JSON, with the probability of every class, and nothing else.
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    output: Path | None = None  # Write the answers to this file NAME.csv or NAME.json.


def run(arguments: list[str], ranks: Ranks) -> int:
    from imaml_ext.pretrained import learn_pictures, load_adapted
    from imaml_ext.train.export import weights_from

    try:
        trained = weights_from(last_value(arguments, "--weights") or WEIGHTS).card.reading or Reading()
    except RunError:  # is said once the command line has been read as a whole
        trained = Reading()
    default = Options(examples=tyro.MISSING, how=Pictures(trained))
    options = parse(Options, arguments, prog="imaml predict", default=default)
    if not options.new and options.save is None:
        raise ConfigError("name pictures to tell apart, or a file to write the learner to (--save)")
    for option, file, kinds in (
        ("--save", options.save, (".safetensors",)),
        ("--output", options.output, (".csv", ".json")),
    ):
        if file is not None and file.suffix not in kinds:
            raise ConfigError(f"{option} must be a file {' or '.join(f'NAME{kind}' for kind in kinds)}, got {file}")
    if options.examples.suffix == ".safetensors":
        if options.how.pictures != trained or last_value(arguments, "--weights") is not None:
            raise ConfigError("a learner that was saved has its weights, and reads pictures as it read its examples")
        learner = load_adapted(options.examples, device=options.device)
    else:
        if not options.examples.is_dir():
            raise DataError(f"{options.examples} must be a folder of folders of pictures, or a file NAME.safetensors")
        listing = list_folder(options.examples)
        listing.require_pictures()
        if listing.left_out:
            say(listing.omissions())
        weights = weights_from(options.weights)
        learner = learn_pictures(weights, listing.classes, reading=options.how.pictures, device=options.device)
    if options.save is not None:
        learner.save(options.save)
        say(f"the learner is in {options.save}")
    if options.new:
        found = {path: expected for place in options.new for path, expected in _pictures(place, learner.classes)}
        images, problems = _read(learner, found)
        if images:  # the others are answered for all the same
            answers = _answers(learner, images, found, options.transductive) | {"unreadable": problems}
            if options.output is not None:
                atomic_write(options.output, _csv(answers) if options.output.suffix == ".csv" else json_bytes(answers))
            print(json_bytes(answers).decode().rstrip() if options.json else _text(answers), flush=True)
        if problems:
            raise unreadable(list(problems.values()), len(found))
    return 0


def _read(learner: AdaptedLearner, paths: Iterable[Path]) -> tuple[dict[Path, Tensor], dict[str, str]]:
    """Reads pictures [1, C, H, W]; of those that cannot be read, it tells why."""
    images, problems = {}, {}
    for path in paths:
        try:
            images[path] = learner.read([path])
        except DataError as error:
            problems[str(path)] = str(error)
    return images, problems


def _answers(
    learner: AdaptedLearner, images: Mapping[Path, Tensor], classes: Mapping[Path, str | None], transductive: bool
) -> dict[str, Any]:
    """Names pictures, each of which is known to show a class, or not: the content of the JSON."""
    from torch import cat

    beside: Literal["all", "support"] = "all" if transductive else "support"
    probabilities = learner.predict(cat(list(images.values())), beside=beside)  # [Q, ways]
    rows = []
    for path, each in zip(images, probabilities.tolist(), strict=True):
        ranked = dict(sorted(zip(learner.classes, each, strict=True), key=lambda pair: -pair[1]))
        row = {"file": str(path), "class": next(iter(ranked)), "probabilities": ranked}
        rows.append(row if classes[path] is None else row | {"expected": classes[path]})
    known = [row["class"] == row["expected"] for row in rows if "expected" in row]
    accuracy = {"accuracy": sum(known) / len(known), "counted": len(known)} if known else {}
    return {"weights": learner.weights, "classes": list(learner.classes), **accuracy, "pictures": rows}


def _pictures(place: Path, classes: tuple[str, ...]) -> Iterator[tuple[Path, str | None]]:
    """The pictures that a file or a folder stands for, each with its class where a folder says it."""
    if not place.is_dir():
        yield place, None
        return
    found, listing = pictures_below(place)
    if listing.left_out:
        say(listing.omissions())
    folders = [path.relative_to(place).parts[0] if path.parent != place else "" for path in found]
    labelled = all(folder in classes for folder in folders)
    yield from ((path, folder if labelled else None) for path, folder in zip(found, folders, strict=True))


def _best(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The two most probable classes."""
    return list(row["probabilities"].items())[:2]


def _text(answers: Mapping[str, Any]) -> str:
    lines = []
    for row in answers["pictures"]:
        (best, sure), (second, less) = _best(row)
        lines.append((row["file"], best, f"{100 * sure:.1f} %", f"{second} ({100 * less:.1f} %)"))
    text = table(("picture", "class", "probability", "second"), lines, right=(2,))
    if "accuracy" in answers:
        text += f"\n\naccuracy {100 * answers['accuracy']:.1f} % of {answers['counted']:,} pictures"
    return text


def _csv(answers: Mapping[str, Any]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["file", "class", "probability", "second", "second_probability", "expected"])
    for row in answers["pictures"]:
        writer.writerow([row["file"], *(value for pair in _best(row) for value in pair), row.get("expected", "")])
    return file.getvalue().encode("utf-8", "surrogateescape")
