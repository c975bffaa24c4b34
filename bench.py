"""Seconds and bytes: what routing costs, and what the loss, the cache and the batches save.

python bench.py                        every row, on shapes that fit the device
python bench.py --only=ffn,loss        some of them: ffn, loss, step, decode, prepare
python bench.py --json=bench.json      the figures as JSON too

Every row is a ratio to the first one of its table, measured in one run: they take turns, and the median of the rounds'
ratios is given. Absolute times are this machine's, today.
"""

import contextlib
import ctypes
import functools
import gc
import io
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
from model import KVCache, ModelConfig, PolychromaticLM, PolyGLU, chunked_cross_entropy, compute_dtype
from prepare_data import code_documents, encode, open_tokenizer
from train import PEAK_FLOPS, TrainConfig, compiler_works, pick_device, pick_dtype

ROWS = ("ffn", "loss", "step", "decode", "prepare")
POLYGLU, SWIGLU = ("relu", "tanh", "silu", "gelu"), ("silu",)


@dataclass
class BenchConfig:
    """Settings of the measurements."""

    only: tuple[str, ...] = ROWS  # which rows to measure
    rounds: int = 15  # times that the contestants take turns; half of it or less for the slow ones
    n_embd: int | None = None  # ffn, loss and decode: width; None: 512, on CUDA 1,024
    d_ff: int | None = None  # ffn and decode: neurons; None: four times n_embd
    batch_size: int | None = None  # ffn and step: rows; None: 4, on CUDA 8
    block_size: int | None = None  # ffn: tokens in a row; None: 512, on CUDA 4,096
    settings: str | None = (
        None  # step: the override file of the model; None: config/tiny.py, on CUDA config/pretrain.py
    )
    init_from: str | None = None  # decode: a model, whatever from_pretrained() loads; None: 4 layers, random
    revision: str | None = None  # of an init_from on the hub
    tokenizer: str = "bytes"  # prepare: bytes or qwen3
    vocab: str | None = None  # prepare: vocab.json of the qwen3 tokenizer; None: from the hub
    json: str | None = None  # file to write the figures to as well
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (ffn, loss, decode: float32, on CUDA bfloat16; step: as train.py)

    def __post_init__(self):
        for name in self.only:
            if name not in ROWS:
                raise ValueError(f"there is no row {name!r}; there are {', '.join(ROWS)}")
        config.check_range(self, 1, 10**6, "rounds")
        for name in ("n_embd", "d_ff", "batch_size", "block_size"):
            if getattr(self, name) is not None:
                config.check_range(self, 1, 2**20, name)
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")


# ---------------------------------------------------------------------------------------------------------- measurement


