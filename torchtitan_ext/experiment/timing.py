"""Time functions: by events on a GPU, by the host's clock on a CPU."""

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)  # of what is timed


def this_machine() -> dict[str, str | int | None]:
    device = torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine()
    return {"device": device, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version() if ON_GPU else None}


def _record() -> Any:
    """A point in time: an event on a GPU, milliseconds on a CPU."""
    if not ON_GPU:
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def random_qkv(n_rows: int, heads: int, kv_heads: int, dim: int, value_dim: int = 0) -> list[Tensor]:
    """q [1, n_rows, heads, dim], k and v [1, n_rows, kv_heads, ...] that need gradients."""
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)]
    return [torch.randn(1, n_rows, *shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in shapes]


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(function(*inputs), inputs, grad)


def interleaved_times_ms(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call of each function; repeats are interleaved, after `warm_up` calls."""
    calls: dict[str, list] = {name: [] for name in functions}
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            begin = _record()
            function()
            calls[name].append((begin, _record()))
    if ON_GPU:
        torch.cuda.synchronize()
        return {name: [begin.elapsed_time(end) for begin, end in times[warm_up:]] for name, times in calls.items()}
    return {name: [end - begin for begin, end in times[warm_up:]] for name, times in calls.items()}


def times_ms(function: Callable[[], object], repeats: int) -> list[float]:
    return interleaved_times_ms({"": function}, repeats, warm_up=3)[""]


def peak_gib(function: Callable[[], object]) -> float | None:
    """Peak GiB allocated on the GPU during a second call of the function; None on a CPU."""
    if not ON_GPU:
        return None
    function()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**30


def kernels_ms(function: Callable[[], object], repeats: int) -> float:
    """Mean milliseconds of the function's kernels on the GPU, without gaps between launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / repeats / 1e3


def copy_gb_s() -> float:
    """GB/s, read and written, of the best of 20 large copies."""
    source = torch.randn(2**29 if ON_GPU else 2**25, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(times_ms(lambda: target.copy_(source), 20)) / 1e6
