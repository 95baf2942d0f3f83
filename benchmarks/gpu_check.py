"""Checks and measures the extension on a machine with a GPU, in nine minutes at most and without a network.

    benchmarks/gpu_check.sh                             # the default steps, in their order
    benchmarks/gpu_check.sh cg profile                  # these alone; the results of the others stay
    benchmarks/gpu_check.sh --prebuilt FOLDER --wheels FOLDER --output-dir FOLDER
    benchmarks/gpu_check.sh --rehearse                  # every program at its smallest size on the CPU

The result file, gpu_check.json, is written anew after every command, so that a check that is cut short leaves what it
has measured. A step that fails does not stop the rest. Results of earlier calls stay where hardware, versions and
sources are the same. docs/benchmarks.md says what each step settles.

This file needs the standard library alone: a torch that crashes ends one step, not the check.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
BUILD_SUPPORT = ROOT / "imaml_ext" / "_build.py"
DEVICE_LOOP = ROOT / "python_tests" / "test_device_loop.py"
Command = list[str]
LEAST = 5  # seconds: a command is not begun with less time left
MOST_OF_A_LOG = 2**20  # bytes of a step's log that go into the copy


class SkippedError(Exception):
    """A step that cannot be taken here; the message says why."""


@dataclass
class Check:
    """What the commands of the steps depend on."""

    folder: Path
    rehearse: bool = False
    prebuilt: Path | None = None
    peers: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)  # of device_report.py

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def program(self, name: str, *arguments: str, result: str | None = None) -> Command:
        """A program of this folder; `result` is the name under which its JSON becomes part of the result file."""
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments, "--device", self.device]
        return [*command, "--json", str(self.folder / f"{result}.json")] if result else command

    def tool(self, name: str) -> str:
        """A tool of the CUDA toolkit."""
        toolkit = Path(self.report.get("toolkit") or "/usr/local/cuda")
        places = [toolkit / "bin" / name, toolkit / name / name, Path("/usr/local/cuda/bin") / name]
        places += sorted(Path("/opt/nvidia/nsight-compute").glob(f"*/{name}"), reverse=True)
        found = shutil.which(name) or next((str(place) for place in places if os.access(place, os.X_OK)), None)
        if found is None:
            raise SkippedError(f"no {name}")
        return found


# --- the steps --------------------------------------------------------------------------------------------------------


def device(check: Check) -> Iterator[Command]:
    report = check.program("device_report")
    if check.rehearse:
        yield report
        return
    if check.prebuilt is not None and (why := take_prebuilt(check, report)) is None:
        yield report
        return
    if check.prebuilt is not None:
        print(f"--prebuilt is not used: {why}", flush=True)
    defaults = {
        "IMAML_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": check.report["stamp"]["capability"],
        "MAX_JOBS": str(os.cpu_count()),
    }
    words = [f"{name}={os.environ.get(name, value)}" for name, value in defaults.items()]
    yield ["env", *words, sys.executable, "setup.py", "build_ext", "--inplace"]
    yield report


def load_build_support() -> Any:
    """imaml_ext/_build.py as a module of its own: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("imaml_ext_build", BUILD_SUPPORT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def take_prebuilt(check: Check, report: Command) -> str | None:
    """Copies a prebuilt extension into the package; says why where it is not one for this torch and this GPU."""
    assert check.prebuilt is not None
    source, package, torch = check.prebuilt / "imaml_ext", ROOT / "imaml_ext", check.report["stamp"]["torch"]
    try:
        record = json.loads((source / "_build_info.json").read_text())
    except (OSError, ValueError) as error:
        return str(error)
    modules = sorted(source.glob("_C*.so"))
    if not modules or not record["cuda"] or record["torch"] != torch:
        return f"{len(modules)} modules, CUDA {record['cuda']}, built for torch {record['torch']}; here is {torch}"
    if record["sources"] != load_build_support().sources_digest(ROOT / "csrc"):
        return "it was built from other sources than those of csrc/ here"
    for path in [*modules, source / "_build_info.json"]:
        if path.resolve() != (package / path.name).resolve():
            shutil.copyfile(path, package / path.name)
    try:
        done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        return str(error)
    if done.returncode == 0:
        return None
    return json.loads(done.stdout)["unusable"] if done.stdout.strip() else done.stderr


def every_kernel(check: Check) -> Iterator[Command]:
    small = ["--dtypes", "float32", "--sizes", "2x31", "--networks", "MLP, tanh"]
    yield check.program("every_kernel", *(small if check.rehearse else []))


def memcheck_of_the_failure(check: Check) -> Iterator[Command]:
    """After every_kernel has failed: the first case that did so, else the one in which the program ended."""
    log = (check.folder / "every_kernel.log").read_text(errors="replace")
    named = [
        *re.findall(r"^FAILED: (.*)$", log, re.MULTILINE)[:1],
        *re.findall(r"^case: (.*)$", log, re.MULTILINE)[-1:],
    ]
    if not named:
        raise SkippedError("no case was called")
    yield from sanitizer(check, "memcheck", ["--only", named[0]])


def device_loop(check: Check) -> Iterator[Command]:
    """Apart from the other tests: a capture that fails can leave a process unable to use CUDA."""
    yield pytest_command(check, [DEVICE_LOOP])


def tests(check: Check) -> Iterator[Command]:
    paths = sorted((ROOT / "python_tests").glob("test_*.py"))
    of_cuda = [path for path in paths if re.search(r"mark\.cuda|\bDEVICES\b", path.read_text())]
    yield pytest_command(check, [path for path in of_cuda if path != DEVICE_LOOP])


def pytest_command(check: Check, files: list[Path]) -> Command:
    options = ["-m", "cuda and not opcheck", "-v", "--tb", "short", "--continue-on-collection-errors"]
    if check.rehearse:
        options.append("--collect-only")
    else:
        if importlib.util.find_spec("xdist"):
            options += ["-n", "8"]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", "60"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]


def cg(check: Check) -> Iterator[Command]:
    shapes = [(32, 112_005), (32, 112_000), (1, 10_000_000), (4096, 1000), (100_000, 30)]
    for rows, cols in [(3, 50)] if check.rehearse else shapes:
        small = ["--rounds", "2"] if check.rehearse else []
        yield check.program("cg", "--rows", str(rows), "--cols", str(cols), *small, result=f"cg-{rows}x{cols}")


TINY = ["--tasks", "2", "--filters", "3", "--inner-steps", "2", "--cg-steps", "2"]


def meta_step(check: Check) -> Iterator[Command]:
    only = ["--only", "grouped conv2d", *([] if check.rehearse else ["--only", "imaml_ext, replayed"])]
    small = [*TINY, "--rounds", "2"] if check.rehearse else []
    workloads = ["5w1s-1q", "5w1s-1task", "5w1s-8tasks"]
    yield check.program("meta_step", *workloads, "--hvp", *only, *small, result="meta_step")


def profile(check: Check) -> Iterator[Command]:
    yield check.program("profile_step", *(TINY if check.rehearse else []), result="profile_step")


def ncu(check: Check) -> Iterator[Command]:
    if check.rehearse:
        yield check.program("ncu_details", "--tasks", "2")
    else:
        yield check.program("ncu_details", "--ncu", check.tool("ncu"), "--details", str(check.folder / "ncu.csv"))


def yardsticks(check: Check) -> Iterator[Command]:
    small = ["--tasks", "2", "--repeat", "2", "--rounds", "2"] if check.rehearse else []
    yield check.program("yardsticks", *small, result="yardsticks")


def rivals(check: Check) -> Iterator[Command]:
    """JAX in a process of its own: it takes long to compile, and may fail in ways of its own."""
    small = [*TINY, "--rounds", "2"] if check.rehearse else []
    replayed = [] if check.rehearse else ["--only", "imaml_ext, replayed"]
    if check.peers or importlib.util.find_spec("torchopt"):
        only = ["--only", "TorchOpt"] if importlib.util.find_spec("torchopt") else []
        for peer in check.peers[::2]:
            only += ["--only", peer.removeprefix("--").replace("-", "_")]
        yield check.program(
            "meta_step", "5w1s-1q", *check.peers, *only, *replayed, *small, "--rounds", "3", result="meta_step-peers"
        )
    if importlib.util.find_spec("jax"):
        yield check.program("meta_step", "5w1s-1q", "--jax", "--only", "JAX", *replayed, *small, result="meta_step-jax")
    else:
        raise SkippedError("no jax")


SANITIZED = ["--dtypes", "float32", "--sizes", "2x31", "3x257", "2x4096", "1x112005", "1x300000"]
SANITIZED += ["--networks", "Conv4, 1 task, odd images", "Conv4, no patches", "MLP, tanh"]


def sanitizer(check: Check, tool: str, cases: list[str]) -> Iterator[Command]:
    """Without torch's cache every tensor is an allocation of its own, past whose end nothing may be touched."""
    program = check.program("every_kernel", *cases)
    if check.rehearse:
        yield program
        return
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    yield ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", check.tool("compute-sanitizer"), *options, *program]


def train(check: Check, name: str, steps: int) -> Iterator[Command]:
    run = check.folder / f"run-{name}"
    shutil.rmtree(run, ignore_errors=True)
    settings = {"outer.steps": steps, "run.checkpoint-every": steps // 2, "run.device": check.device}
    if check.rehearse:
        settings |= {"outer.steps": 2, "evaluation.tasks": 2, "outer.meta-batch": 2}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    capture = "--run.no-capture" if check.rehearse else "--run.capture"
    paper = ["glyphs-5w1s", "--model.filters", "3" if check.rehearse else "64"]  # the paper's network
    yield [sys.executable, "-m", "imaml_ext", "train", *paper, *words, capture, "--run-dir", str(run)]


def omniglot(check: Check) -> Iterator[Command]:
    if not os.environ.get("IMAML_DATA_ROOT"):
        raise SkippedError("IMAML_DATA_ROOT is not set")
    how = ["--trial", "--device", "cpu"] if check.rehearse else ["--device", check.device, "--capture"]
    cells = ["--cells", "5w1s/imaml-gd", "5w1s/imaml-hf", "--output-dir", str(check.folder / "omniglot")]
    yield [sys.executable, "-m", "imaml_ext", "reproduce", "omniglot-table", *cells, *how]


def precision(check: Check) -> Iterator[Command]:
    small = ["--tasks", "2", "--filters", "3", "--meta-steps", "1"] if check.rehearse else []
    yield check.program("precision", *small, result="precision")


def scaling(check: Check) -> Iterator[Command]:
    small = ["tasks", "--largest", "2", "--rounds", "1"] if check.rehearse else []
    yield check.program("scaling", *small, result="scaling")


@dataclass(frozen=True)
class Step:
    """Its commands, made as they come to run, take `limit` seconds together at most."""

    name: str
    limit: int
    commands: Callable[[Check], Iterator[Command]]
    default: bool = True


STEPS = [
    Step("device", 150, device),
    Step("every_kernel", 90, every_kernel),
    Step("tests", 120, tests),
    Step("device_loop", 40, device_loop),
    Step("cg", 90, cg),
    Step("meta_step", 90, meta_step),
    Step("profile", 40, profile),
    Step("ncu", 100, ncu),
    Step("yardsticks", 45, yardsticks),
    Step("rivals", 120, rivals),
    Step("memcheck", 90, lambda check: sanitizer(check, "memcheck", SANITIZED)),
    Step("synccheck", 90, lambda check: sanitizer(check, "synccheck", SANITIZED)),
    Step("racecheck", 90, lambda check: sanitizer(check, "racecheck", SANITIZED)),
    Step("short_training", 60, lambda check: train(check, "short_training", 1000)),
    Step("training", 300, lambda check: train(check, "training", 20_000), default=False),
    Step("precision", 120, precision, default=False),
    Step("scaling", 300, scaling, default=False),
    Step("omniglot", 480, omniglot, default=False),
]
AFTER_A_FAILURE = {"every_kernel": Step("memcheck_of_the_failure", 60, memcheck_of_the_failure)}


# --- running them -----------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """All of it or nothing: a reader, or a check that is killed, never finds half a file."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def die_with_the_check() -> None:
    """In a new process: makes it a group, to be ended whole; on Linux it ends where the check itself is killed."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end(process: subprocess.Popen, *, patience: float = 5) -> None:
    """Ends a command and all that it started, first as Ctrl-C does, upon which pytest tells what it knows."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=patience)


class Runner:
    """Takes steps one after the other, and keeps the result file true to what has happened."""

    def __init__(self, check: Check, *, budget: float, limit: float | None = None, copy: Path | None = None) -> None:
        self.check, self.limit, self.copy = check, limit, copy
        self.until = time.monotonic() + budget
        self.path = check.folder / "gpu_check.json"
        self.result: dict[str, Any] = {"stamp": check.report["stamp"], "steps": {}, "benchmarks": {}}
        self.process: subprocess.Popen | None = None
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            if earlier["stamp"] == self.result["stamp"]:
                self.result = earlier
                for step in earlier["steps"].values():
                    if step["status"] == "under way":
                        step["status"] = "killed"
            else:
                print(f"{self.path} is of another machine, other versions or other sources; it begins anew")

    def publish(self) -> None:
        """The result file; and in the folder of copies that file, all logs in one, and the pages of ncu."""
        record = ROOT / "imaml_ext" / "_build_info.json"
        self.result["extension"] = json.loads(record.read_text()) if record.exists() else None
        text = json.dumps(self.result, indent=2, ensure_ascii=False) + "\n"
        write(self.path, text)
        if self.copy is None:
            return
        write(self.copy / self.path.name, text)
        logs = []
        for name in self.result["steps"]:
            path = self.check.folder / f"{name}.log"
            if path.exists():
                log = path.read_text(errors="replace")
                logs.append(f"===== {name}\n{log[-MOST_OF_A_LOG:]}\n")
        write(self.copy / "gpu_check.log", "".join(logs))
        if (pages := self.check.folder / "ncu.csv").exists():
            write(self.copy / pages.name, pages.read_text(errors="replace"))

    def record(self, step: Step, status: str, seconds: float, line: str = "") -> None:
        log = f"{step.name}.log"
        self.result["steps"][step.name] = {
            "status": status,
            "seconds": round(seconds, 1),
            "last_line": line,
            "log": log if (self.check.folder / log).exists() else None,
            "at": now(),
        }
        self.publish()
        if status != "under way":
            print(f"{step.name:15} {status} ({seconds:.0f} s) {line}", flush=True)

    def take(self, step: Step) -> str:
        """Returns the status of the step, which is in the result file too."""
        begun, log = time.monotonic(), self.check.folder / f"{step.name}.log"
        until = min(self.until, begun + (self.limit or step.limit))
        if self.until - begun < LEAST:
            self.record(step, "left out: no time", 0)
            return "left out: no time"
        log.write_text("")
        try:
            self.record(step, "under way", 0)
            status = self.outcome(step, log, begun, until)
            self.record(step, status, time.monotonic() - begun, last_line(log))
        except SystemExit:  # of a signal, at any point of the above
            self.record(step, "interrupted", time.monotonic() - begun, last_line(log))
            raise
        return status

    def outcome(self, step: Step, log: Path, begun: float, until: float) -> str:
        """Runs the commands of a step and returns its status."""
        statuses = []
        try:
            for command in step.commands(self.check):
                statuses.append(self.run(command, log, until))
                self.record(step, "under way", time.monotonic() - begun, last_line(log))
            end = "passed"
        except SkippedError as reason:
            end = f"skipped: {reason}"
        except Exception as error:  # in a step's own lines: the others are still to come
            return f"failed: {type(error).__name__}: {error}"
        return next((status for status in statuses if status != "passed"), end)

    def run(self, command: Command, log: Path, until: float) -> str:
        if until - time.monotonic() < LEAST:
            return "failed: out of time"
        measured = Path(command[command.index("--json") + 1]) if "--json" in command else None
        if measured is not None:  # what an earlier call has measured is not the result of this one
            measured.unlink(missing_ok=True)
            self.result["benchmarks"].pop(measured.stem, None)
        with log.open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_the_check,
            )
            try:
                while self.process.poll() is None:
                    left = until - time.monotonic()
                    if left <= 0:
                        return "failed: out of time"
                    try:
                        self.process.wait(timeout=min(left, 5))
                    except subprocess.TimeoutExpired:
                        self.publish()  # with the log as it is by now
                return "passed" if self.process.returncode == 0 else f"failed ({self.process.returncode})"
            except SystemExit:
                end(self.process, patience=1)
                raise
            finally:
                end(self.process)
                self.collect(measured)

    def collect(self, measured: Path | None) -> None:
        """Takes what a command has written with --json into the result; nothing where it was ended while it wrote."""
        if measured is not None and measured.exists():
            with contextlib.suppress(ValueError):
                self.result["benchmarks"][measured.stem] = json.loads(measured.read_text())


def stop(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def device_report(check: Check) -> dict[str, Any]:
    """Hardware and versions, from a process of its own."""
    done = subprocess.run(check.program("device_report"), capture_output=True, text=True, timeout=120)
    if not done.stdout.strip():
        raise SystemExit(f"{sys.executable} cannot say what is here:\n{done.stderr}")
    report = json.loads(done.stdout)
    report["stamp"]["rehearsal"] = check.rehearse
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(f"{step.name}{'' if step.default else ' (only if named)'}" for step in STEPS)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=names)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build" / "gpu_check", help="for results and logs")
    parser.add_argument("--copy", type=Path, help="a folder for three files kept as new: results, all logs, ncu.csv")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all steps together (%(default)s)")
    parser.add_argument("--limit", type=float, help="seconds for each step, in place of its own limit")
    parser.add_argument("--prebuilt", type=Path, help="a folder with imaml_ext/_C*.so and imaml_ext/_build_info.json")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels with Python packages that are missing here")
    parser.add_argument("--imaml-dev", type=Path, help="source of github.com/aravindr93/imaml_dev, for rivals")
    parser.add_argument("--hypertorch", type=Path, help="source of github.com/prolearner/hypertorch, for rivals")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, every program at its smallest size")
    options = parser.parse_args()
    began = time.monotonic()
    known = {step.name: step for step in STEPS}
    if unknown := [name for name in options.steps if name not in known]:
        parser.error(f"steps must be some of {', '.join(known)}; got {', '.join(unknown)}")
    steps = [known[name] for name in options.steps] or [step for step in STEPS if step.default]

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    folder = options.output_dir.resolve()
    for path in (folder, options.copy):
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if options.wheels:
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*pip, "--target", site, *sorted(options.wheels.glob("*.whl"))], check=True)
        paths.append(str(site))
        sys.path.append(str(site))
    # JAX is to leave memory to the others, and each test its share of the processors.
    threads = {} if options.rehearse else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 8))}
    os.environ |= {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **threads}
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    peers = []
    for name, path in (("--imaml-dev", options.imaml_dev), ("--hypertorch", options.hypertorch)):
        peers += [name, str(path.resolve())] if path else []
    check = Check(folder, options.rehearse, options.prebuilt and options.prebuilt.resolve(), peers)
    check.report = device_report(check)
    runner = Runner(check, budget=options.budget - (time.monotonic() - began), limit=options.limit, copy=options.copy)
    statuses = []
    for step in steps:
        if not check.rehearse and not check.report["cuda"]:
            statuses.append("skipped: no CUDA device")
            runner.record(step, statuses[-1], 0)
            continue
        statuses.append(runner.take(step))
        if statuses[-1].startswith("failed") and step.name in AFTER_A_FAILURE:
            runner.take(AFTER_A_FAILURE[step.name])
    print(f"{runner.path}: {sum(status == 'passed' for status in statuses)} of {len(statuses)} steps passed")
    return int(any(status.startswith("failed") for status in statuses))


if __name__ == "__main__":
    raise SystemExit(main())
