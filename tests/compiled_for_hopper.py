"""The kernels of one token as they are compiled for Hopper, at the sizes of TNL-1B; test_few_rows.py runs this.

Nothing is read, written or asked for before the wait of `lasp_kernels.launch.early`, weights come in reads of 16 bytes,
and no register is spilled. No GPU is needed.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lasp_kernels import decode_kernels, few_rows

MOVES = re.compile(r"\b(ld|st|atom|red)\.global|cp\.async|prefetch")


def check(name, kernel, tensors, numbers, warps, **constants):
    """Of addresses and strides that are multiples of 16."""
    signature, given, aligned = {}, {"EARLY": True, **constants}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = signature[argument] = tensors.get(argument) or numbers.get(argument) or "constexpr"
        if kind == "constexpr":
            given.setdefault(argument, None)
        elif kind[0] == "*" or argument.endswith("_r"):
            aligned[i,] = [["tt.divisibility", 16]]
    given = {(kernel.arg_names.index(argument),): value for argument, value in given.items()}
    source = ASTSource(kernel, signature, given, aligned)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    lines = text.splitlines()
    wait, begins = (
        next(i for i, line in enumerate(lines) if f"griddepcontrol.{what}" in line)
        for what in ("wait", "launch_dependents")
    )
    moves = [i for i, line in enumerate(lines) if MOVES.search(line)]
    assert moves, name
    assert wait < begins < min(moves), f"{name}: something is read or written before the wait"
    assert re.search(r"ld\.global\S*\.v4", text), f"{name}: short reads"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", path, "-o", Path(folder) / "kernel.o"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, f"{name}: {said}"


def layers():
    numbers = dict.fromkeys(("N0", "N1", "N2", "N3", "rows", "x_r", "gate_r", "residual_r"), "i32") | {"eps": "fp32"}
    several = dict.fromkeys(("X", "Y", "W0", "W1", "W2", "W3"), "*bf16")
    single = dict.fromkeys(("X", "Y", "W0", "GATE", "RESIDUAL"), "*bf16")
    for name, tensors, D, outputs, weights in (
        ("q k v gate", several, 2048, 8192, 4),
        ("out", single, 2048, 2048, 1),
        ("glu out", single, 5632, 2048, 1),
    ):
        block = few_rows._blocks(outputs, D, 132)
        constants = {"D": D, "WEIGHTS": weights, "NORMED": int(D == 2048), "ACTIVATION": 0, "SILU": weights - 1}
        constants |= {"BN": block.outputs, "BD": block.columns}
        check(name, few_rows.one_row_kernel, tensors, numbers, block.warps, **constants)


def step():
    tensors = dict.fromkeys(("Q", "KEY", "VALUE", "OUT"), "*bf16") | {"DECAY": "*fp32", "STATE": "*fp32"}
    numbers = dict.fromkeys(("H", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h"), "i32") | {"scale": "fp32"}
    constants = {"K": 128, "V": 128, "BK": 128, "GROUP": 1, "SHARE": 1, "FORM": 1, "NORMALIZE": 0, "LOOPS": 1}
    for columns, warps in ((16, 2), (64, 8)):
        check(f"step, {columns}", decode_kernels.step_kernel, tensors, numbers, warps, BV=columns, **constants)


if __name__ == "__main__":
    layers()
    step()
