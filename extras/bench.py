"""Benchmarks: what routing costs.

python -m extras.bench                        every row, at sizes that suit the device
python -m extras.bench --only=ffn,step        some of them: ffn, loss, step, decode, prepare
python -m extras.bench --json=bench.json      also write the figures as JSON
python -m extras.bench --prepare_cpu=False    without train.py's settings for the CPU

The functions of a table are timed in interleaved rounds. A time is the median over the rounds; a ratio is the median of
each round's ratio to the first line, which depends less on what else the machine does.
"""

import contextlib
import ctypes
import functools
import gc
import io
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.run import compiler_works, flops_per_token, peak_flops, pick_device, pick_dtype, prepare_cpu, write_json
from common.settings import check_range, load, run
from common.tokenizer import encode, get_tokenizer
from common.weights import from_pretrained
from eval import print_table
from extras.embedded import code_documents
from model import (
    KVCache,
    ModelConfig,
    PolychromaticLM,
    PolyGLU,
    chunk_loss,
    chunked_cross_entropy,
    compute_dtype,
    set_tau,
)
from train import TrainConfig

ROWS = ("ffn", "loss", "step", "decode", "prepare")
POLYGLU, SWIGLU = ("relu", "tanh", "silu", "gelu"), ("silu",)
DEFAULTS = {  # of the settings that are None
    "cpu": {"n_embd": 512, "batch_size": 4, "block_size": 512, "settings": "config/tiny.py"},
    "cuda": {"n_embd": 1024, "batch_size": 8, "block_size": 4096, "settings": "config/pretrain.py"},
}


@dataclass
class BenchConfig:
    """Settings of the benchmarks."""

    only: tuple[str, ...] = ROWS  # which rows to measure
    rounds: int = 15  # timed rounds; a third of them for the loss
    n_embd: int | None = None  # ffn, loss and decode: width; None: 512, on CUDA 1,024
    d_ff: int | None = None  # ffn and decode: neurons; None: 4 * n_embd
    batch_size: int | None = None  # ffn: rows of tokens; None: 4, on CUDA 8
    block_size: int | None = None  # ffn: tokens in a row; None: 512, on CUDA 4,096
    settings: str | None = None  # step: override file of the model; None: config/tiny.py, on CUDA config/pretrain.py
    init_from: str | None = None  # decode: any model that loads; None: 4 layers, random weights
    revision: str | None = None  # of an init_from on the hub
    tokenizer: str = "bytes"  # prepare: bytes or qwen3
    vocab: str | None = None  # prepare: vocab.json of the qwen3 tokenizer; None: from the hub
    json: str | None = None  # file to write the figures to
    prepare_cpu: bool = True  # use the settings with which train.py makes a CPU faster
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (ffn, loss, decode: float32, on CUDA bfloat16; step: as train.py)

    def __post_init__(self):
        for name in self.only:
            if name not in ROWS:
                raise ValueError(f"there is no row {name!r}; there are {', '.join(ROWS)}")
        sizes = ("n_embd", "d_ff", "batch_size", "block_size")
        check_range(self, 1, 2**20, "rounds", *(name for name in sizes if getattr(self, name) is not None))
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")


# ------------------------------------------------------------------------------------------------------ time and memory


def time_interleaved(
    functions: dict, rounds: int, device: torch.device, warmups: int = 2, n_tokens: int = 1
) -> dict[object, dict]:
    """Call the functions {name: function} in turn, round by round: {name: {"seconds", "ratio", "tokens_per_second"}}.

    The warm-up rounds, in which they compile and allocate, are not timed. n_tokens: how many tokens a call processes. A
    function that runs out of GPU memory is reported and left out.
    """
    times = {name: [] for name in functions}
    for i in range(-warmups, rounds):
        for name in list(times):
            start = time.perf_counter()
            try:
                functions[name]()
            except torch.OutOfMemoryError:
                print(f"{name}: does not fit in the GPU's memory")
                del times[name]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    results = {}
    for name, seconds in times.items():
        ratio = statistics.median(t / t0 for t, t0 in zip(seconds, next(iter(times.values()))))
        median = statistics.median(seconds)
        results[name] = {"seconds": median, "ratio": ratio, "tokens_per_second": n_tokens / median}
    return results


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the parameters."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _y = layer(x)  # holds the saved tensors, so that no two get the same address
    return sum(kept.values())


