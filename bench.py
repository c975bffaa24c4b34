"""Seconds and bytes: what routing costs, and what the loss, the cache and the batches save.

python bench.py                        every row, on shapes that fit the device
python bench.py --only=ffn,loss        some of them: ffn, loss, step, decode, prepare
python bench.py --json=bench.json      the figures as JSON too
python bench.py study                  what routing is worth: trains the variants in config/study/ (hours)
python bench.py study --help           its settings

The rows are ratios to the first one of their table, measured in one run: they take turns, and the median of the rounds'
ratios is given. Absolute times are this machine's, today.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
from eval import print_table
from extras.weights import from_pretrained
from model import KVCache, ModelConfig, PolychromaticLM, PolyGLU, chunked_cross_entropy, compute_dtype
from prepare_data import code_documents, encode, get_tokenizer, write_json
from sft import Conversations, SFTConfig
from train import (
    PEAK_FLOPS,
    Corpus,
    Ranks,
    TrainConfig,
    compiler_works,
    freeze,
    load_checkpoint,
    pick_device,
    pick_dtype,
    prepare_cpu,
    read_log,
)

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


def fits(work: Callable[[], object]) -> bool:
    """Whether the GPU's memory holds what work() needs."""
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        return False


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
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device, requires_grad=True)
    d_y = torch.randn_like(x)

    def layer(names: tuple[str, ...], compiled: bool) -> Callable:
        torch.manual_seed(0)
        module = PolyGLU(cfg.n_embd, cfg.d_ff, names).to(device)
        if compiled:
            module.compile(dynamic=False)
        return module

    def step(module: nn.Module):
        with autocast:
            y = module(x)
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
                saved[name] = saved_bytes(module, x)
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
    """A whole training step, compiled where that works: forward, backward, clipping and AdamW; and with plain loss."""
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

    def step(model: PolychromaticLM, optimizer: torch.optim.Optimizer, plain: bool = False):
        with autocast:
            if plain:
                loss = F.cross_entropy(model(tokens, doc_ids=doc_ids).flatten(0, 1).float(), targets.flatten())
            else:
                loss = model(tokens, targets, doc_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    runs = {"SwiGLU (K = 1)": prepared(SWIGLU), "PolyGLU (K = 4)": prepared(POLYGLU)}
    steps = {name: functools.partial(step, *run) for name, run in runs.items()}
    if fits(plain := functools.partial(step, *runs["PolyGLU (K = 4)"], plain=True)):
        runs["the same, all logits at once"], steps["the same, all logits at once"] = runs["PolyGLU (K = 4)"], plain
    results = race(steps, cfg.rounds, device)
    table.title(f"training step of {cfg.settings}: {B} x {T:,} tokens, {str(dtype)[6:]}{', compiled' * compiled}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    limit = next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
    first = None
    for name, (model, _) in runs.items():
        rate = B * T / results[name]["seconds"]
        mfu = f"{rate * model.flops_per_token() / limit:.1%}" if limit else None
        peak = peak_bytes(steps[name], device)
        first = first or peak
        table.add("step", name, results[name], tokens_per_second=f"{rate:,.0f}", mfu=mfu, peak=mib(peak, first))


@torch.no_grad()
def bench_decode(cfg: BenchConfig, table: Table, device: torch.device, autocast):
    """A decoded token after 128 to 4,096 others, with the cache and without, and the time to the first one."""
    if cfg.init_from:
        try:
            model = from_pretrained(cfg.init_from, cfg.revision)
        except (OSError, ValueError) as e:
            raise ValueError(f"--init_from: {e}") from None
        if model.config.sees_future:
            raise ValueError(f"--init_from: {cfg.init_from} routes by the sequence, so no cache is exact")
    else:
        shape = {"n_layer": 4, "n_embd": cfg.n_embd, "d_ff": cfg.d_ff, "n_head": 8, "n_kv_head": 4, "head_dim": 64}
        model = PolychromaticLM(ModelConfig(vocab_size=4096, block_size=4096 + Decoder.TOKENS, **shape))
    model, shape = model.to(device).eval(), model.config
    lengths = [n for n in (128, 512, 2048, 4096) if n + Decoder.TOKENS <= shape.block_size]
    if not lengths:
        raise ValueError(f"--init_from: a context of {shape.block_size} tokens leaves nothing to measure after 128")
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
    encoding = get_tokenizer(cfg.tokenizer, cfg.vocab)
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


# ---------------------------------------------------------------------------------------------------------------- study

VARIANTS = Path("config/study")  # an override file each; a new one is a new variant
BASELINE, ROUTED = "swiglu", "prefix"  # what the others are compared with; PolyGLU as it is meant
CHECKED_RATES = (0.5, 2.0)  # multiples of the learning rate at which these two are trained as well
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 95% lie within: Student's t of 1 to 9 degrees
MEASURES = ("static_entropy_share", "dynamic_entropy_share", "input_dependence", "agreement")


@dataclass
class StudyConfig:
    """Settings of a study."""

    base: str = "config/tiny.py"  # override file that all variants share
    variants: tuple[str, ...] = ()  # names of files in config/study/; none named: all of them
    seeds: int = 3  # runs of each variant, of the seeds 1, 2, ...
    max_steps: int = 500  # optimizer steps of a run
    eval_tokens: int = 131_072  # tokens of each domain's val.bin on which a run is scored, at most
    check_lr: int = 1  # seeds of which swiglu and prefix are trained at half and at twice the learning rate too
    sft: str | None = "config/tiny_sft.py"  # override file of a fine-tuning of the prefix runs; None: without
    sft_steps: int = 400  # optimizer steps of that
    out_dir: str = "out/study"  # where the runs, study.json and study.png go
    jobs: int | None = None  # runs at once; None: one for each CPU core, on a GPU one
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device

    def __post_init__(self):
        config.check_range(self, 1, len(T95) + 1, "seeds")
        config.check_range(self, 0, self.seeds, "check_lr")
        config.check_range(self, 1, 10**8, "max_steps", "sft_steps", "eval_tokens")
        if self.jobs is not None:
            config.check_range(self, 1, 1024, "jobs")
        there = sorted(path.stem for path in VARIANTS.glob("*.py"))
        if not there:
            raise ValueError(f"there is no {VARIANTS}/ here; run it in the folder of bench.py")
        self.variants = tuple(dict.fromkeys(self.variants)) or tuple(there)
        for name in self.variants:
            if name not in there:
                raise ValueError(f"there is no {VARIANTS / name}.py; there are {', '.join(there)}")


@dataclass
class Run:
    """One training of a study."""

    name: str  # of its folder
    kind: str  # "variant", "lr x 0.5", "lr x 2" or "sft"
    variant: str
    seed: int
    arguments: list[str]  # of train.py, or of sft.py
    folder: Path

    @property
    def script(self) -> str:
        return "sft.py" if self.kind == "sft" else "train.py"

    @functools.cached_property
    def settings(self) -> TrainConfig:
        with contextlib.redirect_stderr(io.StringIO()):  # what the files override is in the files
            return config.load(SFTConfig if self.kind == "sft" else TrainConfig, self.arguments)

    def evaluations(self) -> list[dict]:
        """The evaluations in its log, from that at step 0 to that at the last step; none if it is not finished."""
        found = [line for line in read_log(self.folder) if "val" in line]
        return found if found and (found[0]["step"], found[-1]["step"]) == (0, self.settings.max_steps) else []


def planned_runs(cfg: StudyConfig) -> list[Run]:
    """All trainings of the study, one seed after the other."""
    runs = []

    def plan(variant: str, seed: int, kind: str, files: list[str], steps: int, *flags: str):
        name = "-".join(filter(None, (variant, kind.replace(" x ", "_") if kind != "variant" else "", str(seed))))
        folder = Path(cfg.out_dir) / name
        arguments = [
            *files, *flags, f"--seed={seed}", f"--max_steps={steps}", f"--eval_interval={steps}",
            f"--eval_tokens={cfg.eval_tokens}", f"--out_dir={folder}", f"--device={cfg.device}",
        ]  # fmt: skip
        runs.append(Run(name, kind, variant, seed, arguments, folder))

    for seed in range(1, cfg.seeds + 1):
        for variant in cfg.variants:
            plan(variant, seed, "variant", [cfg.base, f"{VARIANTS / variant}.py"], cfg.max_steps)
    for seed, variant in itertools.product(range(1, cfg.check_lr + 1), (BASELINE, ROUTED)):
        if variant in cfg.variants:
            base = next(run for run in runs if run.variant == variant).settings.lr
            for factor in CHECKED_RATES:
                files = [cfg.base, f"{VARIANTS / variant}.py"]
                plan(variant, seed, f"lr x {factor:g}", files, cfg.max_steps, f"--lr={factor * base!r}")
    if cfg.sft and ROUTED in cfg.variants:
        for seed in range(1, cfg.seeds + 1):
            plan(ROUTED, seed, "sft", [cfg.sft], cfg.sft_steps, f"--init_from={Path(cfg.out_dir) / ROUTED}-{seed}")
    return runs


def is_done(run: Run) -> bool:
    """Whether the run's folder holds it, finished; ends the script if it holds a run of other settings."""
    if not (run.folder / "ckpt.pt").exists():
        return False
    try:
        checkpoint = load_checkpoint(run.folder)
        theirs, step = checkpoint["settings"], checkpoint["step"]
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{e}; remove {run.folder} to train it again") from None
    free = {"resume", "overwrite", "out_dir", "init_from", "device"}  # where it is, not what it is
    if run.kind == "sft":
        free |= {field.name for field in dataclasses.fields(ModelConfig)}  # they are those of the model it starts from
    for name, ours in dataclasses.asdict(run.settings).items():
        if name not in free and theirs.get(name, ours) != ours:
            raise ValueError(
                f"{run.folder} was trained with {name}={theirs[name]!r}, not {ours!r}; remove it, or choose "
                "another --out_dir"
            )
    if step == run.settings.max_steps and not run.evaluations():
        raise ValueError(f"{run.folder / 'log.jsonl'} lacks evaluations; remove {run.folder} to train it again")
    return bool(run.evaluations())


def check_runs(runs: list[Run]):
    """Say what is wrong before the first hour, not after it; ends the script."""
    first = runs[0].settings
    given = {flag[2:].split("=")[0] for flag in runs[0].arguments if flag.startswith("--")}
    for variant in dict.fromkeys(run.variant for run in runs):
        names = [name for _, name, _ in config.read_overrides(VARIANTS / f"{variant}.py") if name in given]
        if names:
            raise ValueError(f"{VARIANTS / variant}.py sets {names[0]}, which is the same for all runs of a study")
    for run in runs:
        cfg = run.settings
        if run.kind == "sft":
            Conversations(dataclasses.replace(cfg, **dataclasses.asdict(first.model_config())))
            continue
        Corpus(cfg)
        if set(cfg.mixture) != set(first.mixture):
            raise ValueError(f"{run.name} is of the domains {', '.join(cfg.mixture)}, {runs[0].name} of others")
        with torch.device("meta"):  # shapes, no numbers
            freeze(PolychromaticLM(cfg.model_config()), cfg.frozen)


def train_runs(runs: list[Run], jobs: int, on_cpu: bool) -> list[str]:
    """Train what is not finished, `jobs` at a time, each resumed where it was; a line for each that ends.

    Returns what became of those that failed, a line each.
    """
    done, failed = {run.name for run in runs if is_done(run)}, []
    for run in runs:
        if run.kind == "sft" and (run.folder / "ckpt.pt").exists() and f"{run.variant}-{run.seed}" not in done:
            raise ValueError(f"{run.folder} was fine-tuned from an earlier {run.variant}-{run.seed}; remove it")
    waiting, processes, stopping = [run for run in runs if run.name not in done], [], threading.Event()
    print(f"{len(runs)} runs, {len(done)} of them done before; {jobs} at a time", flush=True)
    # One thread a run: what it computes does not depend on how many cores there are, or run beside it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if on_cpu else None

    def work(run: Run) -> tuple[float, str]:
        """Seconds, and what went wrong."""
        start, resume = time.monotonic(), ["--resume"] * (run.folder / "ckpt.pt").exists()
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / "output.txt", "a+") as output:
            before = output.tell()
            command = [sys.executable, str(Path(__file__).with_name(run.script)), *run.arguments, *resume]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            processes.append(process)
            if stopping.is_set():  # while it was started
                process.terminate()
            process.wait()
            output.seek(before)
            said = output.read().strip().splitlines() or ["no word"]
        errors = [line for line in said if line.startswith("error: ")] or said
        return time.monotonic() - start, "" if process.returncode == 0 and run.evaluations() else errors[-1]

    count = itertools.count(1)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for kinds in (lambda run: run.kind != "sft", lambda run: run.kind == "sft"):  # that starts from the others
                futures = {pool.submit(work, run): run for run in filter(kinds, waiting)}
                for future in as_completed(futures):
                    run, (seconds, error) = futures[future], future.result()
                    if error:
                        failed.append(f"{run.name} did not finish ({error}); see {run.folder / 'output.txt'}")
                    else:
                        val = run.evaluations()[-1]["val"]
                        bits = "  ".join(f"{domain} {scores['bits_per_byte']:.3f}" for domain, scores in val.items())
                    said = failed[-1] if error else f"{bits} bits per byte"
                    print(f"[{next(count)}/{len(waiting)}] {run.name}: {said}, {seconds:.0f} s", flush=True)
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()  # if it runs, it finishes its step and saves
            raise
    return failed


@torch.no_grad()
def causal_losses(
    run: Run, device: torch.device, rows: int = 128, first: int = 32, others: int = 8
) -> dict[str, float]:
    """What a "sequence" model is worth when it must write, in bits per byte of each domain.

    There the routing cannot read later tokens, so each token is predicted by a forward pass on what precedes it alone.
    That costs a pass a token, so it is done in `rows` of the rows alone, at the `first` tokens, where most of the
    difference is, and at about `others` of the rest, evenly spaced, in every batch other ones. The mean difference to
    the losses of the same tokens as trained, each weighted by how many it stands for, is added to the score as trained.
    """
    cfg = run.settings
    model = from_pretrained(run.folder).to(device).eval()
    corpus = Corpus(dataclasses.replace(cfg, eval_tokens=min(cfg.eval_tokens, rows * cfg.block_size)))
    dtype = pick_dtype(cfg.dtype, device)
    first, losses = min(first, cfg.block_size), {}
    stride = max(1, (cfg.block_size - first) // others)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for domain in cfg.mixture:
            more, count = 0.0, 0
            for i, (tokens, targets, doc_ids) in enumerate(corpus.val_batches(domain, Ranks(str(device)))):
                trained = model(tokens, doc_ids=doc_ids)
                for t in [*range(first), *range(first + i % stride, cfg.block_size, stride)]:
                    weight = 1 if t < first else stride
                    alone = model(tokens[:, : t + 1], doc_ids=doc_ids[:, : t + 1])[:, -1]
                    score = functools.partial(F.cross_entropy, target=targets[:, t], ignore_index=-1, reduction="sum")
                    more += weight * (score(alone.float()) - score(trained[:, t].float())).item()
                    count += weight * (targets[:, t] >= 0).sum().item()
            nats = run.evaluations()[-1]["val"][domain]["loss"] + more / count
            losses[domain] = corpus.bits_per_byte(domain, nats)
    return losses


def collect(runs: list[Run], device: torch.device) -> list[dict]:
    """What was measured of every run: {"name", "kind", "variant", "seed", "bits_per_byte", "routing", ...}."""
    results = []
    for run in runs:
        first, *_, last = run.evaluations()
        bits = {domain: scores["bits_per_byte"] for domain, scores in last["val"].items()}
        speeds = [line["tokens_per_second"] for line in read_log(run.folder) if "tokens_per_second" in line]
        checkpoint = load_checkpoint(run.folder)
        size = sum(weight.numel() for name, weight in checkpoint["model"].items() if not name.endswith("tau"))
        result = {
            "name": run.name, "kind": run.kind, "variant": run.variant, "seed": run.seed,
            "command": shlex.join(["python", run.script, *run.arguments]), "parameters": size,
            "activations": checkpoint["model_config"]["activations"], "tokens_per_second": statistics.median(speeds),
            "bits_per_byte": bits,
            "routing": last["routing"], "routing_before": first["routing"],
        }  # fmt: skip
        results.append(result)
        if run.kind == "variant" and run.settings.sees_future:
            path = run.folder / "causal.json"  # minutes of work
            if not path.exists():
                write_json(path, causal_losses(run, device))
            causal = {name: f"{result[name]}, causal" for name in ("name", "variant")}
            causal |= {"bits_per_byte": json.loads(path.read_text()), "routing": {}}
            results.append({**result, **causal})
    return results


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None if there is one value alone."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def scores(results: list[dict], kind: str, variant: str) -> dict[int, dict[str, float]]:
    """Bits per byte of a variant's runs by seed, of every domain and their mean: {seed: {domain: bits}}."""
    return {
        result["seed"]: {**result["bits_per_byte"], "mean": statistics.fmean(result["bits_per_byte"].values())}
        for result in results
        if (result["kind"], result["variant"]) == (kind, variant)
    }


def summarize(results: list[dict]) -> list[dict]:
    """Of every kind and variant: bits per byte, and those less the baseline's of the same seed; mean and error."""
    baseline, rows = scores(results, "variant", BASELINE), []
    for kind, variant in dict.fromkeys((result["kind"], result["variant"]) for result in results):
        if kind == "sft":
            continue
        of = [result for result in results if (result["kind"], result["variant"]) == (kind, variant)]
        by_seed = scores(results, kind, variant)
        domains = list(next(iter(by_seed.values())))
        row = {
            "kind": kind, "variant": variant, "parameters": of[0]["parameters"], "runs": len(of),
            "tokens_per_second": statistics.median(result["tokens_per_second"] for result in of),
            "bits_per_byte": {d: mean_and_error(bits[d] for bits in by_seed.values()) for d in domains},
        }  # fmt: skip
        paired = [seed for seed in by_seed if seed in baseline]
        row["pairs"] = len(paired)
        if paired:
            differences = {d: [by_seed[seed][d] - baseline[seed][d] for seed in paired] for d in domains}
            row["difference"] = {d: mean_and_error(values) for d, values in differences.items()}
        if of[0]["routing"]:
            row["routing"], row["usage"] = mean_routing([result["routing"] for result in of])
        rows.append(row)
    return rows


def mean_routing(stats: list[dict]) -> tuple[dict, list]:
    """Of routing_stats() of several runs: {measure: (mean over layers and runs, error)}, usage [n_layer, K]."""
    measures = {name: mean_and_error(np.mean(s[name]) for s in stats) for name in MEASURES}
    return measures, np.mean([s["usage"] for s in stats], axis=0).tolist()


def name_of(row: dict) -> str:
    """What a row of the summary is called in print."""
    return row["variant"] + (f", {row['kind']}" if row["kind"] != "variant" else "")


def routing_line(name: str, measures: dict, usage: list) -> list[str]:
    """A line of a table of the routing."""
    shown = (plus_minus(measures[key], form) for key, form in zip(MEASURES, (".3%", ".2%", ".4f", ".2%")))
    return [name, *shown, " / ".join(f"{share:.1%}" for share in np.mean(usage, axis=0))]


def plus_minus(pair: tuple[float, float | None], form: str) -> str:
    """A mean and its error, in that format."""
    mean, error = pair
    return format(mean, form) + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def half_interval(row: dict, domain: str) -> float:
    """Half the width of the 95% interval of a row's difference to the baseline; 0 of one pair, which has none."""
    return T95[row["pairs"] - 2] * row["difference"][domain][1] if row["pairs"] > 1 else 0.0


def print_study(rows: list[dict], results: list[dict], seeds: int):
    """The tables of a study."""
    domains = list(rows[0]["bits_per_byte"])
    note = f"; of {seeds} a 95% interval is {T95[seeds - 2]} of them wide to either side" if seeds > 1 else ""
    print(f"\nBits per byte of held-out text; ± is the standard error over the seeds{note}. Mean: of the domains.")
    table = [["variant", "seeds", *domains, f"mean - {BASELINE}", "parameters", "tokens/s, beside others"]]
    for row in sorted(rows, key=lambda row: row["bits_per_byte"]["mean"][0]):
        bits = (plus_minus(row["bits_per_byte"][domain], ".4f") for domain in domains)
        other = "difference" in row and (row["kind"], row["variant"]) != ("variant", BASELINE)
        difference = plus_minus(row["difference"]["mean"], "+.4f") if other else "-"
        name, runs, speed = name_of(row), str(row["runs"]), f"{row['tokens_per_second']:,.0f}"
        table.append([name, runs, *bits, difference, f"{row['parameters']:,}", speed])
    print_table(table)

    routed = [row for row in rows if "routing" in row]
    if not routed:
        return
    print(
        "Routing at the end, means over the layers; entropies as shares of ln K, the static one is the paper's measure"
    )
    names = {tuple(result["activations"]) for result in results if result["kind"] == "variant" and result["routing"]}
    usage = "usage, as its activations are listed" if len(names) > 1 else f"usage: {' / '.join(*names)}"
    header = ["", "static entropy", "dynamic entropy", "input dependence, nats", "agreement", usage]
    print_table([header, *(routing_line(name_of(row), row["routing"], row["usage"]) for row in routed)])

    print("Usage by layer, each run by itself, in the same order")
    of = [r for r in results if r["kind"] == "variant" and r["routing"]]
    table = [["run", *(f"layer {i}" for i in range(len(routed[0]["usage"])))]]
    for r in of:
        table.append([r["name"], *(" / ".join(f"{share:.0%}" for share in layer) for layer in r["routing"]["usage"])])
    print_table(table)

    tuned = [result for result in results if result["kind"] == "sft"]
    if tuned:
        print(f"The {ROUTED} runs on conversations, before fine-tuning and after; means over the layers and seeds")
        lines = []
        for name, when in {"before": "routing_before", "after": "routing"}.items():
            of = [result[when] for result in tuned]
            lines.append(routing_line(name, *mean_routing(of)))
        print_table([header, *lines])


def draw_study(path: Path, rows: list[dict], results: list[dict], seeds: int):
    """What each variant gains over the baseline, with 95% intervals, and what PolyGLU uses at each depth."""
    from matplotlib.figure import Figure

    compared = [row for row in rows if row["kind"] == "variant" and row["variant"] != BASELINE and "difference" in row]
    compared.sort(key=lambda row: row["difference"]["mean"][0], reverse=True)
    figure = Figure(figsize=(11, 2.2 + 0.42 * len(compared)), dpi=120, layout="constrained")
    routed = [result for result in results if (result["kind"], result["variant"]) == ("variant", ROUTED)]
    left, *right = figure.subplots(1, 2, width_ratios=(3, 2)) if routed else (figure.subplots(),)
    for k, domain in enumerate(compared[0]["difference"]):
        means = [row["difference"][domain][0] for row in compared]
        heights = np.arange(len(compared)) + (0.27 - 0.18 * k)
        color = "k" if domain == "mean" else f"C{k + 4}"
        widths = [half_interval(row, domain) for row in compared]
        left.errorbar(means, heights, xerr=widths, fmt="o", color=color, markersize=4, capsize=2, label=domain)
    left.axvline(0, color="gray", linewidth=1)
    left.set_yticks(range(len(compared)), [row["variant"] for row in compared])
    left.set_xlabel(f"bits per byte, less those of {BASELINE}; lower is better")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    for i, result in enumerate(routed):
        usage = np.array(result["routing"]["usage"])  # [n_layer, K]
        at, width = np.arange(len(usage)) + 0.8 * (i + 0.5) / len(routed) - 0.4, 0.7 / len(routed)
        for k, name in enumerate(result["activations"]):
            label = None if i else name
            right[0].bar(at, usage[:, k], width, bottom=usage[:, :k].sum(1), color=f"C{k}", label=label)
    if routed:
        right[0].set(xlabel="layer; a bar a seed", ylabel=f"usage, {ROUTED}", ylim=(0, 1), xticks=range(len(usage)))
        right[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    title = f"{seeds} seeds, paired; bars: 95% intervals" if seeds > 1 else "1 seed, so no intervals"
    for row in compared:
        if row["variant"] == ROUTED:
            (mean, _), half = row["difference"]["mean"], half_interval(row, "mean")
            within = f" (95%: {mean - half:+.4f} to {mean + half:+.4f})" if half else ""
            title = f"PolyGLU ({ROUTED}) less SwiGLU: {mean:+.4f}{within} bits per byte; {title}"
    figure.suptitle(title)
    figure.savefig(path)


def study(cfg: StudyConfig):
    """Train what there is to train, then print, draw and write what came of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device, out = pick_device(cfg.device), Path(cfg.out_dir)
    runs = planned_runs(cfg)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as e:
        raise ValueError(f"cannot write to {out}: {e.strerror}") from None
    check_runs(runs)
    prepare_cpu()
    jobs = cfg.jobs or (os.cpu_count() if device.type == "cpu" else 1)
    machine = describe_machine(device) + ("; one thread for each run" if device.type == "cpu" else "")
    with config.locked(out):
        try:
            failed = train_runs(runs, jobs, device.type == "cpu")
        except KeyboardInterrupt:
            raise ValueError("stopped; the same command goes on from here") from None
        results = collect([run for run in runs if run.evaluations()], device)
        rows = summarize(results)
        if not rows:
            raise ValueError(failed[0])
        print_study(rows, results, cfg.seeds)
        try:
            write_json(out / "study.json", {
                "machine": machine, "settings": dataclasses.asdict(cfg), "summary": rows, "runs": results,
            })  # fmt: skip
            print(f"numbers: {out / 'study.json'}")
            others = [row for row in rows if row["kind"] == "variant" and row["variant"] != BASELINE]
            if any("difference" in row for row in others):
                draw_study(out / "study.png", rows, results, cfg.seeds)
                print(f"picture: {out / 'study.png'}")
            else:
                print(f"no picture: it compares variants with {BASELINE}")
        except OSError as e:
            raise ValueError(f"cannot write to {out}: {e.strerror}") from None
        except ImportError:
            print("no picture: it needs a package: pip install matplotlib")
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs: {failed[0]}")


def describe_machine(device: torch.device) -> str:
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main():
    if sys.argv[1:2] == ["study"]:
        return study(config.load(StudyConfig, sys.argv[2:]))
    cfg = config.load(BenchConfig)
    prepare_cpu()
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
    machine = describe_machine(device)
    print(f"{machine}; {str(dtype)[6:]} unless a row says otherwise")
    table, benches = Table(), (bench_ffn, bench_loss, bench_step, bench_decode, bench_prepare)
    for row, bench in zip(ROWS, benches):
        if row in cfg.only:
            bench(cfg, table, device, autocast)
    if cfg.json:
        text = json.dumps({"machine": machine, "rows": table.rows}, indent=1)
        try:
            config.write_atomically(Path(cfg.json), lambda file: file.write(text.encode()))
        except OSError as e:
            raise ValueError(f"cannot write {cfg.json}: {e.strerror}") from None
        print(f"\nnumbers: {cfg.json}")


if __name__ == "__main__":
    config.run(main)
