"""Benchmarks: what routing costs, compared with transformers' Qwen3, which is the same model as ours with K = 1.

python -m extras.bench                                          every row: ffn, step, decode
python -m extras.bench --only=step --settings=config/tiny.py    one of them, for another model
python -m extras.bench --only=decode --compile                  decoding as eager code and compiled
python -m extras.bench --json=bench.json                        also write the figures as JSON
GOMP_SPINCOUNT=300000 python -m extras.bench                    without our setting for OpenMP, see common/settings.py

The functions of a table are timed in interleaved rounds. A time is the median over the rounds. A ratio is the median of
each round's ratio to the first line, which depends less on what else the machine does; q1 and q3 are its quartiles.
"""

import dataclasses
import functools
import platform
import re
import time
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# before torch: it sets variables that torch reads
from common.settings import UserError, check_range, load, run  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from common.generate import DECODING_OPTIONS, generate, prepare_weights
from common.run import Ranks, compiler_works, pick_autocast, pick_device, prepare_cpu, write_json
from model import ModelConfig, PolychromaticLM, PolyGLU, set_tau
from train import TrainConfig, configure_optimizer, optimizer_step

WARMUPS = 2  # untimed rounds, in which functions compile and allocate
VARIANTS = {"SwiGLU (K = 1)": ("silu",), "PolyGLU (K = 4)": ("relu", "tanh", "silu", "gelu")}
SHAPE = dict(  # of the model in step and decode: 14M parameters
    n_layer=6, n_embd=384, n_head=6, n_kv_head=3, d_ff=1024, vocab_size=4096, block_size=256, batch_size=2,
    micro_batch_size=2,
)  # fmt: skip
SHAPE_ON_CUDA = {**SHAPE, "block_size": 1024, "batch_size": 32, "micro_batch_size": 32}
ON_CUDA = {"n_embd": 1024, "batch_size": 8, "block_size": 4096}  # other defaults


@dataclass
class BenchConfig:
    """Settings of the benchmarks."""

    only: tuple[str, ...] = ("ffn", "step", "decode")  # which rows to measure
    rounds: int = 15  # timed rounds
    n_embd: int = 512  # ffn: width; on CUDA 1,024
    d_ff: int | None = None  # ffn: neurons; None: 4 * n_embd
    batch_size: int = 4  # ffn: rows of tokens; on CUDA 8
    block_size: int = 512  # ffn: tokens in a row; on CUDA 4,096
    settings: str | None = None  # step and decode: override file of the model; None: 6 layers of 384
    qwen3: bool = True  # step and decode: time transformers' Qwen3 too; it holds all logits of a step
    prompt_tokens: int = 64  # decode: tokens that are read at once
    new_tokens: int = 192  # decode: tokens that are written one by one
    compile: bool = False  # decode: time it compiled as well
    json: str | None = None  # file to write the figures to
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32 (TF32 on CUDA)


def time_interleaved(functions: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, dict]:
    """Call the functions in turn, round by round: {name: {"ms", "ratio", "q1", "q3"}}. Warm-up rounds are not timed.

    A function is called twice and the second call timed, in the memory that the first one left, as in a training loop.
    """
    synchronize = torch.get_device_module(device).synchronize
    times = np.zeros((WARMUPS + rounds, len(functions)))
    for round_times in times:
        for i, function in enumerate(functions.values()):
            function()
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            round_times[i] = 1e3 * (time.perf_counter() - start)
    times = times[WARMUPS:]
    q1, ratio, q3 = np.quantile(times / times[:, :1], (0.25, 0.5, 0.75), axis=0)
    columns = {"ms": np.median(times, 0), "ratio": ratio, "q1": q1, "q3": q3}
    return {name: {key: column[i].item() for key, column in columns.items()} for i, name in enumerate(functions)}


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


class OneDocumentARow(nn.Module):
    """A language model as optimizer_step() calls it, without documents: transformers' Qwen3 takes no doc_ids."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, doc_ids: Tensor) -> Tensor:
        if isinstance(self.model, PolychromaticLM):
            return self.model(tokens, targets)
        logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile(self):
        """Ours part by part, as in training; Qwen3 in one graph with its loss."""
        if isinstance(self.model, PolychromaticLM):
            self.model.compile()
        else:
            super().compile()


def build_models(cfg: BenchConfig, c: ModelConfig, device: torch.device) -> dict[str, nn.Module]:
    """Our variants and, where it is installed, transformers' Qwen3, all of this shape."""
    models = {name: PolychromaticLM(dataclasses.replace(c, activations=names)) for name, names in VARIANTS.items()}
    transformers = import_transformers() if cfg.qwen3 else None
    if transformers:
        sizes = dict(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
            max_position_embeddings=c.block_size, tie_word_embeddings=c.tied_head,
        )  # fmt: skip
        models["transformers' Qwen3"] = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    return {name: model.to(device) for name, model in models.items()}


@functools.cache
def import_transformers():
    """The package; None, and one line printed, if it is not installed."""
    try:
        import transformers

        return transformers
    except ImportError:
        print("without transformers' Qwen3: pip install transformers")


