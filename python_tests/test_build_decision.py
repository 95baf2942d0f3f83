"""The CUDA decision (imaml_ext/_build.py) on machines of every sort, played by nvcc scripts in a temporary folder."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

BUILD_FILE = Path(__file__).resolve().parents[1] / "imaml_ext" / "_build.py"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins for nvcc are shell scripts")


@pytest.fixture(scope="module")
def build():
    # By path, as setup.py loads it: this must work with no package and no extension there.
    spec = importlib.util.spec_from_file_location("imaml_ext_build_under_test", BUILD_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


class Machine:
    """A folder with toolkits in it, and the environment in which the decision is taken."""

    def __init__(self, root: Path):
        self.root = root
        self.bin = root / "bin"  # all of the PATH
        self.bin.mkdir()
        self.environ = {"PATH": str(self.bin)}

    def toolkit(self, name="toolkit", *, release="13.0", compiles=True, archs="75 80 86 90 100", top=True) -> Path:
        """Installs a stand-in for a CUDA toolkit and returns its root."""
        root = self.root / name
        compile_command = 'echo "$@" > "${0%/*}/../compiled"' if compiles else 'echo "host_config.h: error: no"; exit 2'
        list_archs = "\n".join(f"echo compute_{arch}" for arch in archs.split())
        say_top = f'echo "#$ TOP={root}/bin/.."' if top else "true"
        write_script(
            root / "bin" / "nvcc",
            f"""case " $* " in
*" --version "*) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
*" --dryrun "*) echo '#$ _SPACE_= '; {say_top} ;;
*" --list-gpu-arch "*) {list_archs}
  true ;;
