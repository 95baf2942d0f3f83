"""What nvcc has made of every kernel: registers, shared memory, blocks per multiprocessor, kinds of loads and stores.

    python benchmarks/kernel_report.py --json report.json                          # of the extension in imaml_ext/
    python benchmarks/kernel_report.py build/cmake --compare report.json --check   # of the objects below a folder

It reads machine code and needs no GPU. Blocks per multiprocessor are those of sm_90 with static shared memory alone: a
launch that asks for dynamic shared memory can have fewer, which cpp_tests/cuda_on_cpu reports (CUDA_ON_CPU_REPORT).

`--check` prints one sentence for each rule that a kernel breaks, and exits with 1 if there is one:

- A thread has no stack, and nothing is loaded from or stored to local memory: registers are neither spilled nor saved
  around a call. Rows of a half type, whose packs of 16 bytes hold eight numbers, may spill up to 64 bytes of a thread.
- Where launch bounds promise a number of blocks, so many fit. The number is read from the limit of registers that nvcc
  has made of it; one that limits no registers is not seen.
- A kernel that writes rows (those of PACKED) stores 16 bytes at once somewhere; one whose rows are always aligned
  (those of ALIGNED) stores them nowhere in pieces of 4 bytes or less.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from imaml_ext import _build  # noqa: E402

# sm_90, of a multiprocessor.
ARCHITECTURE = "sm_90"
WARPS, BLOCKS, REGISTERS, SHARED = 64, 32, 65536, 228 * 1024
RESERVED = 1024  # bytes of shared memory that the system takes for every block
MOST_REGISTERS = 255  # of a thread

# Beginnings of names.
PACKED = (
    "row_kernel<Cg",
    "row_kernel<Lsqr",
    "row_kernel<Minres",
    "rule_kernel<",
    "follow_kernel<",
    "product_kernel<",
    "back_kernel<",
)
ALIGNED = ("product_kernel<", "back_kernel<")
MOST_SPILLED = 64  # bytes of a thread, of rows of a half type


class ReportError(RuntimeError):
    """The objects cannot be read."""


@dataclass(kw_only=True)
class Kernel:
    """One kernel; loads, stores and instructions are counted as they stand in its code, not as they are executed."""

    threads: int = 1024  # of a block, by its launch bounds
    most_registers: int = MOST_REGISTERS  # of a thread, by its launch bounds
    registers: int = 0
    shared: int = 0  # bytes, static
    stack: int = 0  # bytes
    stores: dict[str, int] = field(default_factory=dict)  # to global memory, by bytes
    in_pieces: dict[str, int] = field(default_factory=dict)  # 16 bytes in a row stored one by one, by bytes of a piece
    loads: dict[str, int] = field(default_factory=dict)  # from global memory, by bytes
    async_copies: int = 0
    local: int = 0  # loads from and stores to local memory
    barriers: int = 0
    ffma: int = 0

    @property
    def blocks(self) -> int:
        """How many fit on a multiprocessor: warps get registers by 256, a quarter of a multiprocessor's warps each."""
        warps = -(-self.threads // 32)
        by_registers = WARPS
        if self.registers:
            by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // 4 * 4
        by_shared = SHARED // (-(-(self.shared + RESERVED) // 128) * 128)
        return min(BLOCKS, WARPS // warps, by_registers // warps, by_shared)

    @property
    def promised_blocks(self) -> int:
        if self.most_registers >= MOST_REGISTERS:
            return 1
        return max(1, REGISTERS // (self.most_registers * self.threads))


# --- from cuobjdump -------------------------------------------------------------------------------------------------


def find_cuobjdump() -> Path:
    """That of nvcc's toolkit, of the PATH or of Triton.

    Raises:
        ReportError: there is none.
    """
    try:
        toolkit = _build.toolkit_root(_build.find_nvcc(os.environ)) / "bin" / "cuobjdump"
    except _build.BuildError:
        toolkit = Path("cuobjdump")
    if found := shutil.which(str(toolkit)) or shutil.which("cuobjdump"):
        return Path(found)
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return bundled
    raise ReportError("no cuobjdump: neither nvcc's toolkit, nor the PATH, nor Triton has one")


def device_files(paths: Iterable[Path]) -> list[Path]:
    """The files, and the objects below the folders."""
    return [file for path in paths for file in (sorted(path.rglob("*.o")) if path.is_dir() else [path])]


def dump(cuobjdump: Path, option: str, file: Path) -> str:
    """What cuobjdump prints; nothing for a file without device code."""
    run = subprocess.run([cuobjdump, "-arch", ARCHITECTURE, option, file], capture_output=True, text=True)
    if run.returncode and "does not contain device code" not in run.stderr + run.stdout:
        raise ReportError(f"{cuobjdump} {option} {file}: {(run.stderr or run.stdout).strip()}")
    return "" if run.returncode else run.stdout


def read_usage(text: str, kernels: dict[str, Kernel]) -> None:
    """Of `--dump-resource-usage`: registers, stack and shared memory."""
    for name, usage in re.findall(r"^ *Function (\S+):\n(.*)$", text, flags=re.MULTILINE):
        numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        shared = max(0, numbers["SHARED"] - RESERVED)  # what the system takes is counted there, where there is any
        kernels[name] = Kernel(registers=numbers["REG"], shared=shared, stack=numbers["STACK"] + numbers["LOCAL"])


def read_bounds(text: str, kernels: Mapping[str, Kernel]) -> None:
    """Of `-elf`: what the launch bounds say."""
    for section in re.split(r"^(?=\.\S)", text, flags=re.MULTILINE):
        heading = re.match(r"\.nv\.info\.(\S+)", section)
        if heading is None or heading[1] not in kernels:
            continue
        kernel = kernels[heading[1]]
        values = dict(re.findall(r"EIATTR_(MAX_THREADS|MAXREG_COUNT)\s+Format:.*\s+Value:\s*(.*)", section))
        if "MAX_THREADS" in values:
            x, y, z = (int(size, 16) for size in values["MAX_THREADS"].split())
            kernel.threads = x * y * z
        kernel.most_registers = int(values.get("MAXREG_COUNT", hex(MOST_REGISTERS)), 16)


def read_code(text: str, kernels: Mapping[str, Kernel]) -> None:
    """Of `-sass`: the instructions."""
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        kernel = kernels.get(part.split(maxsplit=1)[0])
        if kernel is not None:
            _count(_INSTRUCTION.findall(part), kernel)


# Guard, operation, operands.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", flags=re.MULTILINE)
_BRANCHES = {"BRA", "BRX", "BREAK", "BSYNC", "CALL", "EXIT", "RET", "WARPSYNC"}


def _count(instructions: Iterable[tuple[str, str, str]], kernel: Kernel) -> None:
    pieces: dict[tuple[str, str, int], set[int]] = {}  # offsets stored at, by guard, address and bytes
    for guard, operation, operands in instructions:
        name, *modifiers = operation.split(".")
        kernel.async_copies += name == "LDGSTS"
        kernel.local += name in ("STL", "LDL")
        kernel.barriers += name == "BAR" and modifiers[:1] == ["SYNC"]
        kernel.ffma += name == "FFMA"
        if name in ("STG", "LDG"):
            by_bytes = kernel.stores if name == "STG" else kernel.loads
            size = next((size for size in map(_bytes_of, modifiers) if size), 4)
            _add(by_bytes, size)
        if name in _BRANCHES:
            pieces.clear()
        elif name != "STG":  # what it writes is another address, or another condition, from here on
            for written in re.findall(r"^(?:U?P\w+, )?(U?[RP]\d+)", operands):
                pair = f"{written[:-1]}{int(written[-1]) - 1}" if written[-1] in "13579" else written
                for key in [key for key in pieces if {written, pair} & set(re.findall(r"\w+", f"{key[0]} {key[1]}"))]:
                    del pieces[key]
        elif size < 16 and (address := re.search(r"\[(R\w+)[^\]+-]*([+-]0x[0-9a-f]+)?\]", operands)):
            offset = int(address[2] or "0", 16)
            key = (guard, address[1], size)
            stored = pieces.setdefault(key, set())
            stored.add(offset)
            first = offset // 16 * 16
            if stored.issuperset(range(first, first + 16, size)):
                _add(kernel.in_pieces, size)


def _add(by_bytes: dict[str, int], size: int) -> None:
    by_bytes[str(size)] = by_bytes.get(str(size), 0) + 1


def _bytes_of(modifier: str) -> int:
    """The bytes of a load or store, of 64, 128, U8, S16 and so on; 0 of any other modifier."""
    bits = re.fullmatch(r"[US]?(8|16|64|128)", modifier)
    return int(bits[1]) // 8 if bits else 0


def short_name(demangled: str) -> str:
    """Without return type, parameters and the namespaces that all share."""
    depth, end = 0, len(demangled)
    for i in range(len(demangled) - 1, -1, -1):  # the parameters, from their last bracket to its fellow
        depth += {")": 1, "(": -1}.get(demangled[i], 0)
        if depth == 0:
            end = i
            break
    name = demangled[:end] if demangled.endswith(")") else demangled
    name = re.sub(r"imaml_ext::|\(anonymous namespace\)::", "", name.removeprefix("void "))
    return name.replace("> >", ">>")


def demangled(names: list[str]) -> dict[str, str]:
    if (tool := shutil.which("cu++filt") or shutil.which("c++filt")) is None:
        raise ReportError("no c++filt on the PATH, which comes with every C++ compiler's binutils")
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, lines.splitlines(), strict=True))


def read_kernels(files: Iterable[Path]) -> tuple[dict[str, Kernel], str]:
    """All kernels by their short names, and the version of the compiler that made them.

    Raises:
        ReportError: there are none for sm_90, or two of one name.
    """
    cuobjdump, version = find_cuobjdump(), ""
    found: dict[str, Kernel] = {}
    owners: dict[str, str] = {}  # mangled names: a kernel can be in an object and in the extension
    for file in device_files(files):
        kernels: dict[str, Kernel] = {}
        read_usage(dump(cuobjdump, "--dump-resource-usage", file), kernels)
        if not kernels:
            continue
        elf = dump(cuobjdump, "-elf", file)
        if made_by := re.search(r"Tool Version:.*\b(V[\d.]+)", elf):
            version = made_by[1]
        read_bounds(elf, kernels)
        read_code(dump(cuobjdump, "-sass", file), kernels)
        for mangled, name in demangled(list(kernels)).items():
            if owners.setdefault(short_name(name), mangled) != mangled:
                raise ReportError(f"two kernels are called {short_name(name)}: a report holds one")
            found[short_name(name)] = kernels[mangled]
    if not found:
        raise ReportError(f"no kernel for {ARCHITECTURE} in {', '.join(map(str, files)) or 'no file'}")
    return dict(sorted(found.items())), version


# --- rules ----------------------------------------------------------------------------------------------------------


def broken_rules(kernels: Mapping[str, Kernel]) -> Iterator[str]:
    """A sentence for each rule that a kernel breaks."""
    for name, kernel in kernels.items():
        may_spill = re.match(r"row_kernel<.*<c10::(Half|BFloat16)>", name) is not None
        if kernel.stack > (MOST_SPILLED if may_spill else 0):
            yield f"{name} has a stack of {kernel.stack} bytes per thread."
        if kernel.local and not may_spill:
            yield f"{name} loads from or stores to local memory ({kernel.local} × in its code)."
        if kernel.blocks < kernel.promised_blocks:
            yield f"{name} promises {kernel.promised_blocks} blocks per multiprocessor, and {kernel.blocks} fit."
        if name.startswith(PACKED) and "16" not in kernel.stores:
            yield f"{name} has rows of 16-byte packs and stores none at once."
        if name.startswith(ALIGNED) and (n := sum(k for size, k in kernel.in_pieces.items() if int(size) < 8)):
            yield f"{name} stores 16 bytes in pieces ({n} × in its code)."


# --- the table ------------------------------------------------------------------------------------------------------


def columns(kernel: Kernel) -> dict[str, int]:
    def narrower(by_bytes: Mapping[str, int]) -> int:
        return sum(count for size, count in by_bytes.items() if size != "16")

    return {
        "threads": kernel.threads,
        "registers": kernel.registers,
        "shared": kernel.shared,
        "stack": kernel.stack,
        "blocks": kernel.blocks,
        "st 16 B": kernel.stores.get("16", 0),
        "st less": narrower(kernel.stores),
        "in pieces": sum(kernel.in_pieces.values()),
        "ld 16 B": kernel.loads.get("16", 0),
        "ld less": narrower(kernel.loads),
        "async": kernel.async_copies,
        "local": kernel.local,
        "barriers": kernel.barriers,
        "FFMA": kernel.ffma,
    }


def table(kernels: Mapping[str, Kernel], before: Mapping[str, Kernel] | None = None) -> str:
    """A line per kernel; with `before`, "old → new" where they differ, + for a new kernel, − for one that is gone."""
    rows = [["kernel", *columns(Kernel())]]
    for name in sorted({*kernels, *(before or {})}):
        new = kernels.get(name)
        old = new if before is None else before.get(name)
        cells = columns(new or old or Kernel())
        texts = [str(cell) for cell in cells.values()]
        if new is not None and old is not None:
            pairs = zip(columns(old).values(), cells.values(), strict=True)
            texts = [str(b) if a == b else f"{a} → {b}" for a, b in pairs]
        mark = "+ " if old is None else "− " if new is None else ""
        rows.append([mark + name, *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        lines.append(
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])
        )
    return "\n".join(lines)


def write(path: Path, kernels: Mapping[str, Kernel], nvcc: str) -> None:
    """The report as JSON, a line per kernel."""
    stamp = {"commit": commit(), "nvcc": nvcc, "architecture": ARCHITECTURE}
    rows = [json.dumps(name) + ": " + json.dumps({**asdict(k), "blocks": k.blocks}) for name, k in kernels.items()]
    body = ",\n  ".join(rows)
    path.write_text(f'{{\n "stamp": {json.dumps(stamp)},\n "kernels": {{\n  {body}\n }}\n}}\n', encoding="utf-8")


def load(path: Path) -> dict[str, Kernel]:
    """The kernels of a report written by `--json`."""
    known = {f.name for f in fields(Kernel)}
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return {name: Kernel(**{k: v for k, v in kernel.items() if k in known}) for name, kernel in kernels.items()}


def commit() -> str:
    """The checkout's commit, with a + where its files differ; "" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, help="objects, extensions, folders; default: imaml_ext/_C*.so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show what has changed since the report in FILE")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel breaks a rule")
    options = parser.parse_args()
    try:
        kernels, nvcc = read_kernels(options.files or sorted(ROOT.glob("imaml_ext/_C*.so")))
    except ReportError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(table(kernels, load(options.compare) if options.compare else None))
    if options.json:
        write(options.json, kernels, nvcc)
    broken = list(broken_rules(kernels)) if options.check else []
    print("\n".join(broken), end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
