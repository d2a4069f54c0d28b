"""Compile every kernel for a Hopper GPU, on any machine: the interpreter runs code that the compiler rejects."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchtitan_ext.lighthouse import triton_score, triton_select, triton_spans

POINTERS = {
    **dict.fromkeys(("q", "k", "x", "gathered", "out"), "*bf16"),
    **dict.fromkeys(("scores", "freqs"), "*fp32"),
    **dict.fromkeys(("slots", "scratch"), "*i32"),
}


def compile_kernel(kernel, sizes, num_warps, **constants):
    kinds = POINTERS | {"sizes": sizes(*["i32"] * len(sizes._fields))} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature={name: kinds[name] for name in kernel.arg_names}, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


spec = triton_score.Spec(p=4, levels=3, group=2, rows=64, block_d=128)
compile_kernel(triton_score._score_kernel, triton_score.Sizes, 4, SPEC=spec)
spec = triton_select.Spec(4, 3, 32, 4, coarsest=128, starts_sequence=True, chunks=2, block=128, scratch_len=193)
compile_kernel(triton_select._select_kernel, triton_select.Sizes, 4, SPEC=spec)
for p, levels, shift, rope, carry in (  # the last: spans that neither kernel loads at once
    (2, 4, 0, "none", False),
    (2, 4, 0, "selected", False),
    (2, 4, 0, "base", False),
    (8, 3, 1, "none", True),
):
    spec = triton_spans.Spec(p, levels, shift, rope, carry, chunks=2, group=2, entries=2, block_d=128)
    no_table = {"freqs": None} if rope == "none" else {}
    for kernel in (triton_spans._reduce_kernel, triton_spans._spread_kernel):
        compile_kernel(kernel, triton_spans.Sizes, 1, SPEC=spec, **no_table)