*) {compile_command} ;;
esac
""",
        )
        return root

    def wrap(self, root: Path) -> Path:
        """Puts on the PATH a script, outside the toolkit, that calls its nvcc."""
        return write_script(self.bin / "nvcc", f'exec {root}/bin/nvcc "$@"\n')


@pytest.fixture
def machine(tmp_path, build, monkeypatch):
    which = build.shutil.which
    # Hides the toolkit that the machine of the test may have.
    monkeypatch.setattr(
        build.shutil, "which", lambda name, path=None: None if name.startswith("/usr/local") else which(name, path=path)
    )
    return Machine(tmp_path)


def test_cuda_torch_and_wrapped_nvcc_build_cuda_with_the_real_root(build, machine):
    root = machine.toolkit()
    wrapper = machine.wrap(root)
    decision = build.decide_cuda(torch_cuda="13.2", environ=machine.environ)
    assert decision.build
    assert decision.toolkit.nvcc == wrapper
    assert decision.toolkit.root == root.resolve()  # not the wrapper's grandparent
    assert decision.toolkit.version == (13, 0)
    assert (root / "compiled").exists(), "nvcc was never asked to compile"
    assert "13.2" in str(decision)
    assert "13.0" in str(decision)


def test_nvcc_that_tells_no_root_is_taken_to_lie_in_its_toolkit(build, machine):
    root = machine.toolkit(top=False)
    (machine.bin / "nvcc").symlink_to(root / "bin" / "nvcc")
    assert build.decide_cuda(torch_cuda="13.0", environ=machine.environ).toolkit.root == root.resolve()


def test_cpu_torch_with_nvcc_builds_no_cuda_and_says_so(build, machine):
    wrapper = machine.wrap(machine.toolkit())
    decision = build.decide_cuda(torch_cuda=None, environ=machine.environ)
    assert not decision.build
    assert "torch is a build without CUDA" in decision.reason
    assert str(wrapper) in decision.reason


def test_cpu_torch_without_nvcc(build, machine):
    decision = build.decide_cuda(torch_cuda=None, environ=machine.environ)
    assert not decision.build
    assert decision.reason == "torch is a build without CUDA"


def test_cuda_torch_without_nvcc(build, machine):
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ)
    assert not decision.build
    assert "no nvcc" in decision.reason


def test_rocm_torch(build, machine):
    machine.wrap(machine.toolkit())
    decision = build.decide_cuda(torch_cuda=None, torch_hip="6.4", environ=machine.environ)
    assert not decision.build
    assert "ROCm 6.4" in decision.reason


def test_other_major_version(build, machine):
    machine.wrap(machine.toolkit(release="12.8"))
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ)
    assert not decision.build
    assert "12.8" in decision.reason
    assert "13.0" in decision.reason
    assert "major versions must agree" in decision.reason


def test_nvcc_that_compiles_nothing(build, machine):
    machine.wrap(machine.toolkit(compiles=False))
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ)
    assert not decision.build
    assert "cannot compile and link a trivial kernel: host_config.h: error: no" in decision.reason


def test_nvcc_that_does_not_start(build, machine):
    write_script(machine.bin / "nvcc", "exec /nonexistent/cuda/bin/nvcc\n")
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ)
    assert not decision.build
    assert "does not work" in decision.reason
    assert "/nonexistent/cuda/bin/nvcc" in decision.reason


def test_cuda_home_goes_before_the_path(build, machine):
    machine.wrap(machine.toolkit("other", release="12.8"))
    root = machine.toolkit("mine")
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ | {"CUDA_HOME": str(root)})
    assert decision.build
    assert decision.toolkit.root == root.resolve()


def test_cuda_home_without_nvcc_is_not_passed_over(build, machine):
    machine.wrap(machine.toolkit())
    empty = machine.root / "empty"
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ | {"CUDA_HOME": str(empty)})
    assert not decision.build
    assert f"CUDA_HOME={empty} holds no bin/nvcc" in decision.reason


def test_zero_builds_no_cuda_wherever(build, machine):
    root = machine.toolkit()
    machine.wrap(root)
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ | {"IMAML_EXT_CUDA": "0"})
    assert not decision.build
    assert not (root / "compiled").exists()
    assert "IMAML_EXT_CUDA=0" in str(decision)


def test_one_builds_cuda(build, machine):
    machine.wrap(machine.toolkit())
    decision = build.decide_cuda(torch_cuda="13.0", environ=machine.environ | {"IMAML_EXT_CUDA": "1"})
    assert decision.build
    assert decision.requested == "1"


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "reason"),
    [
        (None, {}, "torch is a build without CUDA"),
        ("13.0", None, "no nvcc"),
        ("13.0", {"release": "12.8"}, "major versions must agree"),
        ("13.0", {"compiles": False}, "cannot compile"),
        ("13.0", {"archs": ""}, "lists no architecture"),
    ],
)
def test_one_fails_with_the_reason(build, machine, torch_cuda, toolkit, reason):
    if toolkit is not None:
        machine.wrap(machine.toolkit(**toolkit))
    with pytest.raises(build.BuildError, match=f"IMAML_EXT_CUDA=1, but CUDA cannot be built: .*{reason}"):
        build.decide_cuda(torch_cuda=torch_cuda, environ=machine.environ | {"IMAML_EXT_CUDA": "1"})


@pytest.mark.parametrize("value", ["yes", "2", "on"])
def test_unknown_request(build, machine, value):
    with pytest.raises(build.BuildError, match=f"must be auto, 0 or 1, got '{value}'"):
        build.decide_cuda(torch_cuda=None, environ=machine.environ | {"IMAML_EXT_CUDA": value})


def test_empty_request_is_auto(build, machine):
    assert build.decide_cuda(torch_cuda=None, environ=machine.environ | {"IMAML_EXT_CUDA": ""}).requested == "auto"


@pytest.mark.parametrize(
    ("archs", "capabilities", "variable", "expected"),
    [
        ("75 80 86 87 90 100 103 120", [], None, "7.5;8.0;9.0+PTX"),  # no GPU: one a generation
        ("50 60 70 75 80", [], None, "7.5;8.0+PTX"),  # an nvcc older than 9.0
        ("100 103 120", [], None, "10.0+PTX"),  # an nvcc that has dropped them all
        ("75 80 86 90", [(8, 6), (8, 6)], None, "8.6+PTX"),  # the GPUs that are there
        ("75 80 86 90", [(9, 0), (7, 5)], None, "7.5;9.0+PTX"),
        ("75 80 86 90", [(12, 0)], None, "9.0+PTX"),  # a GPU newer than nvcc runs its newest PTX
        ("75 80 86 90", [(8, 6)], "8.0 9.0a", "8.0;9.0a"),  # the user's list
        ("75 80 86 90", [(8, 6)], "7.5;9.0+PTX", "7.5;9.0+PTX"),
        ("75 80 86 90", [(8, 6)], "  ", "8.6+PTX"),  # blank: no list
        ("", [], "8.0", "8.0"),  # an nvcc that does not say what it knows
    ],
)
def test_architectures(build, machine, archs, capabilities, variable, expected):
    machine.wrap(machine.toolkit(archs=archs))
    environ = machine.environ | ({"TORCH_CUDA_ARCH_LIST": variable} if variable else {})
    decision = build.decide_cuda(torch_cuda="13.0", capabilities=capabilities, environ=environ)
    assert decision.architectures == expected


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("banana", r"must be numbers such as '8.0;9.0\+PTX', got 'banana'"),
        ("8.0;Hopper", "got 'Hopper'"),
        ("80", "got '80'"),
        ("8.0;3.5", "has 3.5, and .* compiles for 7.5, 8.0$"),
    ],
)
@pytest.mark.parametrize("request_", ["auto", "1"])
def test_a_wrong_list_of_architectures_is_no_build_without_cuda(build, machine, variable, reason, request_):
    machine.wrap(machine.toolkit(archs="75 80"))
    environ = machine.environ | {"TORCH_CUDA_ARCH_LIST": variable, "IMAML_EXT_CUDA": request_}
    with pytest.raises(build.BuildError, match=f"^TORCH_CUDA_ARCH_LIST .*{reason}"):
        build.decide_cuda(torch_cuda="13.0", environ=environ)


# --- the C++ compiler, the machine and the sources ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "launcher", "command"),
    [
        (None, "", ["c++"]),
        ("", "", ["c++"]),
        ("clang++", "", ["clang++"]),
        ("g++ -m64", "", ["g++", "-m64"]),
        ("ccache g++", "ccache", ["g++"]),
        ("/opt/my\\ tools/sccache /usr/bin/g++-12 -B/x", "/opt/my tools/sccache", ["/usr/bin/g++-12", "-B/x"]),
        ("ccache", "", ["ccache"]),
    ],
)
def test_compiler_command(build, variable, launcher, command):
    environ = {} if variable is None else {"CXX": variable}
    assert build.compiler_command(environ) == (launcher, command)


def test_no_compiler(build, machine):
    with pytest.raises(build.BuildError, match=r"^there is no C\+\+ compiler 'c\+\+' .*install g\+\+ 11"):
        build.probe_compiler(machine.environ)
    with pytest.raises(build.BuildError, match=r"^there is no C\+\+ compiler 'ccache' \(CXX=ccache g\+\+\)"):
        build.probe_compiler(machine.environ | {"CXX": "ccache g++"})


def test_a_compiler_that_is_too_old(build, machine, monkeypatch):
    refuse = "echo 'g++-7: error: unrecognized -std=c++20'; echo 'compilation terminated.'; exit 1\n"
    write_script(machine.bin / "g++-7", refuse)
    monkeypatch.setenv("PATH", str(machine.bin), prepend=os.pathsep)
    with pytest.raises(build.BuildError, match=r"CXX=g\+\+-7\) cannot compile C\+\+20: g\+\+-7: error: unrecog"):
        build.probe_compiler(machine.environ | {"CXX": "g++-7"})


def test_a_launcher_is_given_the_compiler(build, machine, monkeypatch):
    write_script(machine.bin / "ccache", f'echo "$@" > {machine.root}/told\n')
    write_script(machine.bin / "g++", "exit 1\n")
    monkeypatch.setenv("PATH", str(machine.bin), prepend=os.pathsep)
    build.probe_compiler(machine.environ | {"CXX": "ccache g++ -m64"})
    assert (machine.root / "told").read_text().startswith("g++ -m64 -std=c++20 ")


def test_nvcc_is_given_the_compiler_alone(build, machine):
    root = machine.toolkit()
    machine.wrap(root)
    assert build.decide_cuda(torch_cuda="13.0", environ=machine.environ | {"CXX": "ccache g++ -m64"}).build
    assert "-ccbin g++ " in (root / "compiled").read_text()


def test_this_machines_compiler(build):
    build.probe_compiler(os.environ)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_wrong_number_of_jobs(build, value):
    with pytest.raises(build.BuildError, match=f"^MAX_JOBS must be a whole number of at least 1, got '{value}'"):
        build.parallel_jobs({"MAX_JOBS": value})


def test_jobs_follow_processors_and_free_memory(build, monkeypatch):
    assert build.parallel_jobs({"MAX_JOBS": "7"}) == 7
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda process: range(16), raising=False)
    for free, jobs in ((2**20, 1), (5 * 2**30, 2), (100 * 2**30, 16), (float("inf"), 16)):
        monkeypatch.setattr(build, "free_memory", lambda free=free: free)
        assert build.parallel_jobs({}) == jobs


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("8589934592", 6 * 2**30), ("max", 16 * 2**30), (None, 16 * 2**30), ("99999999999", 16 * 2**30)],
)
def test_free_memory_is_the_machines_or_the_containers(build, tmp_path, limit, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {16 * 2**20} kB\n")
    if limit is not None:
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{2 * 2**30}\n")
    assert build.free_memory(tmp_path) == expected
    assert build.free_memory(tmp_path / "nothing") == float("inf")


@pytest.mark.parametrize(
    ("platform", "setuptools", "reason"),
    [
        ("win32", "80.0", "is built on Linux and macOS, not on win32; under Windows use WSL 2"),
        ("linux", "76.1.0", "needs setuptools 77 or later, and this is 76.1.0: pip install 'setuptools>=77'"),
    ],
)
def test_what_a_build_needs_first(build, tmp_path, platform, setuptools, reason):
    with pytest.raises(build.BuildError, match=reason):
        build.check_build_host(tmp_path, platform=platform, setuptools=setuptools)
    build.check_build_host(tmp_path, platform="linux", setuptools="77.0.3")


def test_sources_that_cannot_be_written_to(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(build.BuildError, match=f"the sources in {tmp_path} cannot be written to, .*: copy them"):
        build.check_build_host(tmp_path, platform="linux", setuptools="80.0")


@pytest.mark.parametrize(("cuda", "expected"), [(None, False), ("13.2", True)])
def test_decide_for_torch_asks_torch(build, machine, monkeypatch, cuda, expected):
    import torch

    machine.wrap(machine.toolkit())
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # CUDA without a GPU must not turn CUDA off
    assert build.decide_for_torch(machine.environ).build is expected


def test_a_real_nvcc_if_there_is_one(build):
    """The stand-ins above are only as good as their likeness to nvcc."""
    try:
        nvcc = build.find_nvcc(os.environ)
    except build.BuildError as error:
        pytest.skip(str(error))
    toolkit = build.probe_toolkit(nvcc, os.environ)
    assert (toolkit.root / "bin" / "nvcc").is_file()
    assert build.choose_architectures(nvcc, environ={}).endswith("+PTX")
