"""benchmarks/kernel_report.py, on recorded output of cuobjdump and, where there is nvcc, on kernels compiled here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kernel_report  # noqa: E402
from kernel_report import Kernel  # noqa: E402

from imaml_ext import _build  # noqa: E402

USAGE = """
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN4test4copyIfLi4EEEvPT_:
  REG:54 STACK:8 SHARED:2432 LOCAL:0 CONSTANT[0]:708 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = """
.nv.info._ZN4test4copyIfLi4EEEvPT_
\t<0x1>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0x40
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x2 0x1 
\t<0x3>
\tAttribute:\tEIATTR_CRS_STACK_SIZE

.nv.callgraph
\tValue:\t0x1
"""  # noqa: W291

# Below each other: a whole pack; one in pieces of 4 bytes; one in halves; pieces of which each has its own condition;
# pieces of different packs, the address being changed in between; spills and the rest.
SASS = """
\t\tFunction : _ZN4test4copyIfLi4EEEvPT_
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R7, desc[UR4][R2.64+0x10] ;
        /*0030*/               @P0 LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0040*/                   STG.E.128 desc[UR4][R4.64], R8 ;
        /*0050*/                   STG.E desc[UR4][R4.64+0x20], R8 ;
        /*0060*/                   STG.E desc[UR4][R4.64+0x24], R9 ;
        /*0070*/                   FFMA R12, R12, R13, R14 ;
        /*0080*/                   STG.E desc[UR4][R4.64+0x2c], R11 ;
        /*0090*/                   STG.E desc[UR4][R4.64+0x28], R10 ;
        /*00a0*/                   STG.E.64 desc[UR4][R4.64+0x30], R10 ;
        /*00b0*/                   STG.E.64 desc[UR4][R4.64+0x38], R12 ;
        /*00c0*/              @!P1 STG.E desc[UR4][R6.64], R8 ;
        /*00d0*/              @!P2 STG.E desc[UR4][R6.64+0x4], R9 ;
        /*00e0*/                   ISETP.GE.AND P1, PT, R0, R3, PT ;
        /*00f0*/              @!P1 STG.E desc[UR4][R6.64+0x8], R10 ;
        /*0100*/              @!P2 STG.E desc[UR4][R6.64+0xc], R11 ;
        /*0110*/                   STG.E.64 desc[UR4][R4.64], R10 ;
        /*0120*/                   IADD3 R5, R5, 0x10, RZ ;
        /*0130*/                   STG.E.64 desc[UR4][R4.64+0x8], R12 ;
        /*0140*/                   STL.64 [R1], R8 ;
        /*0150*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0160*/                   EXIT ;
"""

SOURCE = """
template <int kPieces>
__global__ void __launch_bounds__(256, 2) copy(const float4* from, float* to) {
  __shared__ float4 kept[256];
  kept[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const float4 value = kept[threadIdx.x ^ 1];
  if (kPieces == 1) {
    __stcg(reinterpret_cast<float4*>(to) + threadIdx.x, value);
  } else {
    volatile float* const place = to + 4 * threadIdx.x;
    place[0] = value.x;
    place[1] = value.y;
    place[2] = value.z;
    place[3] = value.w;
  }
}
template __global__ void copy<1>(const float4*, float*);
template __global__ void copy<4>(const float4*, float*);
"""


def recorded() -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {}
    kernel_report.read_usage(USAGE, kernels)
    kernel_report.read_bounds(ELF, kernels)
    kernel_report.read_code(SASS, kernels)
    return kernels