def read_settings(cfg: BenchConfig, device: torch.device) -> TrainConfig:
    """The settings of the step and decode benchmarks."""
    if cfg.settings:
        return load(TrainConfig, [cfg.settings])
    return TrainConfig(**(SHAPE_ON_CUDA if device.type == "cuda" else SHAPE))


def describe_model(c: ModelConfig) -> str:
    return f"{c.n_layer} layers of {c.n_embd}, vocabulary {c.vocab_size:,}"


def training_step(
    model: nn.Module, settings: TrainConfig, device: torch.device, autocast: torch.autocast
) -> Callable[[], tuple[float, float]]:
    """train.py's step on one micro-batch, three documents a row: forward, loss, backward, clipping, fused AdamW."""
    B, T = settings.micro_batch_size, settings.block_size
    rows = np.random.default_rng(0).integers(settings.vocab_size, size=(B, 3, T))  # tokens, targets, doc_ids
    rows[:, 2] = np.arange(T) * 3 // T  # three documents in a row
    optimizer, ranks = configure_optimizer(model, settings), Ranks(str(device))
    state = types.SimpleNamespace(cfg=settings, ranks=ranks, autocast=autocast, optimizer=optimizer)
    return functools.partial(optimizer_step, model.train(), state, rows, 0)


def bench_step(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Iterator[tuple[str, dict]]:
    """A training step. OneDocumentARow leaves out the documents, because transformers' Qwen3 knows none."""
    settings = read_settings(cfg, device)
    shape = f"{describe_model(settings)}, {settings.micro_batch_size} x {settings.block_size:,} tokens"
    for mode in ("eager", "compiled") if compiler_works(device) else ("eager",):
        steps = {}
        for name, model in build_models(cfg, settings.model_config(), device).items():
            model = OneDocumentARow(model)
            if mode == "compiled":
                model.compile()
            steps[name] = training_step(model, settings, device, autocast)
        yield f"step, {mode}: {shape}", time_interleaved(steps, cfg.rounds, device)


def decode(model: nn.Module, prompt: Tensor, new_tokens: int, **settings):
    """Continue a prompt [1, T] greedily."""
    if isinstance(model, PolychromaticLM):
        return list(generate(model, prompt, new_tokens, temperature=0))
    # Its own generate(): measured here, a plain loop around its cache is at most 2% faster.
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy, **settings)


def bench_decode(cfg: BenchConfig, device: torch.device, autocast: torch.autocast) -> Iterator[tuple[str, dict]]:
    """Greedy decoding of one row with the cache, with weights in the dtype of the matmuls."""
    c, n = read_settings(cfg, device).model_config(), cfg.new_tokens
    prompt = torch.randint(c.vocab_size, (1, cfg.prompt_tokens), device=device)
    for mode in ("eager", "compiled") if cfg.compile and compiler_works(device) else ("eager",):
        functions = {}
        for name, model in build_models(cfg, c, device).items():
            model.to(autocast.fast_dtype).eval()
            settings = {}
            if isinstance(model, PolychromaticLM):  # as sample.py does
                prepare_weights(model, autocast.fast_dtype)
                if mode == "compiled":
                    model.compile(options=DECODING_OPTIONS)
            elif mode == "compiled":
                model.compile(dynamic=False)
                settings["cache_implementation"] = "static"  # one graph for all lengths, as our cache has
            functions[name] = functools.partial(decode, model, prompt, n, **settings)
        results = time_interleaved(functions, cfg.rounds, device)
        for result in results.values():
            result["tokens/s"] = 1e3 * n / result["ms"]
        graph = ", ours as a CUDA graph" if device.type == "cuda" else ""
        yield f"decode, {mode}{graph}: {describe_model(c)}, one row, {cfg.prompt_tokens} + {n} tokens", results


BENCHMARKS = {"ffn": bench_ffn, "step": bench_step, "decode": bench_decode}


def print_table(title: str, rows: list[dict]):
    """Print a table in Markdown; the keys of a row are the header."""
    if rows:
        lines = [f"| {' | '.join(map(str, cells))} |" for cells in (rows[0], *(row.values() for row in rows))]
        print("", title, "", lines[0], "|---" * len(rows[0]) + "|", *lines[1:], sep="\n", flush=True)


def describe_machine(device: torch.device) -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)", info, re.M)
    cpu = f"{model[1] if model else platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main():
    cfg = load(BenchConfig)
    if unknown := [row for row in cfg.only if row not in BENCHMARKS]:
        raise UserError(f"there is no row {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    prepare_cpu()
    device = pick_device(cfg.device)
    if device.type == "cuda":
        for name in ON_CUDA.keys() - cfg.overridden:
            setattr(cfg, name, ON_CUDA[name])
    check_range(cfg, 1, 2**20, "rounds", "n_embd", "d_ff", "batch_size", "block_size", "prompt_tokens", "new_tokens")
    cfg.d_ff = cfg.d_ff or 4 * cfg.n_embd
    autocast = pick_autocast(cfg.dtype, device, training=False)
    machine, rows = f"{describe_machine(device)}, {str(autocast.fast_dtype)[6:]}", []
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