def race(contestants: dict, rounds: int, device: torch.device, warm_ups: int = 2) -> dict[object, dict]:
    """Call the contestants {name: function} in turn; of each the median seconds, and that of its ratios to the first.

    The warm-ups, in which they compile and allocate, do not count.
    """
    seconds = {name: [] for name in contestants}
    for i in range(warm_ups + rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warm_ups:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    return {
        name: {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(ours / theirs for ours, theirs in zip(taken, first)),
        }
        for name, taken in seconds.items()
    }


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The memory that work() takes at its peak, beyond what is held before it; None where that cannot be seen."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but still the process's, would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def saved_bytes(layer: nn.Module, *inputs: Tensor) -> int:
    """What a forward pass keeps for the backward pass, the parameters aside."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(*inputs)
    del y
    return sum(kept.values())


class Table:
    """The rows as they are measured, on the screen and for the JSON."""

    def __init__(self):
        self.rows: list[dict] = []

    def title(self, text: str):
        print(f"\n{text}\n  {'':34} {'time':>10} {'ratio':>6}", flush=True)

    def add(self, row: str, name: str, result: dict, **more: object):
        """A line: what took how long, as a ratio of what; `more` is printed as `name value` behind it."""
        self.rows.append({"row": row, "name": name, **result, **more})
        shown = "".join(f"  {key} {value}" for key, value in more.items() if value is not None)
        print(f"  {name:34} {1e3 * result['seconds']:8,.1f}ms {result['ratio']:6.2f}{shown}", flush=True)


def mib(n: int | None, of: int | None = None) -> str | None:
    """Bytes for people, with their ratio to `of`."""
    return None if n is None else f"{n / 2**20:,.1f} MiB" + (f" ({n / of:.2f})" if of else "")


# ----------------------------------------------------------------------------------------------------------------- rows


def bench_ffn(cfg: BenchConfig, table: Table, device: torch.device, autocast):
    """The feed-forward layer alone, forward and backward."""
    shape = {"n_embd": cfg.n_embd, "d_ff": cfg.d_ff, "block_size": cfg.block_size}
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device, requires_grad=True)
    d_y, tau = torch.randn_like(x), torch.tensor(0.5, device=device)

    def layer(names: tuple[str, ...], compiled: bool) -> Callable:
        torch.manual_seed(0)
        module = PolyGLU(ModelConfig(**shape, activations=names)).to(device)
        if compiled:
            module.compile(dynamic=False)
        return module

    def step(module: nn.Module):
        with autocast:
            y = module(x, tau)
        y.backward(d_y.to(y.dtype))
        module.zero_grad(set_to_none=True)
        x.grad = None

    for compiled in (False, True) if compiler_works(device) else (False,):
        layers = {"SwiGLU": layer(SWIGLU, compiled), "PolyGLU": layer(POLYGLU, compiled)}
        results = race({name: functools.partial(step, m) for name, m in layers.items()}, cfg.rounds, device)
        table.title(
            f"feed-forward layer, {'compiled' if compiled else 'eager'}: {cfg.batch_size} x {cfg.block_size:,} tokens, "
            f"{cfg.n_embd} -> {cfg.d_ff}, forward and backward"
        )
        saved, peak = {}, {}
        for name, module in layers.items():
            with autocast:
                saved[name] = saved_bytes(module, x, tau)
            peak[name] = peak_bytes(functools.partial(step, module), device)
            kept, top = mib(saved[name], saved["SwiGLU"]), mib(peak[name], peak["SwiGLU"])
            table.add(f"ffn, {'compiled' if compiled else 'eager'}", name, results[name], kept=kept, peak=top)


def bench_loss(cfg: BenchConfig, table: Table, device: torch.device, autocast):
    """The loss at the vocabulary of Qwen3, value and gradients, in pieces and at once."""
    tokens, vocab = 2048, 151_669
    hidden = torch.randn(tokens, cfg.n_embd, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, cfg.n_embd, device=device)).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def step(loss: Callable[[], Tensor]):
        with autocast:
            value = loss()
        value.backward()
        hidden.grad = weight.grad = None

    ways = {"cross_entropy": plain, "in pieces": lambda: chunked_cross_entropy(hidden, weight, targets)}
    results = race({name: functools.partial(step, way) for name, way in ways.items()}, max(3, cfg.rounds // 3), device)
    table.title(f"loss: {tokens:,} tokens, {cfg.n_embd} wide, vocabulary {vocab:,}, forward and backward")
    peak = {name: peak_bytes(functools.partial(step, way), device) for name, way in ways.items()}
    for name in ways:
        table.add("loss", name, results[name], peak=mib(peak[name], peak["cross_entropy"]))


def bench_step(cfg: BenchConfig, table: Table, device: torch.device, _autocast):
    """A whole training step, compiled where that works: forward, backward, clipping and AdamW."""
    with contextlib.redirect_stderr(io.StringIO()):  # what the file overrides is in the file
        settings = config.load(TrainConfig, [cfg.settings])
    compiled, dtype = compiler_works(device), pick_dtype(cfg.dtype, device)
    B, T = settings.micro_batch_size, settings.block_size
    tokens, targets = torch.randint(settings.vocab_size, (2, B, T), device=device)
    doc_ids = (torch.arange(T, device=device) * 3 // T).expand(B, T)  # three documents in a row
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def prepared(names: tuple[str, ...]) -> tuple[PolychromaticLM, torch.optim.Optimizer]:
        torch.manual_seed(0)
        settings.activations = names
        model = PolychromaticLM(settings.model_config()).to(device).train()
        if compiled:
            for block in model.blocks:
                block.compile()
        return model, model.configure_optimizer(settings.lr, settings.weight_decay, (settings.beta1, settings.beta2))

    def step(model: PolychromaticLM, optimizer: torch.optim.Optimizer):
        with autocast:
            loss = model(tokens, targets, doc_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    runs = {"SwiGLU (K = 1)": prepared(SWIGLU), "PolyGLU (K = 4)": prepared(POLYGLU)}
    results = race({name: functools.partial(step, *run) for name, run in runs.items()}, cfg.rounds, device)
    table.title(f"training step of {cfg.settings}: {B} x {T:,} tokens, {str(dtype)[6:]}{', compiled' * compiled}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    limit = next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
    first = None
    for name, (model, optimizer) in runs.items():
        rate = B * T / results[name]["seconds"]
        mfu = f"{rate * model.flops_per_token() / limit:.1%}" if limit else None
        peak = peak_bytes(functools.partial(step, model, optimizer), device)
        first = first or peak
        table.add("step", name, results[name], tokens_per_second=f"{rate:,.0f}", mfu=mfu, peak=mib(peak, first))


@torch.no_grad()
def bench_decode(cfg: BenchConfig, table: Table, device: torch.device, autocast):
    """A decoded token after 128 to 4,096 others, with the cache and without, and the time to the first one."""
    if cfg.init_from:
        try:
            model = PolychromaticLM.from_pretrained(cfg.init_from, cfg.revision)
        except (OSError, ValueError) as e:
            config.fail(f"--init_from: {e}")
        if model.config.sees_future:
            config.fail(f"--init_from: {cfg.init_from} routes by the sequence, so no cache is exact")
    else:
        shape = {"n_layer": 4, "n_embd": cfg.n_embd, "d_ff": cfg.d_ff, "n_head": 8, "n_kv_head": 4, "head_dim": 64}
        model = PolychromaticLM(ModelConfig(vocab_size=4096, block_size=4096 + Decoder.TOKENS, **shape))
    model, shape = model.to(device).eval(), model.config
    lengths = [n for n in (128, 512, 2048, 4096) if n + Decoder.TOKENS <= shape.block_size]
    if not lengths:
        config.fail(f"--init_from: a context of {shape.block_size} tokens leaves nothing to measure after 128")
    for rows in (1, 16):
        table.title(f"decoding a token, {rows} row{'s' * (rows > 1)}: {shape.n_layer} layers, {shape.n_embd} wide")
        with autocast:
            prompts = {n: torch.randint(shape.vocab_size, (rows, n), device=device) for n in lengths}
            decoders = {n: Decoder(model, prompt) for n, prompt in prompts.items()}
            once = functools.partial(race, rounds=1, device=device, warm_ups=1)
            first = {n: once({n: decoder.read})[n]["seconds"] for n, decoder in decoders.items()}
            short = {n: decoder for n, decoder in decoders.items() if device.type == "cuda" or rows * n <= 2**13}
            full = {n: once({n: decoder.without_cache})[n]["seconds"] for n, decoder in short.items()}
            results = race({n: decoder.decode for n, decoder in decoders.items()}, cfg.rounds, device)
        for n, result in results.items():
            result["seconds"] /= Decoder.TOKENS
            slower = f"{rows / full[n]:,.2f} ({full[n] / result['seconds']:,.1f} times as long)" if n in full else None
            table.add(
                "decode", f"after {n:,} tokens", result, tokens_per_second=f"{rows / result['seconds']:,.1f}",
                without_cache=slower,
                first_token=f"{first[n]:.2f} s",
            )  # fmt: skip


class Decoder:
    """A model, a prompt [B, T], and a cache that has room for a few tokens more."""

    TOKENS = 4  # that decode() makes

    def __init__(self, model: PolychromaticLM, prompt: Tensor):
        self.model, self.prompt = model, prompt
        room, dtype = prompt.size(1) + self.TOKENS, compute_dtype(model.embedding.weight)
        self.cache = KVCache(model.config, len(prompt), room, prompt.device, dtype)

    def read(self):
        """Read the prompt into the cache, anew."""
        self.cache.length = 0
        for layer in self.cache.layers:
            layer.router.zero_()
        self.model(self.prompt, cache=self.cache)

    def decode(self):
        """A few tokens after the prompt."""
        for _ in range(self.TOKENS):
            self.model(self.prompt[:, :1], cache=self.cache)
        self.cache.length = self.prompt.size(1)

    def without_cache(self):
        """What the next token costs if the prompt is read again for it."""
        self.model(self.prompt)


def bench_prepare(cfg: BenchConfig, table: Table, device: torch.device, _autocast):
    """Tokenizing documents as prepare_data.py does, on all cores, and one by one."""
    encoding = open_tokenizer(cfg.tokenizer, cfg.vocab)
    texts = list(itertools.islice(code_documents(), 400))
    count = sum(len(encode(encoding, text)) for text in texts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ways = {
            "one by one": lambda: [encode(encoding, text) for text in texts],
            "prepare_data.py": lambda: list(pool.map(functools.partial(encode, encoding), texts)),
        }
        results = race(ways, cfg.rounds, torch.device("cpu"))
    table.title(f"tokenizing with {cfg.tokenizer}: {len(texts)} documents, {count:,} tokens, {os.cpu_count()} cores")
    for name, result in results.items():
        table.add("prepare", name, result, tokens_per_second=f"{count / result['seconds']:,.0f}")


def main():
    cfg = config.load(BenchConfig)
    torch.set_flush_denormal(True)  # as train.py does
    device = pick_device(cfg.device)
    large = device.type == "cuda"
    defaults = {"n_embd": 1024 if large else 512, "batch_size": 8 if large else 4, "block_size": 4096 if large else 512}
    defaults["settings"] = "config/pretrain.py" if large else "config/tiny.py"
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.d_ff = cfg.d_ff or 4 * cfg.n_embd
    dtype = torch.bfloat16 if large else torch.float32
    dtype = dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    name = torch.cuda.get_device_name() if large else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{machine}; {str(dtype)[6:]} unless a row says otherwise")
    table, benches = Table(), (bench_ffn, bench_loss, bench_step, bench_decode, bench_prepare)
    for row, bench in zip(ROWS, benches):
        if row in cfg.only:
            bench(cfg, table, device, autocast)
    if cfg.json:
        text = json.dumps({"machine": machine, "rows": table.rows}, indent=1)
        try:
            config.write_whole(Path(cfg.json), lambda file: file.write(text.encode()))
        except OSError as e:
            config.fail(f"cannot write {cfg.json}: {e.strerror}")
        print(f"\nnumbers: {cfg.json}")


if __name__ == "__main__":
    config.run(main)