def test_a_recorded_dump_is_read():
    (kernel,) = recorded().values()
    assert (kernel.registers, kernel.shared, kernel.stack) == (54, 1408, 8)
    assert (kernel.threads, kernel.most_registers) == (512, 64)
    assert kernel.stores == {"16": 1, "4": 8, "8": 4}
    assert kernel.in_pieces == {"4": 1, "8": 1}
    assert kernel.loads == {"16": 1, "2": 1}
    assert (kernel.async_copies, kernel.local, kernel.barriers, kernel.ffma) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        (Kernel(threads=1024, registers=32), 2),  # 64 warps
        (Kernel(threads=32, registers=16), 32),  # as many as there can be
        (Kernel(threads=256, registers=128), 2),  # 16 warps by registers
        (Kernel(threads=256, registers=129), 1),  # a warp's registers by 256: 12 warps
        (Kernel(threads=256, registers=32, shared=44032), 5),
        (Kernel(threads=512, registers=32, shared=228 * 1024 // 2 - 1024), 2),
        (Kernel(threads=512, registers=32, shared=228 * 1024 // 2 - 1023), 1),
    ],
)
def test_blocks_per_multiprocessor(kernel, blocks):
    assert kernel.blocks == blocks


def test_each_rule_can_be_broken():
    whole = {"16": 3}
    kernels = {
        "row_kernel<CgStep<float>>": Kernel(stores=whole | {"4": 2}, in_pieces={"4": 3}),
        "row_kernel<CgStep<c10::Half>>": Kernel(stores=whole, stack=64, local=30),
        "row_kernel<CgBegin<c10::Half>>": Kernel(stores=whole, stack=65, local=30),
        "row_kernel<Penalty<float>>": Kernel(stores={"4": 2}, in_pieces={"4": 1}),
        "stack": Kernel(stack=8),
        "local": Kernel(local=2),
        "promise": Kernel(threads=256, registers=64, most_registers=64, shared=100_000),
        "rule_kernel<c10::Half>": Kernel(stores={"2": 8}),
        "product_kernel<Tile<float, 32>>": Kernel(stores=whole | {"4": 4}, in_pieces={"4": 1}),
    }
    broken = list(kernel_report.broken_rules(kernels))
    assert broken == [
        "row_kernel<CgBegin<c10::Half>> has a stack of 65 bytes per thread.",
        "stack has a stack of 8 bytes per thread.",
        "local loads from or stores to local memory (2 × in its code).",
        "promise promises 4 blocks per multiprocessor, and 2 fit.",
        "rule_kernel<c10::Half> has rows of 16-byte packs and stores none at once.",
        "product_kernel<Tile<float, 32>> stores 16 bytes in pieces (1 × in its code).",
    ]


def test_names_are_short():
    name = (
        "void imaml_ext::(anonymous namespace)::step_kernel<c10::Half, 8, (bool)1>(imaml_ext::Arguments<int (*)(int)>)"
    )
    assert kernel_report.short_name(name) == "step_kernel<c10::Half, 8, (bool)1>"
    assert kernel_report.short_name("void outer<Tile<float, 2> >(Tile<float, 2>::T*)") == "outer<Tile<float, 2>>"


def test_a_comparison_shows_what_has_changed():
    (kernel,) = recorded().values()
    before = {"same": kernel, "gone": kernel, "changed": Kernel(registers=60)}
    after = {"same": kernel, "new": kernel, "changed": Kernel(registers=40, threads=512)}
    lines = {line.split("  ")[0]: line for line in kernel_report.table(after, before).splitlines()}
    assert "60 → 40" in lines["changed"]
    assert "1024 → 512" in lines["changed"]
    assert "→" not in lines["same"]
    assert {"+ new", "− gone"} <= set(lines)


def test_compiled_kernels_are_reported(tmp_path, monkeypatch, capsys):
    try:
        nvcc = _build.find_nvcc(os.environ)
        kernel_report.find_cuobjdump()
    except (_build.BuildError, kernel_report.ReportError) as error:
        pytest.skip(str(error))
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    source, report = tmp_path / "copy.cu", tmp_path / "report.json"
    source.write_text(SOURCE)
    subprocess.run([nvcc, "-arch=sm_90", "-c", source, "-o", tmp_path / "copy.o"], check=True)

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["kernel_report.py", *map(str, arguments)])
        return kernel_report.main()

    assert run(tmp_path, "--json", report, "--check") == 0
    written = json.loads(report.read_text())
    assert written["stamp"]["architecture"] == "sm_90"
    assert written["stamp"]["nvcc"].startswith("V")
    assert set(written["kernels"]) == {"copy<1>", "copy<4>"}
    for kernel in written["kernels"].values():
        assert (kernel["threads"], kernel["shared"], kernel["stack"], kernel["loads"]) == (256, 4096, 0, {"16": 1})
        assert kernel["most_registers"] == 128
    assert written["kernels"]["copy<1>"]["stores"] == {"16": 1}
    assert written["kernels"]["copy<4>"]["stores"] == {"4": 4}
    assert written["kernels"]["copy<4>"]["in_pieces"] == {"4": 1}
    capsys.readouterr()
    assert run(tmp_path / "copy.o", "--compare", report) == 0
    assert "→" not in capsys.readouterr().out
