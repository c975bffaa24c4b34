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
import time
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from common.run import Ranks, compiler_works, pick_device, pick_dtype, prepare_cpu, write_json
from common.settings import UserError, check_range, load, run
from common.weights import from_pretrained
from model import KVCache, ModelConfig, PolychromaticLM, PolyGLU, compute_dtype, set_tau
from train import TrainConfig, configure_optimizer, optimizer_step

WARMUPS = 2  # untimed rounds, in which functions compile and allocate
VARIANTS = {"SwiGLU (K = 1)": ("silu",), "PolyGLU (K = 4)": ("relu", "tanh", "silu", "gelu")}
ON_CUDA = {"n_embd": 1024, "batch_size": 8, "block_size": 4096, "settings": "config/pretrain.py"}  # other defaults


@dataclass
class BenchConfig:
    """Settings of the benchmarks."""

    only: tuple[str, ...] = ("ffn", "step", "decode")  # which rows to measure
    rounds: int = 15  # timed rounds
    n_embd: int = 512  # ffn and decode: width; on CUDA 1,024
    d_ff: int | None = None  # ffn and decode: neurons; None: 4 * n_embd
    batch_size: int = 4  # ffn: rows of tokens; on CUDA 8
    block_size: int = 512  # ffn: tokens in a row; on CUDA 4,096
    settings: str = "config/tiny.py"  # step: override file of the model; on CUDA config/pretrain.py
    init_from: str | None = None  # decode: any model that loads; None: 4 layers, random weights
    json: str | None = None  # file to write the figures to
    prepare_cpu: bool = True  # use the settings with which train.py makes a CPU faster
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32


def time_interleaved(functions: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, dict]:
    """Call the functions in turn, round by round: {name: {"ms", "ratio"}}. The warm-up rounds are not timed."""
    times = np.zeros((WARMUPS + rounds, len(functions)))
    for round_times in times:
        for i, function in enumerate(functions.values()):
            start = time.perf_counter()
            function()
            torch.get_device_module(device).synchronize()
            round_times[i] = 1e3 * (time.perf_counter() - start)
    times = times[WARMUPS:]
    medians = zip(functions, np.median(times, 0).tolist(), np.median(times / times[:, :1], 0).tolist())
    return {name: {"ms": ms, "ratio": ratio} for name, ms, ratio in medians}


def bench_ffn(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Iterator[tuple[str, dict]]:
    """One feed-forward layer, forward and backward. kept_mib: what the forward pass keeps, without the parameters."""
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device, requires_grad=True)
    grad_y = torch.randn_like(x)

    def step(layer: PolyGLU):
        with autocast:
            y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], grad_y.to(y.dtype))

    for mode in ("eager", "compiled") if compiler_works(device) else ("eager",):
        layers = {name: PolyGLU(cfg.n_embd, cfg.d_ff, activations) for name, activations in VARIANTS.items()}
        for layer in layers.values():
            set_tau(layer.to(device), 0.5)
            layer.compile(disable=mode == "eager")
        results = time_interleaved({name: functools.partial(step, layers[name]) for name in layers}, cfg.rounds, device)
        for name, layer in layers.items():
            kept = weakref.WeakValueDictionary()  # not what is freed with a part of the graph that is not needed
            with autocast, saved_tensors_hooks(lambda saved, kept=kept: kept.setdefault(id(saved), saved), lambda x: x):
                _y = layer(x)  # holds the graph
            sizes = {saved.untyped_storage().data_ptr(): saved.untyped_storage().nbytes() for saved in kept.values()}
            own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
            results[name]["kept_mib"] = sum(sizes[pointer] for pointer in sizes.keys() - own) / 2**20
        shape = f"{cfg.n_embd} -> {cfg.d_ff}, {cfg.batch_size} x {cfg.block_size:,} tokens"
        yield f"ffn, {mode}: {shape}, forward and backward", results


def bench_step(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Iterator[tuple[str, dict]]:
    """A training step, compiled where that works: forward, backward, clipping and AdamW."""
    settings, compiled, steps = load(TrainConfig, [cfg.settings]), compiler_works(device), {}
    B, T = settings.micro_batch_size, settings.block_size
    rows = np.random.default_rng(0).integers(settings.vocab_size, size=(B, 3, T))  # tokens, targets, doc_ids
    rows[:, 2] = np.arange(T) * 3 // T  # three documents in a row
    for name, activations in VARIANTS.items():
        settings.activations = activations
        model = PolychromaticLM(settings.model_config()).to(device).train()
        model.compile(disable=not compiled)
        optimizer, ranks = configure_optimizer(model, settings), Ranks(str(device))
        run = types.SimpleNamespace(cfg=settings, ranks=ranks, autocast=autocast, optimizer=optimizer)
        steps[name] = functools.partial(optimizer_step, model, run, rows, 0)
    results = time_interleaved(steps, cfg.rounds, device)
    yield f"step: {cfg.settings}, {B} x {T:,} tokens{', compiled' * compiled}", results


@torch.no_grad()
def bench_decode(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Iterator[tuple[str, dict]]:
    """The token after a prompt of 128 to 4,096 tokens, decoded with the cache and without."""
    shape = {"n_layer": 4, "n_embd": cfg.n_embd, "d_ff": cfg.d_ff, "n_head": 8, "n_kv_head": 4, "head_dim": 64}
    random = ModelConfig(vocab_size=4096, block_size=4097, **shape)
    model = from_pretrained(cfg.init_from) if cfg.init_from else PolychromaticLM(random)
    model.to(device).eval()

    def decode(token: Tensor, cache: KVCache):
        model(token, cache=cache)
        cache.length -= 1

    c, with_cache, without_cache = model.config, {}, {}
    with autocast:
        for n in sorted({min(n, c.block_size - 1) for n in (128, 512, 2048, 4096)}):
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


def print_table(title: str, rows: list[dict]):
    """Print a table in Markdown; the keys of a row are the header."""
    if rows:
        lines = [f"| {' | '.join(map(str, cells))} |" for cells in (rows[0], *(row.values() for row in rows))]
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
    if device.type == "cuda":
        for name in ON_CUDA.keys() - cfg.overridden:
            setattr(cfg, name, ON_CUDA[name])
    check_range(cfg, 1, 2**20, "rounds", "n_embd", "d_ff", "batch_size", "block_size")
    cfg.d_ff = cfg.d_ff or 4 * cfg.n_embd
    dtype = pick_dtype(cfg.dtype, device, training=False)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    machine, rows = f"{describe_machine(device)}, {str(dtype)[6:]}", []
    print(machine, flush=True)
    for row in cfg.only:
        for title, results in BENCHMARKS[row](cfg, device, autocast):
            figures = {name: {key: f"{x:,.2f}" for key, x in result.items()} for name, result in results.items()}
            print_table(title, [{"": name, **cells} for name, cells in figures.items()])
            rows += [{"row": title.split(":")[0], "name": name, **result} for name, result in results.items()]
    if cfg.json:
        write_json(Path(cfg.json), {"machine": machine, "rows": rows})


if __name__ == "__main__":
    run(main)
