"""Compile every variant for real architectures with no GPU, and say what came out.

`python -m bd_kernels.compile_check [--arch 80 90 100] [--match TEXT] [--usual]` prints one JSON line per compilation.
A fault is shared memory above the architecture's limit, a register spill, or a dot that did not become a tensor-core
instruction; the exit code counts them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bd_kernels.variants import Compiled, table

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use (CUDA guide, table of limits)
TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


def check(variant: Compiled, arch: int) -> dict:
    """Compile for sm_`arch`; registers and spills are what ptxas -v says of the very cubin that would run."""
    kernel = variant.kernel
    constants = variant.constants | {name: kind for name, kind in variant.types.items() if kind == 1}
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in kernel.arg_names}
    # the launcher finds pointers and strides divisible by 16 by itself; here it is said
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or "stride" in name]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if list(signature.values())[i] != "constexpr"}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    ptx, said = compiled.asm["ptx"], log.getvalue()
    registers = re.search(r"Used (\d+) registers", said)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    found = [name for name in TENSOR_CORE if name in ptx]
    shared = compiled.metadata.shared
    faults = []
    if registers is None:
        faults.append("ptxas said nothing")
    if spills:
        faults.append("spills")
    if shared > SHARED_LIMIT[arch]:
        faults.append("shared memory")
    if variant.dot and not found:
        faults.append("no tensor cores")
    return {
        "kernel": variant.name,
        "arch": arch,
        "shared": shared,
        "registers": int(registers[1]) if registers else None,
        "spills": spills,
        "tensor_core": found,
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=list(SHARED_LIMIT))
    parser.add_argument("--match", default="")
    parser.add_argument("--usual", action="store_true")
    options = parser.parse_args()
    # a cached binary has no ptxas log to read
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    faults = 0
    for variant in table(options.usual):
        if options.match in variant.name:
            for arch in options.arch:
                report = check(variant, arch)
                faults += bool(report["faults"])
                print(json.dumps(report), flush=True)
    return min(faults, 100)


if __name__ == "__main__":
    sys.exit(main())
