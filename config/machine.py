"""The machine that a script runs on: processes, signals, device, matmul dtype, compiler, memory and speed."""

import contextlib
import ctypes
import math
import os
import signal
import sys

import torch
from torch import Tensor

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, from the vendor's data sheets


class Ranks:
    """The processes of a run: one, or as many as torchrun started; and this one's rank and device."""

    def __init__(self, device: str):
        """Join the other processes; only rank 0 prints from here on. Raises ValueError if the device cannot be used."""
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def share(self, n: int) -> range:
        """Which of n pieces of work are this rank's: rank, rank + world_size, ..."""
        return range(self.rank, n, self.world_size)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value, summed over the ranks."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self):
        """Wait for the other ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


class StopSignal:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested = True
        os.write(2, b"finishing the step, then saving; once more stops at once\n")  # print() is not reentrant
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto": cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls; "auto": bfloat16 where the hardware multiplies it faster, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.bfloat16 if device.type == "cpu" and has_amx else torch.float32


def prepare_cpu():
    """Process settings that make a CPU faster."""
    torch.set_flush_denormal(True)  # at low tau, routing weights are denormal (1e-40), which would halve the speed
    # glibc returns freed tensors to the system, and the next tensors fault the pages in again, one by one: 11 of 163 ms
    # in a step of the benchmark's feed-forward layer. With these settings it keeps up to 512 MiB.
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: free memory to keep at the end of the heap
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: size from which a block is mapped by itself


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works here; prints why if not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
        return True
    except Exception as e:  # no C++ compiler, no Python headers, no Triton: each raises its own type
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        print(f"going on uncompiled, slower: torch.compile does not work here ({reason.strip()[:150]})")
        return False


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a GPU, dense bf16; NaN if unknown."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), math.nan)


def flops_per_token(model: torch.nn.Module, length: int | None = None) -> float:
    """Floating-point operations of a training token, forward and backward, in rows of `length` (block_size) tokens.

    6 per parameter, except an untied embedding, which is only looked up, and 12 n_layer n_head head_dim T for
    attention over the full T x T, although causal and document masks skip part of it (arXiv 2204.02311, app. B).
    """
    c = model.config
    attention = 12 * c.n_layer * c.n_head * c.head_dim * (length or c.block_size)
    lookup = 0 if c.tied_head else model.embedding.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - lookup) + attention


def estimate_memory(model: torch.nn.Module, cfg) -> int:
    """Bytes of GPU memory that a compiled run needs: an estimate, as in docs/performance.md."""
    c, tokens = model.config, cfg.micro_batch_size * model.config.block_size
    size = pick_dtype(cfg.dtype, model.device).itemsize  # of what a matmul reads
    # Kept for the backward pass, per token and block: the residual stream twice, both norms, the heads before and after
    # QK-norm and RoPE, attention's output, and gate, up and their product.
    heads = (3 * c.n_head + 4 * c.n_kv_head) * c.head_dim
    block = 2 * 4 * c.n_embd + size * (2 * c.n_embd + heads + 3 * c.d_ff)
    kept = tokens * (4 * c.n_embd * c.n_layer + block if cfg.recompute else block * c.n_layer)
    head = (4 + size) * (min(2**28, tokens * c.vocab_size) + c.n_embd * c.vocab_size)  # a chunk of logits, the gradient
    # A trained parameter takes 16 bytes: itself, its gradient and AdamW's two moments.
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) + kept + head


def print_start(model: torch.nn.Module, cfg, ranks: Ranks, compiled: bool):
    """Print the model and the machine; on a GPU also its memory and an estimate of what the run needs."""
    size, device, dtype = sum(p.numel() for p in model.parameters()), ranks.device, pick_dtype(cfg.dtype, ranks.device)
    machine = f"{ranks.world_size} x {device.type} in {str(dtype)[6:]}{', compiled' if compiled else ''}"
    tokens_per_step = cfg.batch_size * cfg.block_size
    print(
        f"{size:,} parameters, {'/'.join(cfg.activations)}, on {machine}; {tokens_per_step:,} tokens a step", flush=True
    )
    if device.type == "cuda":
        card, needed = torch.cuda.get_device_properties(device), estimate_memory(model, cfg) / 2**30
        more = "" if compiled else " when compiled; uncompiled it needs more and may not fit"
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB; the run needs an estimated {needed:.0f} GiB{more}")
    if compiled:
        print("compiling, about half a minute", flush=True)
