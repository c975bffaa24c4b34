"""Benchmarks: what routing costs.

python -m extras.bench                        every row, at sizes that suit the device
python -m extras.bench --only=ffn,step        some of them: ffn, step, decode
python -m extras.bench --json=bench.json      also write the figures as JSON
python -m extras.bench --prepare_cpu=False    without train.py's settings for the CPU

The functions of a table are timed in interleaved rounds. A time is the median over the rounds; a ratio is the median of
each round's ratio to the first line, which depends less on what else the machine does.
"""

import functools
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.run import compiler_works, inference_dtype, pick_device, prepare_cpu, write_json
from common.settings import UserError, check_range, load, run
from common.weights import from_pretrained
from model import KVCache, ModelConfig, PolychromaticLM, PolyGLU, compute_dtype, set_tau
from train import TrainConfig, configure_optimizer

WARMUPS = 2  # untimed rounds, in which functions compile and allocate
VARIANTS = {"SwiGLU (K = 1)": ("silu",), "PolyGLU (K = 4)": ("relu", "tanh", "silu", "gelu")}
DEFAULTS = {  # of the settings that are None
    "cpu": {"n_embd": 512, "batch_size": 4, "block_size": 512, "settings": "config/tiny.py"},
    "cuda": {"n_embd": 1024, "batch_size": 8, "block_size": 4096, "settings": "config/pretrain.py"},
}


@dataclass
class BenchConfig:
    """Settings of the benchmarks."""

    only: tuple[str, ...] = ("ffn", "step", "decode")  # which rows to measure
    rounds: int = 15  # timed rounds
    n_embd: int | None = None  # ffn and decode: width; None: 512, on CUDA 1,024
    d_ff: int | None = None  # ffn and decode: neurons; None: 4 * n_embd
    batch_size: int | None = None  # ffn: rows of tokens; None: 4, on CUDA 8
    block_size: int | None = None  # ffn: tokens in a row; None: 512, on CUDA 4,096
    settings: str | None = None  # step: override file of the model; None: config/tiny.py, on CUDA config/pretrain.py
    init_from: str | None = None  # decode: any model that loads; None: 4 layers, random weights
    json: str | None = None  # file to write the figures to
    prepare_cpu: bool = True  # use the settings with which train.py makes a CPU faster
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32


