"""The kernels of one token as they are compiled for Hopper, at the sizes of TNL-1B; test_few_rows.py runs this.

Checked are the order that `lasp_kernels.launch.early` tells (nothing is read or written before the wait), that the
weight goes to memory of the multiprocessor by itself, and that no register is spilled. No GPU is needed.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lasp_kernels import decode_kernels, few_rows

PROCESSORS = 132
MOVES = re.compile(r"\b(ld|st|atom|red)\.global|cp\.async\.c[ag]")


def ptx(kernel, tensors, numbers, warps, **constants):
    """With addresses and strides that are multiples of 16."""
    signature, given, aligned = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        kind = tensors.get(name) or numbers.get(name)
        signature[name] = kind or "constexpr"
        if kind is None:
            given.setdefault(name, None)
        elif kind[0] == "*" or name.endswith("_r"):
            aligned[i,] = [["tt.divisibility", 16]]
    given = {(kernel.arg_names.index(name),): value for name, value in given.items()}
    source = ASTSource(kernel, signature, given, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


def check(name, text, *, asks=True):
    lines = text.splitlines()
    wait = next(i for i, line in enumerate(lines) if "griddepcontrol.wait" in line)
    begins = next(i for i, line in enumerate(lines) if "griddepcontrol.launch_dependents" in line)
    moves = [i for i, line in enumerate(lines) if MOVES.search(line)]
    assert moves, name
    assert wait < begins < min(moves), f"{name}: something is read or written before the wait"
    asked = [i for i, line in enumerate(lines) if "prefetch.L2" in line]
    assert bool(asked) == asks, f"{name}: {len(asked)} asked for"
    assert all([i < wait for i in asked]), f"{name}: asked for too late"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", path, "-o", Path(folder) / "kernel.o"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, f"{name}: {said}"
    print(name, re.findall(r"Used \d+ registers", said))


def layers():
    numbers = {f"N{i}": "i32" for i in range(4)} | {"eps": "fp32", "rows": "i32"}
    numbers |= dict.fromkeys(("x_r", "gate_r", "residual_r"), "i32")
    several = dict.fromkeys(("X", "Y", "W0", "W1", "W2", "W3"), "*bf16")
    single = dict.fromkeys(("X", "Y", "W0", "GATE", "RESIDUAL"), "*bf16")
    for name, tensors, D, outputs, weights in (
        ("q k v gate", several, 2048, 8192, 4),
        ("out", single, 2048, 2048, 1),
        ("glu out", single, 5632, 2048, 1),
    ):
        call = {"D": D, "WEIGHTS": weights, "NORMED": int(D == 2048), "ACTIVATION": 0, "SILU": weights - 1}
        call["EARLY"] = True
        block = few_rows._blocks(outputs, D, PROCESSORS)
        asked = few_rows._asked(block.asked, block.outputs, D, 2, outputs // block.outputs, PROCESSORS)
        constants = {"BN": block.outputs, "BD": block.columns, **asked, **call}
        text = ptx(few_rows.one_row_kernel, tensors, numbers, block.warps, **constants)
        assert re.search(r"ld\.global\S*\.v4", text), f"{name}: short reads"
        check(name, text)
        for rows in (16, 64):
            tile = few_rows._tiles(outputs, rows, weights, PROCESSORS)
            parts = dict.fromkeys(("PARTS", "SQUARES"), "*fp32") if tile.shared > 1 else {}
            constants = {"BM": tile.rows, "BN": tile.outputs, "BK": tile.columns, "SHARED": tile.shared}
            programs = outputs // tile.outputs * tile.shared
            asked = few_rows._asked(tile.asked, tile.outputs, D // tile.shared, 2, programs, PROCESSORS)
            constants |= {"STAGES": tile.stages, "LOW": tl.bfloat16, **asked}
            text = ptx(few_rows.rows_kernel, tensors | parts, numbers, tile.warps, **constants, **call)
            assert "cp.async.cg" in text, f"{name}, {rows} rows: no copies under way"
            check(f"{name}, {rows} rows", text)


def sums():
    tensors = {"PARTS": "*fp32", "SQUARES": "*fp32", "RESIDUAL": "*bf16", "Y": "*bf16"}
    numbers = {"eps": "fp32", "N": "i32", "rows": "i32", "residual_r": "i32"}
    constants = {"D": 2048, "NORMED": 1, "SILU": 0, "SHARED": 4, "BLOCK": few_rows.SUMS, "EARLY": True}
    check("sum", ptx(few_rows.sum_kernel, tensors, numbers, 2, **constants), asks=False)


def step():
    tensors = dict.fromkeys(("Q", "KEY", "VALUE", "OUT"), "*bf16") | {"DECAY": "*fp32", "STATE": "*fp32"}
    numbers = dict.fromkeys(("H", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h"), "i32") | {"scale": "fp32"}
    constants = {"K": 128, "V": 128, "BK": 128, "GROUP": 1, "SHARE": 1, "FORM": 1, "NORMALIZE": 0, "LOOPS": 1}
    for columns, warps, asks in ((16, 2, True), (64, 8, False)):
        constants |= {"BV": columns, "AHEAD": int(asks), "EARLY": True}
        check(f"step, {columns}", ptx(decode_kernels.step_kernel, tensors, numbers, warps, **constants), asks=asks)


if __name__ == "__main__":
    layers()
    sums()
    step()
