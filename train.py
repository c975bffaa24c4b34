"""Train a PolychromaticLM.

python train.py config/tiny.py                     minutes on two CPU cores, after python prepare_data.py tiny
python train.py config/tiny.py --max_steps=50      any setting can be overridden
python train.py config/tiny.py --resume            go on where a stopped or killed run was
torchrun --nproc_per_node=8 train.py config/pretrain.py     on 8 GPUs: the same steps, the same data, the same loss

Without an override file the settings are the paper's pretraining run. A run folder gets ckpt.pt and log.jsonl.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import config
from model import ModelConfig, PolychromaticLM, routing_stats, set_tau

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, from the vendor's data sheets
MAX_SKIPPED = 5  # non-finite updates in a row before the run gives up

MIXTURE = {"math": 0.7, "stem": 0.25, "code": 0.05}
MIXTURE_END = {"math": 0.85, "stem": 0.1, "code": 0.05}


@dataclass
class TrainConfig(ModelConfig):
    """Settings of a run, with those of its model. The defaults are the paper's pretraining."""

    overridden: ClassVar[frozenset[str]] = frozenset()  # the settings that files and flags gave, from config.load()

    data_dir: str = "data/pretrain"  # a corpus of prepare_data.py
    out_dir: str = "out/pretrain"  # the run folder
    init_from: str | None = None  # model to start from, whatever from_pretrained() loads; None: random weights
    revision: str | None = None  # of an init_from on the hub
    resume: bool = False  # go on from the run folder's checkpoint
    overwrite: bool = False  # start anew in a run folder that already holds a checkpoint
    seed: int = 1337  # of the initial weights, the order of the data and the routing noise
    max_steps: int = 19_531  # optimizer steps; the schedules span them
    batch_size: int = 128  # sequences of block_size tokens in a step
    micro_batch_size: int = 8  # sequences in one forward pass; divides batch_size; the data stay the same
    lr: float = 1e-4  # peak learning rate
    routing_lr: float = 1.0  # learning rate of alpha, beta and the router, as a multiple of lr; decay stays
    frozen: tuple[str, ...] = ()  # parameters that stay as they are, by a part of their names, for example alpha
    warmup_steps: int = 2000  # linear warm-up, then a cosine to 0
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.1  # AdamW, on weight matrices and the embedding only
    grad_clip: float = 1.0  # largest gradient norm
    tau_start: float = 1.0  # routing temperature at the first step
    tau_end: float = 0.1  # and at the last; linear in between
    mixture: dict[str, float] = field(default_factory=MIXTURE.copy)  # shares of the domains in a step
    mixture_end: dict[str, float] | None = field(default_factory=MIXTURE_END.copy)  # at the last step; None: unchanged
    anneal_start: float = 0.8  # share of the run after which the mixture moves, linearly, to mixture_end
    eval_interval: int = 1000  # steps between evaluations; there is one at the start and the end too
    eval_tokens: int = 1_048_576  # tokens of each domain's val.bin in an evaluation, at most
    save_interval: int = 500  # steps between checkpoints
    log_interval: int = 10  # steps between lines on the screen and in log.jsonl
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto, bfloat16 or float32; parameters are float32 always
    compile: bool | None = None  # torch.compile; None: on CUDA only
    recompute: bool = False  # recompute activations in the backward pass: less memory, more time
    wandb: str | None = None  # project on Weights & Biases to log to as well; None: log.jsonl alone

    def __post_init__(self):
        super().__post_init__()
        config.check_range(self, 1, 10**8, "max_steps", "eval_interval", "save_interval", "log_interval")
        config.check_range(self, 1, 2**20, "batch_size", "micro_batch_size")
        config.check_range(self, 1, 2**40, "eval_tokens")
        config.check_range(self, 0, 2**63 - 1, "seed", "warmup_steps")
        config.check_range(self, 0, 1, "anneal_start", "beta1", "beta2", "weight_decay")
        config.check_range(self, 1e-12, 1e12, "lr", "grad_clip")
        config.check_range(self, 0, 1e12, "routing_lr")
        config.check_range(self, 1e-3, 1e3, "tau_start", "tau_end")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of micro_batch_size, {self.micro_batch_size}"
            )
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")
        if max(self.beta1, self.beta2) == 1:
            raise ValueError("beta1 and beta2 must be below 1")
        for mixture in (self.mixture, self.mixture_end or self.mixture):
            if set(mixture) != set(self.mixture) or min(mixture.values()) < 0 or abs(sum(mixture.values()) - 1) > 1e-6:
                raise ValueError(f"the mixture {mixture} must be shares of {', '.join(self.mixture)} that sum to 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")

    def model_config(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})