def time_interleaved(functions: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, dict]:
    """Call the functions in turn, round by round: {name: {"ms", "ratio"}}. The warm-up rounds are not timed."""
    times = {name: [] for name in functions}
    for _ in range(WARMUPS + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    times = {name: ms[WARMUPS:] for name, ms in times.items()}
    first, results = next(iter(times.values())), {}
    for name, ms in times.items():
        ratio = statistics.median(t / t0 for t, t0 in zip(ms, first))
        results[name] = {"ms": statistics.median(ms), "ratio": ratio}
    return results


def kept_mib(layer: nn.Module, x: Tensor) -> float:
    """MiB that a forward pass keeps for the backward pass, without the parameters."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))  # freed with a part of the graph that is not needed
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _y = layer(x)  # holds the graph
    alive = [tensor.untyped_storage() for tensor in (ref() for ref in saved) if tensor is not None]
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    return sum(size for pointer, size in sizes.items() if pointer not in parameters) / 2**20


# ----------------------------------------------------------------------------------------------------------- benchmarks

Tables = Iterator[tuple[str, dict[str, dict]]]  # the title of each, and the figures of each line


def bench_ffn(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """One feed-forward layer, forward and backward."""
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device, requires_grad=True)
    grad_y = torch.randn_like(x)

    def step(layer: PolyGLU):
        with autocast:
            y = layer(x)
        y.backward(grad_y.to(y.dtype))
        layer.zero_grad()
        x.grad = None

    for mode in ("eager", "compiled") if compiler_works(device) else ("eager",):
        layers = {name: PolyGLU(cfg.n_embd, cfg.d_ff, activations) for name, activations in VARIANTS.items()}
        for layer in layers.values():
            set_tau(layer.to(device), 0.5)
            if mode == "compiled":
                layer.compile()
        steps = {name: functools.partial(step, layer) for name, layer in layers.items()}
        results = time_interleaved(steps, cfg.rounds, device)
        with autocast:
            for name, layer in layers.items():
                results[name]["kept_mib"] = kept_mib(layer, x)
        shape = f"{cfg.n_embd} -> {cfg.d_ff}, {cfg.batch_size} x {cfg.block_size:,} tokens"
        yield f"ffn, {mode}: {shape}, forward and backward", results


def bench_step(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """A training step, compiled where that works: forward, backward, clipping and AdamW."""
    settings, compiled = load(TrainConfig, [cfg.settings]), compiler_works(device)
    B, T = settings.micro_batch_size, settings.block_size
    tokens, targets = torch.randint(settings.vocab_size, (2, B, T), device=device)
    doc_ids = (torch.arange(T, device=device) * 3 // T).expand(B, T)  # three documents in a row

    def step(model: PolychromaticLM, optimizer: torch.optim.Optimizer):
        with autocast:
            loss = model(tokens, targets, doc_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    steps = {}
    for name, activations in VARIANTS.items():
        settings.activations = activations
        model = PolychromaticLM(settings.model_config()).to(device).train()
        if compiled:
            model.compile()
        steps[name] = functools.partial(step, model, configure_optimizer(model, settings))
    results = time_interleaved(steps, cfg.rounds, device)
    yield f"step: {cfg.settings}, {B} x {T:,} tokens{', compiled' * compiled}", results


@torch.no_grad()
def bench_decode(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """The token after a prompt of 128 to 4,096 tokens, decoded with the cache and without."""
    if cfg.init_from:
        model = from_pretrained(cfg.init_from)
    else:
        shape = {"n_layer": 4, "n_embd": cfg.n_embd, "d_ff": cfg.d_ff, "n_head": 8, "n_kv_head": 4, "head_dim": 64}
        model = PolychromaticLM(ModelConfig(vocab_size=4096, block_size=4097, **shape))
    model.to(device).eval()
    c = model.config
    lengths = sorted({min(n, c.block_size - 1) for n in (128, 512, 2048, 4096)})

    def decode(token: Tensor, cache: KVCache):
        model(token, cache=cache)
        cache.length -= 1

    with_cache, without_cache = {}, {}
    with autocast:
        for n in lengths:
            prompt = torch.randint(c.vocab_size, (1, n), device=device)
            cache = KVCache(c, 1, n + 1, device, compute_dtype(model.embedding.weight))
            model(prompt, cache=cache)
            with_cache[f"after {n:,} tokens"] = functools.partial(decode, prompt[:, :1], cache)
            without_cache[f"after {n:,} tokens"] = functools.partial(model, prompt)
        results = time_interleaved(with_cache, cfg.rounds, device)
        for name, result in time_interleaved(without_cache, 1, device).items():
            results[name]["ms_without_cache"] = result["ms"]
    yield f"decode: one row, {c.n_layer} layers, {c.n_embd} wide", results


BENCHMARKS = {"ffn": bench_ffn, "step": bench_step, "decode": bench_decode}


# -------------------------------------------------------------------------------------------------------------- results


def print_table(title: str, rows: list[list[str]]):
    """Print a table in Markdown; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    print("", title, "", lines[0], "|---" * len(rows[0]) + "|", *lines[1:], sep="\n", flush=True)


def describe_machine(device: torch.device) -> str:
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main():
    cfg = load(BenchConfig)
    if unknown := [row for row in cfg.only if row not in BENCHMARKS]:
        raise UserError(f"there is no row {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if cfg.prepare_cpu:
        prepare_cpu()
    device = pick_device(cfg.device)
    for name, value in DEFAULTS["cuda" if device.type == "cuda" else "cpu"].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.d_ff is None:
        cfg.d_ff = 4 * cfg.n_embd
    check_range(cfg, 1, 2**20, "rounds", "n_embd", "d_ff", "batch_size", "block_size")
    dtype = inference_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    machine, rows = f"{describe_machine(device)}, {str(dtype)[6:]}", []
    print(machine, flush=True)
    for row in cfg.only:
        for title, results in BENCHMARKS[row](cfg, device, autocast):
            header = ["", *next(iter(results.values()))]
            lines = [[name, *(f"{x:,.2f}" for x in result.values())] for name, result in results.items()]
            print_table(title, [header, *lines])
            rows += [{"row": title.split(":")[0], "name": name, **result} for name, result in results.items()]
    if cfg.json:
        write_json(Path(cfg.json), {"machine": machine, "rows": rows})
        print(f"\nfigures: {cfg.json}")


if __name__ == "__main__":
    run(main)
