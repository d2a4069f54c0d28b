"""Compile every kernel for a Hopper GPU, which needs none: the interpreter runs what the compiler refuses."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchtitan_ext.lighthouse import kernels

POINTERS = {
    **dict.fromkeys(("q", "k", "x", "gathered", "out"), "*bf16"),
    **dict.fromkeys(("scores", "freqs"), "*fp32"),
    **dict.fromkeys(("slots", "scratch"), "*i32"),
}


def compile_kernel(kernel, num_warps, **constants):
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


shape = {"P": 4, "LEVELS": 3}
compile_kernel(kernels._score_kernel, 4, GROUP=2, R=64, BLOCK_D=128, **shape)
select = {"WINNERS": 32, "TILES": 4, "COARSEST": 128, "BLOCK": 128, **shape}
spans = {"GROUP": 2, "ENTRIES": 2, "BLOCK_D": 128, **shape}
for chunks in (1, 2):
    compile_kernel(kernels._select_kernel, 4, STARTS_SEQUENCE=True, CHUNKS=chunks, **select)
    of_gather = [{"SHIFT": 0, "MEAN": True, "ROPE": rope} for rope in (0, 1, 2)]
    of_scatter = {"SHIFT": 1, "MEAN": False, "ROPE": 0}
    for kernel, at_once, settings in (
        (kernels._reduce_kernel, kernels._REDUCE_AT_ONCE, [*of_gather, of_scatter]),
        (kernels._spread_kernel, kernels._SPREAD_AT_ONCE, [*of_gather, of_scatter]),
    ):
        for of_use in settings:
            no_table = {} if of_use["ROPE"] else {"freqs": None}
            compile_kernel(kernel, 1, CHUNKS=chunks, AT_ONCE=at_once, **no_table, **of_use, **spans)
