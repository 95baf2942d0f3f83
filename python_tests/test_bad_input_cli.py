"""Bad input to the command line: a clear sentence, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import SMALL, assert_one_sentence, files_of, imaml, imaml_process

from imaml_ext.train.run_directory import read_metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "sinusoid", "--outer.learning-rate", "1"], ["Unrecognized options: --outer.learning-rate"]),
        (["train", "sinusoid", "--outer.lr", "fast"], ["--outer.lr", "fast"]),
        (["train", "sinusoid", "--outer.lr", "-1"], ["Outer.lr must be above 0, got -1.0"]),
        (["train", "sinusoid", "--outer.schedule", "stairs"], ["stairs", "cosine"]),
        (["train", "omniglot-6w1s"], ["omniglot-6w1s", "omniglot-5w1s"]),
        (["train", "sinusoid", "--lam", "-1"], ["IMAML.lam must be above 0, got -1.0"]),
        (["train", "sinusoid", "--inner", "newton"], ["newton", "newton_cg"]),
        (["train", "sinusoid", "--learn", "lam"], ["--learn", "a name and a value"]),
        (["train", "glyphs-5w1s", "--data", "sinusoid"], ["model must be 'mlp' for the data set 'sinusoid'"]),
        (["train", "omniglot-6w1s", "--help"], ["omniglot-6w1s", "omniglot-5w1s"]),
        (["train"], ["glyphs-5w1s"]),
        (["fly"], ["fly", "train"]),
        (["data", "imagenet"], ["imagenet", "omniglot"]),
        (["data"], ["glyphs", "cifar-fs"]),
        (["data", "glyphs", "--greyscale"], ["Unrecognized options: --greyscale"]),
        (["evaluate", "run", "--from-scratch"], ["--from-scratch"]),
    ],
)
def test_a_command_that_cannot_be_understood_exits_with_2(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = imaml(*arguments)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    text = " ".join(process.stderr.replace("│", " ").split())
    for word in words:
        assert word in text, text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ways", "split"), [(6000, "train"), (200, "test")])
def test_ways_larger_than_the_classes(tmp_path: Path, ways: int, split: str) -> None:
    """Of any split that the run will need, before anything is trained."""
    knobs = ["--tasks.ways", ways, "--evaluation.every", 0, "--run-dir", tmp_path / "run"]
    process = imaml("train", "glyphs-5w1s", *knobs)
    assert_one_sentence(process, f"split '{split}': ways must not exceed", str(ways))
    assert not (tmp_path / "run").exists()


def test_shots_and_queries_larger_than_the_drawings(tmp_path: Path) -> None:
    process = imaml("train", "glyphs-5w1s", "--tasks.queries", 1000, "--run-dir", tmp_path / "run")
    assert_one_sentence(process, "shots + queries must not exceed")
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for extra, env in ((["--debug"], {}), ([], {"IMAML_DEBUG": "1"})):
        process = imaml("train", "sinusoid", "--run.device", "abacus", "--run-dir", tmp_path, *extra, env=env)
        assert process.returncode == 1
        assert "Traceback" in process.stderr
    process = imaml("train", "sinusoid", "--run.device", "abacus", "--run-dir", tmp_path)
    assert_one_sentence(process, "run.device 'abacus' cannot be used")


class TestDataRoot:
    def test_missing(self, tmp_path: Path) -> None:
        process = self._train(tmp_path, tmp_path / "nowhere")
        assert_one_sentence(process, "nowhere")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not an archive at all"])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "omniglot28.npz").write_bytes(content)
        process = self._train(tmp_path, tmp_path / "data")
        assert_one_sentence(process, "omniglot28.npz")
        assert not (tmp_path / "run").exists()

    def test_wrong_content(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        np.savez(tmp_path / "data" / "omniglot28.npz", images=np.zeros((10, 28, 28), np.float32))
        process = self._train(tmp_path, tmp_path / "data")
        assert_one_sentence(process, "omniglot28.npz")

    def test_download_without_torchvision(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises ImportError
        (tmp_path / "empty").mkdir()
        arguments = ["--download", "--root", tmp_path / "empty", "--cache-dir", tmp_path / "cache"]
        process = imaml("data", "omniglot", *arguments, env={"IMAML_DATA_ROOT": ""})
        assert_one_sentence(process, "torchvision")
        assert not (tmp_path / "cache").exists() or not files_of(tmp_path / "cache")

    @staticmethod
    def _train(tmp_path: Path, root: Path) -> subprocess.CompletedProcess[str]:
        knobs = ["--data.root", root, "--data.cache-dir", tmp_path / "cache", "--run-dir", tmp_path / "run"]
        return imaml("train", "omniglot-5w1s", *knobs, env={"IMAML_DATA_ROOT": ""})


class TestRunDirectory:
    KNOBS = (*SMALL, "--outer.steps", "60", "--run.log-every", "5", "--run.checkpoint-every", "20")

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("a file")
        process = imaml("train", "sinusoid", *self.KNOBS, "--run-dir", tmp_path / "run")
        assert_one_sentence(process, "run directory", "cannot be used", "Not a directory")
        assert (tmp_path / "run").read_text() == "a file"

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("a file")
        process = imaml("train", "sinusoid", *self.KNOBS, "--run-dir", tmp_path / "file" / "run")
        assert_one_sentence(process, "run directory", "Not a directory")

    def test_read_only(self, tmp_path: Path) -> None:
        with _Mounted(tmp_path / "disk", "ro"):
            process = imaml("train", "sinusoid", *self.KNOBS, "--run-dir", tmp_path / "disk" / "run")
        assert_one_sentence(process, "cannot write to run directory", "Read-only file system")

    def test_full_disk(self, tmp_path: Path) -> None:
        """Room for a checkpoint or two, and then no more."""
        with _Mounted(tmp_path / "disk", "size=32k"):
            run = tmp_path / "disk" / "run"
            process = imaml("train", "sinusoid", *self.KNOBS, "--run-dir", run)
            assert_one_sentence(process, "cannot write", "No space left on device")
            self._nothing_half_written(run)

    @pytest.mark.parametrize(
        ("file", "knobs"),
        [
            ("step-00000020.pt", ["--run.log-every", "20", "--run.checkpoint-every", "20"]),
            ("metrics.jsonl", ["--run.log-every", "1", "--run.checkpoint-every", "1000"]),
        ],
    )
    def test_file_size_limit(self, tmp_path: Path, file: str, knobs: list[str]) -> None:
        """The same without a mount: no file of the run may be larger than 4,000 bytes."""
        run = tmp_path / "run"
        process = imaml_process(
            "train", "sinusoid", *SMALL, "--outer.steps", 60, *knobs, "--run-dir", run, limit_file_size=4000
        )
        assert_one_sentence(process, f"{file}: File too large")
        self._nothing_half_written(run)

    @staticmethod
    def _nothing_half_written(run: Path) -> None:
        assert not list(run.rglob("*.tmp"))
        if (run / "config.json").exists():
            json.loads((run / "config.json").read_text())
        content = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
        assert content == b"" or content.endswith(b"\n")
        read_metrics(run / "metrics.jsonl")
        for path in (run / "checkpoints").glob("*.pt"):
            torch.load(path, weights_only=True)
        assert not (run / "result.json").exists()

    def test_damaged_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        for content in ("", "{", '{"preset": "x"}', '{"preset": "x", "config": {"outer": 1}}'):
            (tmp_path / "run" / "config.json").write_text(content)
            process = imaml("evaluate", tmp_path / "run")
            assert_one_sentence(process, "config.json cannot be read")

    def test_a_result_that_cannot_be_written_is_printed(self, tmp_path: Path) -> None:
        imaml("train", "sinusoid", "--run-dir", tmp_path / "run", "--outer.steps", 1, *SMALL)
        process = imaml("evaluate", tmp_path / "run", "--tasks", 4, "--output", tmp_path / "absent" / "a.json")
        assert process.stdout.startswith("test mean squared error")
        assert process.returncode == 1
        assert process.stderr.splitlines()[-1].endswith("absent/a.json: No such file or directory")

    def test_evaluating_nothing(self, tmp_path: Path) -> None:
        assert_one_sentence(imaml("evaluate", tmp_path / "nothing"), "holds no run")


class _Mounted:
    """A small file system of its own; needs the right to mount."""

    def __init__(self, path: Path, options: str) -> None:
        self.path, self.options = path, options

    def __enter__(self) -> None:
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.path)]
        try:
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("mounting a file system is not permitted here")

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True, capture_output=True)