def peak_bytes(function: Callable, device: torch.device) -> int | None:
    """Peak memory of a call, beyond what was allocated before it; None where it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory that the process still holds would hide allocations
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = process_bytes("VmRSS")
        function()
        return process_bytes("VmHWM") - before
    except (OSError, AttributeError):  # not Linux
        return None


def process_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


# ----------------------------------------------------------------------------------------------------------- benchmarks

# Each benchmark yields tables: a title and {name: figures}, whose keys are those of COLUMNS.
Tables = Iterator[tuple[str, dict[object, dict]]]


def bench_ffn(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """One feed-forward layer, forward and backward."""
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device, requires_grad=True)
    grad_y = torch.randn_like(x)

    def make_layer(activations: tuple[str, ...], compiled: bool) -> PolyGLU:
        torch.manual_seed(0)
        layer = PolyGLU(cfg.n_embd, cfg.d_ff, activations).to(device)
        set_tau(layer, 0.5)
        if compiled:
            layer.compile()
        return layer

    def step(layer: PolyGLU):
        with autocast:
            y = layer(x)
        y.backward(grad_y.to(y.dtype))
        layer.zero_grad()
        x.grad = None

    for compiled in (False, True) if compiler_works(device) else (False,):
        layers = {"SwiGLU": make_layer(SWIGLU, compiled), "PolyGLU": make_layer(POLYGLU, compiled)}
        steps = {name: functools.partial(step, layer) for name, layer in layers.items()}
        results = time_interleaved(steps, cfg.rounds, device, n_tokens=cfg.batch_size * cfg.block_size)
        for name, result in results.items():
            with autocast:
                result["kept"] = saved_bytes(layers[name], x)
            result["peak"] = peak_bytes(steps[name], device)
        shape = f"{cfg.n_embd} -> {cfg.d_ff}, {cfg.batch_size} x {cfg.block_size:,} tokens"
        yield f"ffn, {'compiled' if compiled else 'eager'}: {shape}, forward and backward", results


def bench_loss(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """The loss at Qwen3's vocabulary, forward and backward: in chunks, and from all logits at once."""
    n_tokens, vocab_size = 2048, 151_669
    hidden = torch.randn(n_tokens, cfg.n_embd, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocab_size, cfg.n_embd, device=device)).requires_grad_()
    targets = torch.randint(vocab_size, (n_tokens,), device=device)

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def step(loss_function: Callable):
        with autocast:
            loss = loss_function(hidden, weight, targets)
        loss.backward()
        hidden.grad = weight.grad = None

    functions = {"all logits at once": cross_entropy, "in chunks": chunked_cross_entropy}
    if compiler_works(device):
        compiled = torch.compile(chunk_loss, dynamic=False)
        functions["in chunks, compiled"] = functools.partial(chunked_cross_entropy, body=compiled)
    steps = {name: functools.partial(step, f) for name, f in functions.items()}
    results = time_interleaved(steps, max(3, cfg.rounds // 3), device, n_tokens=n_tokens)
    for name, result in results.items():
        result["peak"] = peak_bytes(steps[name], device)
    yield f"loss: {n_tokens:,} tokens, {cfg.n_embd} -> {vocab_size:,}, forward and backward", results


def bench_step(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """A training step, compiled where that works: forward, backward, clipping and AdamW."""
    settings, compiled = load_settings(TrainConfig, [cfg.settings]), compiler_works(device)
    B, T = settings.micro_batch_size, settings.block_size
    tokens, targets = torch.randint(settings.vocab_size, (2, B, T), device=device)
    doc_ids = (torch.arange(T, device=device) * 3 // T).expand(B, T)  # three documents in a row

    def make_model(activations: tuple[str, ...]) -> tuple[PolychromaticLM, torch.optim.Optimizer]:
        torch.manual_seed(0)
        settings.activations = activations
        model = PolychromaticLM(settings.model_config()).to(device).train()
        if compiled:
            model.compile()
        return model, model.configure_optimizer(settings.lr, settings.weight_decay, (settings.beta1, settings.beta2))

    def step(model: PolychromaticLM, optimizer: torch.optim.Optimizer, all_logits: bool = False):
        with autocast:
            if all_logits:
                loss = F.cross_entropy(model(tokens, doc_ids=doc_ids).flatten(0, 1).float(), targets.flatten())
            else:
                loss = model(tokens, targets, doc_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    swiglu, polyglu = make_model(SWIGLU), make_model(POLYGLU)
    steps = {
        "SwiGLU (K = 1)": functools.partial(step, *swiglu),
        "PolyGLU (K = 4)": functools.partial(step, *polyglu),
        "PolyGLU, all logits at once": functools.partial(step, *polyglu, all_logits=True),
    }
    results = time_interleaved(steps, cfg.rounds, device, n_tokens=B * T)
    for name, result in results.items():
        if math.isfinite(peak := peak_flops(device)):
            result["mfu"] = result["tokens_per_second"] * flops_per_token(steps[name].args[0]) / peak
        result["peak"] = peak_bytes(steps[name], device)
    yield f"step: {cfg.settings}, {B} x {T:,} tokens{', compiled' * compiled}", results


@torch.no_grad()
def bench_decode(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """The token after a prompt of 128 to 4,096 tokens: decoded with the cache, and without."""
    if cfg.init_from:
        model = from_pretrained(cfg.init_from, cfg.revision)
    else:
        shape = {"n_layer": 4, "n_embd": cfg.n_embd, "d_ff": cfg.d_ff, "n_head": 8, "n_kv_head": 4, "head_dim": 64}
        model = PolychromaticLM(ModelConfig(vocab_size=4096, block_size=4097, **shape))
    model, shape, caches = model.to(device).eval(), model.config, {}
    lengths = [n for n in (128, 512, 2048, 4096) if n < shape.block_size]
    if not lengths:
        raise ValueError(f"--init_from: the context is {shape.block_size} tokens; it must be longer than 128")

    def prefill(prompt: Tensor):
        B, n = prompt.shape
        caches[n] = KVCache(shape, B, n + 1, device, compute_dtype(model.embedding.weight))
        model(prompt, cache=caches[n])

    def decode(prompt: Tensor):
        cache = caches[prompt.size(1)]
        model(prompt[:, :1], cache=cache)
        cache.length -= 1

    for B in (1, 16):
        prompts = {n: torch.randint(shape.vocab_size, (B, n), device=device) for n in lengths}
        uncached = [n for n in lengths if device.type == "cuda" or B * n <= 2**13]  # more takes minutes
        with autocast:
            first = time_interleaved({n: functools.partial(prefill, prompts[n]) for n in lengths}, 1, device)
            full = time_interleaved({n: functools.partial(model, prompts[n]) for n in uncached}, 1, device)
            decodes = {n: functools.partial(decode, prompts[n]) for n in first}
            results = time_interleaved(decodes, cfg.rounds, device, n_tokens=B)
        for n, result in results.items():
            result["first_token"] = first[n]["seconds"]
            if n in full:
                result["without_cache"] = full[n]["seconds"]
                result["speedup"] = full[n]["seconds"] / result["seconds"]
        results = {f"after {n:,} tokens": result for n, result in results.items()}
        yield f"decode: {B} row{'s' * (B > 1)}, {shape.n_layer} layers, {shape.n_embd} wide", results


def bench_prepare(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Tables:
    """Tokenizing documents: in one thread, and in as many as there are cores, as prepare_data.py does."""
    encode_text = functools.partial(encode, get_tokenizer(cfg.tokenizer, cfg.vocab))
    texts = list(itertools.islice(code_documents(), 400))
    n_tokens, n_threads = sum(len(encode_text(text)) for text in texts), os.cpu_count()
    with ThreadPoolExecutor(n_threads) as pool:
        functions = {
            "1 thread": lambda: list(map(encode_text, texts)),
            f"{n_threads} threads": lambda: list(pool.map(encode_text, texts)),
        }
        results = time_interleaved(functions, cfg.rounds, torch.device("cpu"), n_tokens=n_tokens)
    yield f"prepare: {len(texts)} documents, {n_tokens:,} tokens, tokenizer {cfg.tokenizer}", results


BENCHMARKS = dict(zip(ROWS, (bench_ffn, bench_loss, bench_step, bench_decode, bench_prepare)))


# -------------------------------------------------------------------------------------------------------------- results


def milliseconds(x: float, first: float) -> str:
    return f"{1e3 * x:,.2f} ms"


def mebibytes(x: int, first: int) -> str:
    return f"{x / 2**20:,.1f} MiB" + (f" ({x / first:.2f})" if first else "")


COLUMNS = {  # key of a figure: heading, and format of a value and of that in the first line
    "seconds": ("time", milliseconds),
    "ratio": ("ratio", lambda x, first: f"{x:.2f}"),
    "tokens_per_second": ("tokens/s", lambda x, first: f"{x:,.0f}"),
    "mfu": ("MFU", lambda x, first: f"{x:.1%}"),
    "kept": ("kept for backward", mebibytes),
    "peak": ("peak memory", mebibytes),
    "first_token": ("first token", milliseconds),
    "without_cache": ("without cache", milliseconds),
    "speedup": ("speedup", lambda x, first: f"{x:,.1f}"),
}


def print_figures(title: str, results: dict[object, dict]):
    """A table with the columns that these results have."""
    first = next(iter(results.values()), {})
    keys = [key for key in COLUMNS if first.get(key) is not None]
    rows = [
        [name, *(COLUMNS[key][1](result[key], first[key]) if key in result else "-" for key in keys)]
        for name, result in results.items()
    ]
    print(title)
    print_table([["", *(COLUMNS[key][0] for key in keys)], *rows])


def describe_machine(device: torch.device) -> str:
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def load_settings(cls: type, argv: list[str]):
    """load(), without its report of what was overridden."""
    with contextlib.redirect_stderr(io.StringIO()):
        return load(cls, argv)


def main():
    cfg = load(BenchConfig)
    if cfg.prepare_cpu:
        prepare_cpu()
    device = pick_device(cfg.device)
    on_cuda = device.type == "cuda"
    for name, value in DEFAULTS["cuda" if on_cuda else "cpu"].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.d_ff = cfg.d_ff or 4 * cfg.n_embd
    step_dtype = pick_dtype(cfg.dtype, device)
    dtype = step_dtype if on_cuda or cfg.dtype != "auto" else torch.float32
    machine, rows = describe_machine(device), []
    print(f"{machine}; step in {str(step_dtype)[6:]}, ffn, loss and decode in {str(dtype)[6:]}\n", flush=True)
    for row in cfg.only:
        used = step_dtype if row == "step" else dtype
        autocast = torch.autocast(device.type, used, enabled=used != torch.float32)
        try:
            for title, results in BENCHMARKS[row](cfg, device, autocast):
                print_figures(title, results)
                rows += [{"row": title.split(":")[0], "name": name, **result} for name, result in results.items()]
        except torch.OutOfMemoryError:  # before the first call: of two models, say
            print(f"{row}: does not fit in the GPU's memory\n")
    if cfg.json:
        write_json(Path(cfg.json), {"machine": machine, "rows": rows})
        print(f"figures: {cfg.json}")


if __name__ == "__main__":
    run(main)