# ------------------------------------------------------------------------------------------------------------ schedules


def lr_at(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step (0-based): linear warm-up, then a cosine to 0 at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def tau_at(step: int, cfg: TrainConfig) -> float:
    """Routing temperature of a step, linear from tau_start to tau_end over the run (paper: max(0.1, 1 - 0.9 s / S))."""
    return cfg.tau_start + (cfg.tau_end - cfg.tau_start) * min(1.0, step / cfg.max_steps)


def mixture_at(step: int, cfg: TrainConfig) -> dict[str, float]:
    """The domains' shares at a step: mixture, moving linearly to mixture_end after anneal_start of the run."""
    start = cfg.anneal_start * cfg.max_steps
    moved = min(1.0, max(0.0, (step - start) / max(1.0, cfg.max_steps - 1 - start)))
    end = cfg.mixture_end or cfg.mixture
    return {domain: share + moved * (end[domain] - share) for domain, share in cfg.mixture.items()}


def quotas(cfg: TrainConfig) -> np.ndarray:
    """Sequences of each domain in each step, [max_steps, domains] int64.

    Every entry is the mixture's share of batch_size rounded down or up; up for whom the roundings so far have left
    furthest behind, so that small shares are served too.
    """
    table = np.empty((cfg.max_steps, len(cfg.mixture)), dtype=np.int64)
    owed = np.zeros(len(cfg.mixture))
    for step in range(cfg.max_steps):
        ideal = np.array(list(mixture_at(step, cfg).values())) * cfg.batch_size
        owed += ideal
        table[step] = np.floor(ideal + 1e-9)
        behind = np.argsort(table[step] - owed, kind="stable")
        fractional = [d for d in behind if ideal[d] - table[step, d] > 1e-9]
        table[step, fractional[: cfg.batch_size - table[step].sum()]] += 1
        owed -= table[step]
    return table


# ----------------------------------------------------------------------------------------------------------------- data


class Corpus:
    """A prepared corpus. A step's batch is a pure function of (seed, step): no state, nothing to save.

    Ends the script with one line if the corpus is missing, damaged, or of another tokenizer than the model.
    """

    def __init__(self, cfg: TrainConfig):
        self.cfg, self.folder = cfg, Path(cfg.data_dir)
        again = f"python prepare_data.py {self.folder.name}"
        again += "" if str(self.folder.parent) == "data" else f" --data_dir={shlex.quote(str(self.folder.parent))}"
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            name, size, self.dtype = str(meta["tokenizer"]), int(meta["vocab_size"]), np.dtype(meta["dtype"])
            self.end_of_text = int(meta["end_of_text"])
            counted = ("train_tokens", "val_tokens", "val_bytes")
            self.domains = {d: {key: int(counts[key]) for key in counted} for d, counts in meta["domains"].items()}
            for d, counts in meta["domains"].items():  # of chat, only some of the tokens are predicted
                self.domains[d]["val_targets"] = int(counts.get("val_targets", counts["val_tokens"]))
        except OSError:
            raise ValueError(f"no data in {self.folder}; make it: {again}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{self.folder / 'meta.json'} is damaged ({e!r}); make it again: {again}") from None
        if name != cfg.tokenizer or size > cfg.vocab_size:
            way_out = "prepare" if cfg.init_from else f"train with --tokenizer={name} --vocab_size={size} or on"
            raise ValueError(
                f"{self.folder} has tokenizer {name!r} with {size:,} tokens, the model {cfg.tokenizer!r} with "
                f"{cfg.vocab_size:,}; {way_out} other data"
            )
        for domain in cfg.mixture:
            if domain not in self.domains:
                raise ValueError(f"the mixture names {domain!r}; {self.folder} has {', '.join(self.domains)}")
        self.tokens = {d: {s: self.open_tokens(d, s, again) for s in ("train", "val")} for d in cfg.mixture}
        self.quotas = quotas(cfg)
        self.visited = np.concatenate((np.zeros_like(self.quotas[:1]), self.quotas.cumsum(0)))  # before each step
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    def open_tokens(self, domain: str, split: str, again: str) -> np.ndarray:
        tokens = self.open_file(domain, f"{split}.bin", self.domains[domain][f"{split}_tokens"], self.dtype, again)
        if len(tokens) <= self.cfg.block_size:
            raise ValueError(
                f"{self.folder / domain / split}.bin has {len(tokens):,} tokens, fewer than a window of block_size "
                f"{self.cfg.block_size} + 1"
            )
        return tokens

    def open_file(self, domain: str, name: str, length: int, dtype: np.dtype, again: str) -> np.ndarray:
        path = self.folder / domain / name
        size, whole = path.stat().st_size if path.is_file() else 0, length * dtype.itemsize
        if size != whole:
            raise ValueError(f"{path} holds {size:,} bytes, not the {whole:,} of meta.json; make it again: {again}")
        return np.memmap(path, dtype=dtype, mode="r")

    def n_rows(self, domain: str, split: str) -> int:
        return (len(self.tokens[domain][split]) - 1) // self.cfg.block_size

    def row(self, domain: str, split: str, index: int) -> np.ndarray:
        """Tokens of a window, its targets (the tokens one further) and document ids: [3, block_size] int64."""
        T = self.cfg.block_size
        window = self.tokens[domain][split][index * T : index * T + T + 1].astype(np.int64)
        if window.max() >= self.cfg.vocab_size:
            raise ValueError(
                f"{self.folder / domain / split}.bin is damaged: it has a token {window.max()}; make it again"
            )
        ends = window[:-1] == self.end_of_text  # <|endoftext|> is the last token of its document
        return np.stack((window[:-1], window[1:], ends.cumsum() - ends))

    def nth_row(self, domain: str, n: int) -> int:
        """Index of the n-th training row visited: each of them once, in an order permuted anew in every epoch."""
        epoch, place = divmod(n, self.n_rows(domain, "train"))
        if (domain, epoch) not in self.orders:
            self.orders = {k: v for k, v in self.orders.items() if k[0] != domain}
            rng = np.random.default_rng([self.cfg.seed, epoch, *domain.encode()])
            self.orders[domain, epoch] = rng.permutation(self.n_rows(domain, "train"))
        return self.orders[domain, epoch][place]

    def batch(self, step: int) -> np.ndarray:
        """The rows of a step, [batch_size, 3, block_size] int64."""
        rows = [
            self.row(domain, "train", self.nth_row(domain, self.visited[step, d] + i))
            for d, domain in enumerate(self.cfg.mixture)
            for i in range(self.quotas[step, d])
        ]
        return np.stack(rows)

    def micro_batches(self, step: int, ranks: "Ranks") -> Iterator[tuple[int, float, tuple[Tensor, Tensor, Tensor]]]:
        """This rank's micro-batches of a step, with their number in the whole step and their share of its targets.

        Each is tokens, targets and doc_ids, [micro_batch_size, block_size] int64.
        """
        batch = self.batch(step)
        parts = np.split(batch, self.cfg.batch_size // self.cfg.micro_batch_size)
        total = np.count_nonzero(batch[:, 1] >= 0)
        for i in ranks.share(len(parts)):
            yield i, np.count_nonzero(parts[i][:, 1] >= 0) / total, to_inputs(parts[i], ranks.device)

    def val_batches(self, domain: str, ranks: "Ranks") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's part of a domain's val rows, eval_tokens in all, evenly spread over val.bin.

        Every batch has the same shape: the last is filled up with ignored targets.
        """
        B, total = self.cfg.micro_batch_size, self.n_rows(domain, "val")
        count = min(total, max(1, self.cfg.eval_tokens // self.cfg.block_size))
        chosen = np.linspace(0, total - 1, count).astype(np.int64)
        for i in ranks.share(-(-count // B)):
            rows = np.stack([self.row(domain, "val", index) for index in chosen[i * B : i * B + B]])
            batch = np.resize(rows, (B, *rows.shape[1:]))
            batch[len(rows) :, 1] = -1
            yield to_inputs(batch, ranks.device)

    def is_text(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Which tokens are not padding, [B, T] bool: padding is <|endoftext|> that predicts nothing."""
        return (targets >= 0) | (tokens != self.end_of_text)

    def bits_per_byte(self, domain: str, loss: float) -> float:
        """A loss on the domain's val.bin, in nats per token, as bits per byte of its text."""
        counts = self.domains[domain]
        return loss / math.log(2) * counts["val_targets"] / max(1, counts["val_bytes"])


def to_inputs(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and doc_ids, each [B, block_size] int64, of rows [B, 3, block_size]."""
    columns = (torch.from_numpy(rows[:, i].copy()) for i in range(3))
    if device.type == "cuda":  # from pinned memory they are copied while the GPU computes
        columns = (column.pin_memory() for column in columns)
    tokens, targets, doc_ids = (column.to(device, non_blocking=True) for column in columns)
    return tokens, targets, doc_ids


# ---------------------------------------------------------------------------------------------------------- the machine


class Ranks:
    """The processes of a run and this one's place among them: one, or as many as torchrun started.

    Ends the script with one line if this process's device cannot be used.
    """

    def __init__(self, device: str):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each, and nothing on another's
        self.device = pick_device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank:  # one voice is enough
            sys.stdout = open(os.devnull, "w")

    def share(self, n: int) -> range:
        """Which of n pieces of work are this rank's: the ranks take turns, so the first rank has the first."""
        return range(self.rank, n, self.count)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value, summed over the ranks."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.count > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self):
        """Until every rank has come here."""
        if self.count > 1:
            torch.distributed.barrier()


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto": cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it must be auto, cpu, cuda or mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls; "auto": bfloat16 where the hardware multiplies it faster, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.bfloat16 if device.type == "cpu" and has_amx else torch.float32


def prepare_cpu():
    """Settings of this process with which a CPU is faster."""
    torch.set_flush_denormal(True)  # at a low tau, gates of 1e-40 would halve its speed
    # glibc returns a freed tensor's memory to the system and gets it back, page by page, for the next one: 12,000 page
    # faults, 11 ms of 163, in a step of bench.py's feed-forward layer. With these settings it keeps 512 MiB.
    with contextlib.suppress(OSError, AttributeError):  # another system
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: free memory at the end of the heap that is kept
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: the size from which a block is a mapping of its own


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can build and run something here; if not, says why in one line."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
        return True
    except Exception as e:  # no C++ compiler, no Python headers, no Triton: each raises its own kind
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        print(f"going on uncompiled, slower: torch.compile does not work here ({reason.strip()[:150]})")
        return False


# --------------------------------------------------------------------------------------------------- checkpoint and log


def save_checkpoint(path: Path, checkpoint: dict):
    """Write a checkpoint; until it is whole, `path` is the one before it."""
    try:
        config.write_atomically(path, functools.partial(torch.save, checkpoint))
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError for a full disk
        raise ValueError(
            f"cannot write {path}: {str(e).splitlines()[0]}; an earlier checkpoint, if there was one, is intact"
        ) from None


def load_checkpoint(source: str | Path) -> dict:
    """Read a torch checkpoint, or the one in a run folder: tensors and plain values on the CPU, never code.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or holds no model.
    """
    path = Path(source)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"bad checksum of {damaged}")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged zip, a truncated tensor and refused code each raise their own kind
        raise ValueError(f"{path} is damaged or not a checkpoint ({' '.join(str(e).split())[:120]})") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of a model")
    return saved


def build_model(model_config: ModelConfig, state: dict[str, Tensor], path: Path) -> PolychromaticLM:
    """A model with these weights. Raises ValueError, naming the file, for a tensor that does not fit."""
    try:
        model = PolychromaticLM(model_config)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{path} lacks the tensor {name}")
        if name not in expected:
            raise ValueError(f"{path} has an unexpected tensor: {name}")
        if state[name].shape != expected[name].shape:
            theirs, ours = list(state[name].shape), list(expected[name].shape)
            raise ValueError(f"{path}: the tensor {name} has the shape {theirs}, not {ours}")
    model.load_state_dict(state)
    return model


def find_checkpoint(cfg: TrainConfig) -> dict | None:
    """The checkpoint that cfg resumes, None for a run from the start; ends the script if cfg allows neither."""
    folder = Path(cfg.out_dir)
    ckpt = folder / "ckpt.pt"
    if not cfg.resume:
        if ckpt.exists() and not cfg.overwrite:
            raise ValueError(f"{ckpt} exists; --resume goes on with that run, --overwrite starts anew in its place")
        return None
    if not ckpt.exists():
        print(f"nothing to resume in {folder} yet: starting at step 0")
        return None
    try:
        checkpoint = load_checkpoint(ckpt)
    except (OSError, ValueError) as e:
        raise ValueError(f"{e}; start anew with --overwrite or another --out_dir=") from None
    if not {"model_config", "optimizer", "settings", "step", "skipped", "run_id"} <= checkpoint.keys():
        raise ValueError(f"{ckpt} holds weights alone and cannot be resumed; start anew with --overwrite")
    if cfg.init_from:
        adopt(cfg, checkpoint["model_config"], ckpt)
    for name, ours in dataclasses.asdict(cfg).items():
        theirs = checkpoint["settings"].get(name, ours)
        if ours != theirs and name in checkpoint["model_config"]:
            raise ValueError(f"{ckpt} was trained with {name}={theirs!r}, not {ours!r}; resume it with its own model")
        if ours != theirs and name not in ("resume", "overwrite"):
            print(f"resuming with {name}={ours!r}; it was {theirs!r}")
    if checkpoint["step"] > cfg.max_steps:
        raise ValueError(f"{ckpt} is at step {checkpoint['step']} already, beyond max_steps, {cfg.max_steps}")
    return checkpoint


def adopt(cfg: TrainConfig, shape: dict, source: str | Path):
    """Make the model of a run that of the weights it starts from; ends the script for a setting that contradicts them.

    What has no weights can be set otherwise, and a plain GLU can get more activations and a router.
    """
    free = {"block_size", "gumbel", "router_context", "tokenizer"}
    if len(shape["activations"]) == 1 and set(shape["activations"]) <= set(cfg.activations):
        free |= {"activations", "router_hidden"}
    for name, theirs in shape.items():
        ours = getattr(cfg, name)
        if name not in cfg.overridden:
            setattr(cfg, name, theirs)
        elif ours != theirs and name not in free:
            raise ValueError(f"{source} has {name}={theirs!r}, not {ours!r}")


def begin_run(cfg: TrainConfig, step: int | None):
    """Make the run folder fit the run: the log as it was at the resumed step, nothing old in a new run (step None)."""
    folder = Path(cfg.out_dir)
    try:
        if step is None:
            (folder / "ckpt.pt").unlink(missing_ok=True)  # before its log: what is left never belongs to another run
        # The evaluation at the resumed step, if there was one, is done again.
        lines = read_log(folder) if step is not None else []
        keep = [line for line in lines if line["step"] < step or (line["step"] == step and "loss" in line)]
        text = "".join(json.dumps(line) + "\n" for line in keep)
        config.write_atomically(folder / "log.jsonl", lambda file: file.write(text.encode()))
    except OSError as e:
        raise ValueError(f"cannot write to {folder}: {e.strerror}") from None


def open_log(cfg: TrainConfig, ranks: Ranks, run_id: str) -> Callable[[dict], None]:
    """What writes one object to log.jsonl, and to Weights & Biases if the run asks for it; on the first rank alone.

    A resumed run has the run_id of its checkpoint, and goes on in the same run there.
    """
    path, wandb_run = Path(cfg.out_dir) / "log.jsonl", None
    if cfg.wandb and ranks.rank == 0:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs a package: pip install wandb") from None
        try:
            settings = dataclasses.asdict(cfg)
            wandb_run = wandb.init(project=cfg.wandb, id=run_id, name=cfg.out_dir, resume="allow", config=settings)
            wandb_run.define_metric("*", step_metric="step")  # its own count would drop steps done again after a kill
        except Exception as e:  # no login, no network, no such project: each of its own kind
            raise ValueError(
                f"cannot log to Weights & Biases: {' '.join(str(e).split())[:200]}; without --wandb it works"
            ) from None

    def log(line: dict):
        if ranks.rank == 0:
            try:
                with open(path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as e:
                raise ValueError(f"cannot write {path}: {e.strerror}") from None
        if wandb_run:
            wandb_run.log(line)

    return log


def read_log(folder: Path) -> list[dict]:
    """The objects of a run's log.jsonl; lines that a kill cut short or that are none of ours are left out."""
    lines = []
    path = folder / "log.jsonl"
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------------------- the loop


def freeze(model: PolychromaticLM, parts: tuple[str, ...]):
    """Leave out of the training every parameter with one of the parts in its name; ends the script if none has one."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.|\.weight$", "", name) for name in names)
            raise ValueError(f"frozen: no parameter has {part!r} in its name; there are {', '.join(kinds)}")
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in parts))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"frozen: {','.join(parts)} leaves nothing to train")


def noise_seed(*key: int) -> int:
    """A well-mixed seed for a key such as (seed, step, micro-batch)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@torch.no_grad()
def evaluate(model: PolychromaticLM, corpus: Corpus, ranks: Ranks, autocast) -> dict:
    """Val loss of every domain, in nats per token and bits per byte, and the routing measures on rows of each."""
    model.eval()
    val, shown, n_domains = {}, [], len(corpus.cfg.mixture)
    room = -(-max(6, 2**13 // corpus.cfg.block_size) // n_domains)  # rows of a domain that show what the routing does
    for domain in corpus.cfg.mixture:
        total, count, rows = 0.0, 0.0, []
        for tokens, targets, doc_ids in corpus.val_batches(domain, ranks):
            with autocast:
                loss = model(tokens, targets, doc_ids).item()
            n = (targets >= 0).sum().item()
            total, count = total + loss * n, count + n
            if len(rows) < room:
                rows += zip(tokens, doc_ids, corpus.is_text(tokens, targets))
        shown += rows[:room]
        total, count = ranks.sum(total, count)
        val[domain] = {"loss": total / count, "bits_per_byte": corpus.bits_per_byte(domain, total / count)}
    routing = {}
    if ranks.rank == 0:
        with autocast:
            routing = routing_stats(model, *map(torch.stack, zip(*shown)))
    model.train()
    return {"val": val, "routing": routing}


def train(cfg: TrainConfig, corpus_type: type[Corpus] = Corpus):
    """Run the training that cfg describes, from its first step or from its checkpoint, to its last."""
    prepare_cpu()
    stop, ranks, folder = StopSignal(), Ranks(cfg.device), Path(cfg.out_dir)
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(config.locked(folder))
            except OSError as e:
                raise ValueError(
                    f"the run folder {folder} cannot be written: {e.strerror}; choose another with --out_dir="
                ) from None
        run(cfg, corpus_type, ranks, stop)
    if ranks.count > 1:
        torch.distributed.destroy_process_group()


def run(cfg: TrainConfig, corpus_type: type[Corpus], ranks: Ranks, stop: "StopSignal"):
    """train() on one of the ranks."""
    device, n_micro = ranks.device, cfg.batch_size // cfg.micro_batch_size
    if n_micro < ranks.count:
        raise ValueError(f"a step has {n_micro} micro-batches for {ranks.count} processes; lower --micro_batch_size")
    checkpoint, weights = find_checkpoint(cfg), None
    if checkpoint:
        weights = checkpoint["model"]
    elif cfg.init_from:
        try:
            from extras.weights import from_pretrained, upcycle

            source = from_pretrained(cfg.init_from, cfg.revision)
        except (OSError, ValueError) as e:
            raise ValueError(f"--init_from: {e}") from None
        adopt(cfg, dataclasses.asdict(source.config), cfg.init_from)
        weights = source.state_dict()
        if cfg.activations != source.config.activations:
            print(f"upcycling {'/'.join(source.config.activations)} to {'/'.join(cfg.activations)}: the same function")
            weights = upcycle(source, cfg.model_config(), cfg.tau_start)
        if len(source.config.activations) > 1 and abs(source.blocks[0].ffn.tau.item() - cfg.tau_start) > 1e-6:
            print(
                f"the routing goes from tau {source.blocks[0].ffn.tau.item():g} of {cfg.init_from} to {cfg.tau_start:g}"
            )
    corpus = corpus_type(cfg)
    run_id = checkpoint["run_id"] if checkpoint else uuid.uuid4().hex[:8]
    log = open_log(cfg, ranks, run_id)
    dtype = pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    ckpt = Path(cfg.out_dir) / "ckpt.pt"

    torch.manual_seed(cfg.seed)
    model = PolychromaticLM(cfg.model_config()).to(device)
    model.activation_checkpointing = cfg.recompute
    freeze(model, cfg.frozen)
    optimizer = model.configure_optimizer(cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2))
    for group in optimizer.param_groups:
        if group["routing"] and cfg.routing_lr:
            group["weight_decay"] /= cfg.routing_lr  # AdamW multiplies the two: to learn faster is not to forget faster
    first_step, skipped, resumed = 0, 0, checkpoint is not None
    try:
        if weights:
            model.load_state_dict(weights)
        if resumed:
            optimizer.load_state_dict(checkpoint["optimizer"])
            first_step, skipped = checkpoint["step"], checkpoint["skipped"]
            print(f"resumed {ckpt} at step {first_step}")
        elif weights:
            print(f"starting from the model of {cfg.init_from}")
    except (RuntimeError, ValueError, KeyError) as e:
        raise ValueError(f"{ckpt} does not fit its own settings: {' '.join(str(e).split())[:200]}") from None
    checkpoint = weights = source = None  # they hold as much memory as the model
    compiled = (device.type == "cuda" if cfg.compile is None else cfg.compile) and compiler_works(device)
    if compiled:
        for block in model.blocks:  # one graph serves all blocks: compiling takes as long for 28 as for one
            block.compile()
    forward = model
    if ranks.count > 1:
        forward = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {'/'.join(cfg.activations)}, on {ranks.count} x "
        f"{device.type} in {str(dtype)[6:]}{', compiled' if compiled else ''}; "
        f"{cfg.batch_size * cfg.block_size:,} tokens a step",
        flush=True,
    )

    def save(step: int):
        nonlocal saved
        saved = step
        if ranks.rank == 0:
            save_checkpoint(ckpt, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "skipped": skipped,
                "run_id": run_id, "model_config": dataclasses.asdict(model.config), "settings": dataclasses.asdict(cfg),
            })  # fmt: skip

    ranks.wait()  # all have read what is in the run folder; from here on it changes
    saved, skipped_in_a_row, meter = first_step, 0, SpeedMeter(model, cfg, ranks)
    if ranks.rank == 0:
        begin_run(cfg, first_step if resumed else None)
    if not resumed:
        save(0)  # from now on there is always a checkpoint to resume
    model.train()
    for step in range(first_step, cfg.max_steps + 1):
        lr, tau = lr_at(step, cfg), tau_at(step, cfg)
        set_tau(model, tau)
        if step % cfg.eval_interval == 0 or step == cfg.max_steps:
            with meter.paused():
                measured = evaluate(model, corpus, ranks, autocast)
            log({"step": step, "tau": tau, **measured})
            print_evaluation(step, measured)
        if step == cfg.max_steps:
            if saved < step:
                raise ValueError(
                    f"the run ended in non-finite updates; {ckpt} is at step {saved}; resume with a lower --lr"
                )
            command = shlex.join(["python", "sample.py", f"--out_dir={cfg.out_dir}"])
            print(f"done; {ckpt} is at step {step}. Read what it writes: {command}")
            break

        for group in optimizer.param_groups:
            group["lr"] = lr * (cfg.routing_lr if group["routing"] else 1)
        loss, mine = torch.zeros((), device=device), ranks.share(n_micro)
        for i, share, (tokens, targets, doc_ids) in corpus.micro_batches(step, ranks):
            torch.manual_seed(noise_seed(cfg.seed, step, i))  # the noise does not depend on the number of processes
            last = ranks.count == 1 or i == mine[-1]
            with contextlib.nullcontext() if last else forward.no_sync():
                with autocast:
                    micro_loss = forward(tokens, targets, doc_ids) * share
                (micro_loss * ranks.count).backward()  # gradients are summed over a step, but averaged over the ranks
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        loss, stopping = ranks.sum(loss, float(stop.requested))
        if math.isfinite(norm) and math.isfinite(loss):
            optimizer.step()
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            print(f"step {step}: loss {loss}, gradient norm {norm}; update skipped ({skipped} so far)")
            if skipped_in_a_row == MAX_SKIPPED:
                raise ValueError(f"{MAX_SKIPPED} non-finite updates in a row; {ckpt} is at step {saved}; lower --lr")
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        meter.count_step()
        if done % cfg.log_interval == 0 or done == cfg.max_steps:
            record = {
                "step": done, "loss": loss if math.isfinite(loss) else None, "lr": lr, "tau": tau,
                "mixture": mixture_at(step, cfg), "grad_norm": norm if math.isfinite(norm) else None,
                "skipped": skipped, **meter.read(),
            }  # fmt: skip
            log(record)
            print_step(record, cfg)
        due = stopping or done % cfg.save_interval == 0 or done == cfg.max_steps
        if due and not skipped_in_a_row:  # weights that make no finite step are not worth keeping
            set_tau(model, tau_at(done, cfg))
            save(done)
        if stopping:
            print(f"stopped; {ckpt} is at step {saved}. Go on with: {resume_command()}")
            break
    ranks.wait()


class SpeedMeter:
    """Tokens/s since it was last read, the model FLOPs utilisation that makes, and the peak of GPU memory."""

    def __init__(self, model: PolychromaticLM, cfg: TrainConfig, ranks: Ranks):
        self.tokens_per_step, self.flops_per_token = cfg.batch_size * cfg.block_size, model.flops_per_token()
        self.on_cuda = ranks.device.type == "cuda"
        name = torch.cuda.get_device_name() if self.on_cuda else ""
        self.peak = next((flops * ranks.count for card, flops in PEAK_FLOPS.items() if card in name), None)
        self.steps, self.since = 0, time.monotonic()

    def count_step(self):
        self.steps += 1

    @contextlib.contextmanager
    def paused(self):
        """Time that is not training's."""
        before = time.monotonic()
        yield
        self.since += time.monotonic() - before

    def read(self) -> dict[str, float | None]:
        now = time.monotonic()
        rate = self.steps * self.tokens_per_step / (now - self.since)
        self.steps, self.since = 0, now
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak if self.peak else None,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if self.on_cuda else None,
        }


class StopSignal:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested = True
        os.write(2, b"finishing the step, then saving; once more stops at once\n")  # print() may be under way
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def resume_command() -> str:
    """The command line of this run, with --resume."""
    args = [arg for arg in sys.argv if arg.split("=")[0] not in ("--resume", "--overwrite")]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = ["python"] if processes == "1" else ["torchrun", f"--nproc_per_node={processes}"]
    return shlex.join([*start, *args, "--resume"])


def print_step(record: dict, cfg: TrainConfig):
    """One line of a step's record, with the time left at this speed."""
    tokens_left = (cfg.max_steps - record["step"]) * cfg.batch_size * cfg.block_size
    left = datetime.timedelta(seconds=round(tokens_left / record["tokens_per_second"]))
    on_gpu = f"  MFU {record['mfu']:.1%}" if record["mfu"] else ""
    on_gpu += f"  {record['memory_gib']:.1f} GiB" if record["memory_gib"] else ""
    print(
        f"step {record['step']:>{len(str(cfg.max_steps))}}/{cfg.max_steps}  loss {record['loss'] or math.nan:.3f}  "
        f"lr {record['lr']:.1e}  tau {record['tau']:.2f}  norm {record['grad_norm'] or math.nan:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s{on_gpu}  {left} left",
        flush=True,
    )


def print_evaluation(step: int, measured: dict):
    """One line a measure: bits per byte of every domain, and the layers' mean of the routing's dynamic entropy."""
    bits = "  ".join(f"{domain} {val['bits_per_byte']:.3f}" for domain, val in measured["val"].items())
    print(f"step {step}: val bits per byte: {bits}")
    if routing := measured["routing"]:
        share, agreement = (np.mean(routing[name]) for name in ("dynamic_entropy_share", "agreement"))
        print(f"step {step}: routing: dynamic entropy {share:.1%} of ln K, agreement {agreement:.1%}", flush=True)


def main():
    train(config.load(TrainConfig))


if __name__ == "__main__":
    config.run(main)
