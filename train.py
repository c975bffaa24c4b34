"""Train a PolychromaticLM.

python train.py config/tiny.py                     minutes on two CPU cores, after python prepare_data.py tiny
python train.py config/tiny.py --max_steps=50      a flag overrides any setting
python train.py config/tiny.py --resume            continue a stopped or killed run
torchrun --nproc_per_node=8 train.py config/pretrain.py     on 8 GPUs: the same steps, the same data, the same loss

The defaults are the paper's pretraining run; config/pretrain.py adds its mixture. The run folder gets ckpt.pt,
log.jsonl and settings.json.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import shlex
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import config
from config import machine, runs
from extras.routing import routing_stats
from extras.weights import build_model, freeze, starting_model
from model import ModelConfig, PolychromaticLM, set_tau

MAX_SKIPPED = 5  # consecutive non-finite updates after which a run gives up


@dataclass
class TrainConfig(ModelConfig):
    """Settings of a run and its model. The defaults are the paper's recipe: 19,531 steps of 128 x 4,096 tokens."""

    overridden: ClassVar[frozenset[str]] = frozenset()  # names that files and flags set; filled in by config.load()
    # data
    data_dir: str = "data/pretrain"  # a corpus of prepare_data.py
    mixture: dict[str, float] | None = None  # each domain's share of a step; None: that of the corpus
    mixture_end: dict[str, float] | None = None  # shares at the last step; None: unchanged
    anneal_start: float = 0.8  # fraction of the run after which the mixture moves linearly to mixture_end
    seed: int = 1337  # of the initial weights, the data order and the routing noise
    # steps
    max_steps: int = 19_531  # optimizer steps; the schedules span them
    batch_size: int = 128  # rows of block_size tokens in a step
    micro_batch_size: int = 8  # rows in one forward pass; divides batch_size; the data stay the same
    # optimizer
    lr: float = 1e-4  # peak learning rate
    warmup_steps: int = 2000  # linear warm-up, then cosine decay to 0
    routing_lr: float = 1.0  # learning rate of alpha, beta and the router, as a multiple of lr; same weight decay
    alpha_lr: float = 1.0  # a further multiple for alpha
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.1  # AdamW, on weight matrices and the embedding only
    grad_clip: float = 1.0  # maximum gradient norm
    frozen: tuple[str, ...] = ()  # parameters to freeze: names or parts of names, for example alpha
    # routing temperature
    tau_start: float = 1.0  # routing temperature at the first step
    tau_end: float = 0.1  # routing temperature after the last step; linear in between
    # where a run starts and ends
    out_dir: str = "out/pretrain"  # the run folder
    init_from: str | None = None  # model to start from: a run folder, a checkpoint, a Qwen3, ...; None: random weights
    revision: str | None = None  # commit or tag of an init_from on the hub
    resume: bool = False  # continue from the run folder's checkpoint
    overwrite: bool = False  # start over in a run folder that already holds a checkpoint
    # evaluation, checkpoints and log
    eval_interval: int = 1000  # steps between evaluations; there is always one at the start and at the end
    eval_tokens: int = 1_048_576  # maximum tokens of each domain's val.bin in an evaluation
    save_interval: int = 500  # steps between checkpoints
    log_interval: int = 10  # steps between lines on the screen and in log.jsonl
    sample_tokens: int = 80  # length of the text that the model writes at every evaluation; 0: none
    wandb: str | None = None  # Weights & Biases project to log to as well; None: log.jsonl only
    # machine
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto, bfloat16 or float32; parameters are always float32
    compile: bool | None = None  # torch.compile; None: on CUDA only
    recompute: bool = False  # activation checkpointing: less memory, more time

    def __post_init__(self):
        super().__post_init__()
        config.check_range(self, 1, 10**8, "max_steps", "eval_interval", "save_interval", "log_interval")
        config.check_range(self, 1, 2**20, "batch_size", "micro_batch_size")
        config.check_range(self, 1, 2**40, "eval_tokens")
        config.check_range(self, 0, 2**20, "sample_tokens")
        config.check_range(self, 0, 2**63 - 1, "seed", "warmup_steps")
        config.check_range(self, 0, 1, "anneal_start", "weight_decay")
        config.check_range(self, 0, 0.99999, "beta1", "beta2")
        config.check_range(self, 1e-12, 1e12, "lr", "grad_clip")
        config.check_range(self, 0, 1e12, "routing_lr", "alpha_lr")
        config.check_range(self, 1e-3, 1e3, "tau_start", "tau_end")
        batch, micro = self.batch_size, self.micro_batch_size
        if batch % micro:
            raise ValueError(f"batch_size is {batch}; it must be a multiple of micro_batch_size, {micro}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")

    def model_config(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})


# ----------------------------------------------------------------------------------------------------------- schedules
def get_lr(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step (0-based): linear warm-up, then cosine decay to 0 at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def get_tau(step: int, cfg: TrainConfig) -> float:
    """Routing temperature of a step: linear from tau_start to tau_end (paper: max(0.1, 1 - 0.9 step / max_steps))."""
    return cfg.tau_start + (cfg.tau_end - cfg.tau_start) * min(1.0, step / cfg.max_steps)


def get_mixture(step: int, cfg: TrainConfig) -> dict[str, float]:
    """Shares of the domains in a step: mixture, moving linearly to mixture_end after anneal_start of the run."""
    start = cfg.anneal_start * cfg.max_steps
    moved = min(1.0, max(0.0, (step - start) / max(1.0, cfg.max_steps - 1 - start)))
    end = cfg.mixture_end or cfg.mixture
    return {domain: share + moved * (end[domain] - share) for domain, share in cfg.mixture.items()}


def quotas(cfg: TrainConfig) -> np.ndarray:
    """Rows of each domain in each step, [max_steps, domains] int64: shares of batch_size, rounded up or down.

    What rounding owes a domain carries over to the next steps (largest remainder).
    """
    table = np.empty((cfg.max_steps, len(cfg.mixture)), dtype=np.int64)
    owed = np.zeros(len(cfg.mixture))
    for step in range(cfg.max_steps):
        ideal = np.array(list(get_mixture(step, cfg).values())) * cfg.batch_size
        owed += ideal
        table[step] = np.floor(ideal + 1e-9)
        behind = np.argsort(table[step] - owed, kind="stable")  # what is left goes to the domains furthest behind
        fractional = [d for d in behind if ideal[d] - table[step, d] > 1e-9]
        table[step, fractional[: cfg.batch_size - table[step].sum()]] += 1
        owed -= table[step]
    return table


# ---------------------------------------------------------------------------------------------------------------- data
class Corpus:
    """A corpus of prepare_data.py. A step's batch depends on (seed, step) alone, so there is no state to save."""

    sample_command = ("python", "sample.py")  # shows what a model trained on it writes

    def __init__(self, cfg: TrainConfig):
        """Sets cfg.mixture if it is None. Raises ValueError if the corpus is missing, damaged, or does not fit cfg."""
        self.cfg, self.folder = cfg, Path(cfg.data_dir)
        default_mixture = self.read_meta()
        cfg.mixture = cfg.mixture or default_mixture
        self.check_fit()
        self.tokens = {domain: {s: self.open_tokens(domain, s) for s in ("train", "val")} for domain in cfg.mixture}
        self.quotas = quotas(cfg)
        self.visited = np.concatenate((np.zeros_like(self.quotas[:1]), self.quotas.cumsum(0)))  # before each step
        self.orders: dict[str, tuple[int, np.ndarray]] = {}  # of each domain: the epoch and the order of its rows

    def read_meta(self) -> dict[str, float]:
        """Read meta.json. Returns each domain's share of a step: as written there, else by size."""
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.tokenizer, self.vocab = str(meta["tokenizer"]), meta.get("vocab")
            self.vocab_size = int(meta["vocab_size"])
            self.dtype, self.end_of_text = np.dtype(meta["dtype"]), int(meta["end_of_text"])
            self.domains = dict(meta["domains"])
            has_shares = all("share" in counts for counts in self.domains.values())
            weights = {name: c["share" if has_shares else "train_tokens"] for name, c in self.domains.items()}
            return {domain: weight / sum(weights.values()) for domain, weight in weights.items()}
        except OSError:
            raise ValueError(f"no data in {self.folder}; {self.how_to_make('make it')}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{self.folder}/meta.json is damaged ({e!r}); {self.how_to_make()}") from None

    def check_fit(self):
        """Raise ValueError if the model's tokenizer or the mixture does not fit the corpus."""
        cfg, folder, V = self.cfg, self.folder, self.vocab_size
        if self.tokenizer != cfg.tokenizer or V > cfg.vocab_size:
            remedy = f"train with --tokenizer={self.tokenizer} --vocab_size={V} or on other data"
            raise ValueError(
                f"{folder} has tokenizer {self.tokenizer!r} with {V:,} tokens, the model {cfg.tokenizer!r} "
                f"with {cfg.vocab_size:,}; {'prepare other data' if cfg.init_from else remedy}"
            )
        for mixture in (cfg.mixture, cfg.mixture_end or cfg.mixture):
            if unknown := [domain for domain in mixture if domain not in self.domains]:
                raise ValueError(f"the mixture names {unknown[0]!r}; {folder} has {', '.join(self.domains)}")
            if set(mixture) != set(cfg.mixture) or min(mixture.values()) < 0 or abs(sum(mixture.values()) - 1) > 1e-6:
                raise ValueError(f"the mixture {mixture} must be shares of {', '.join(cfg.mixture)} that sum to 1")

    def how_to_make(self, advice: str = "make it again") -> str:
        return runs.how_to_make(self.cfg.data_dir, self.cfg.tokenizer, advice)

    def open_tokens(self, domain: str, split: str) -> np.ndarray:
        tokens = self.open_file(domain, f"{split}.bin", self.domains[domain][f"{split}_tokens"], self.dtype)
        if len(tokens) <= self.cfg.block_size:
            window = f"a window of block_size {self.cfg.block_size} + 1"
            raise ValueError(f"{self.folder / domain / split}.bin has {len(tokens):,} tokens, fewer than {window}")
        return tokens

    def open_file(self, domain: str, name: str, length: int, dtype: np.dtype) -> np.ndarray:
        path, expected = self.folder / domain / name, length * dtype.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise ValueError(f"{path} holds {size:,} bytes, not the {expected:,} of meta.json; {self.how_to_make()}")
        return np.memmap(path, dtype=dtype, mode="r")

    def read(self, domain: str, split: str, start: int, end: int) -> np.ndarray:
        """Tokens start..end of a split, int64."""
        tokens = self.tokens[domain][split][start:end].astype(np.int64)
        if tokens.max() >= self.cfg.vocab_size:
            path = self.folder / domain / f"{split}.bin"
            raise ValueError(f"{path} is damaged: it has a token {tokens.max()}; {self.how_to_make()}")
        return tokens

    def n_rows(self, domain: str, split: str) -> int:
        return (len(self.tokens[domain][split]) - 1) // self.cfg.block_size

    def row(self, domain: str, split: str, index: int) -> np.ndarray:
        """Tokens, their targets (the next tokens) and document ids: [3, block_size] int64."""
        T = self.cfg.block_size
        window = self.read(domain, split, index * T, index * T + T + 1)
        ends = window[:-1] == self.end_of_text  # <|endoftext|> is the last token of its document
        return np.stack((window[:-1], window[1:], ends.cumsum() - ends))

    def nth_row(self, domain: str, n: int) -> int:
        """Index of the n-th training row visited: every row once an epoch, in a new random order each time."""
        epoch, place = divmod(n, self.n_rows(domain, "train"))
        if domain not in self.orders or self.orders[domain][0] != epoch:
            rng = np.random.default_rng([self.cfg.seed, epoch, *domain.encode()])
            self.orders[domain] = epoch, rng.permutation(self.n_rows(domain, "train"))
        return self.orders[domain][1][place]

    def batch(self, step: int) -> np.ndarray:
        """The rows of a step, [batch_size, 3, block_size] int64."""
        rows = [
            self.row(domain, "train", self.nth_row(domain, self.visited[step, d] + i))
            for d, domain in enumerate(self.cfg.mixture)
            for i in range(self.quotas[step, d])
        ]
        return np.stack(rows)

    def micro_batches(self, step: int, ranks: machine.Ranks) -> Iterator[tuple[int, float, tuple]]:
        """This rank's micro-batches of a step: index in the step, share of the step's targets, to_inputs()."""
        batch = self.batch(step)
        parts = np.split(batch, self.cfg.batch_size // self.cfg.micro_batch_size)
        total = np.count_nonzero(batch[:, 1] >= 0)
        for i in ranks.share(len(parts)):
            yield i, np.count_nonzero(parts[i][:, 1] >= 0) / total, to_inputs(parts[i], ranks.device)

    def val_batches(self, domain: str, ranks: machine.Ranks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's batches of eval_tokens tokens, evenly spaced over the domain's val.bin, as to_inputs()."""
        B, total = self.cfg.micro_batch_size, self.n_rows(domain, "val")
        count = min(total, max(1, self.cfg.eval_tokens // self.cfg.block_size))
        chosen = np.linspace(0, total - 1, count).astype(np.int64)
        for i in ranks.share(-(-count // B)):
            rows = np.stack([self.row(domain, "val", index) for index in chosen[i * B : i * B + B]])
            batch = np.resize(rows, (B, *rows.shape[1:]))  # every batch has one shape, so nothing recompiles
            batch[len(rows) :, 1] = -1  # the last one is filled up with ignored targets
            yield to_inputs(batch, ranks.device)

    def prompt(self) -> list[int]:
        """What a sample continues: <|endoftext|>, after which a document starts."""
        return [self.end_of_text]

    def is_text(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Which tokens are not padding, [B, T] bool. Padding is <|endoftext|> that predicts nothing."""
        return (targets >= 0) | (tokens != self.end_of_text)

    def bits_per_byte(self, domain: str, loss: float) -> float:
        """A loss on the domain's val.bin, in nats per token, as bits per byte of its text."""
        counts = self.domains[domain]
        targets = counts.get("val_targets", counts["val_tokens"])  # a chat predicts only some of its tokens
        return loss / math.log(2) * targets / max(1, counts["val_bytes"])


def to_inputs(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, 3, block_size] -> tokens, targets and doc_ids, each [B, block_size] int64, on the device."""
    inputs = torch.from_numpy(rows.transpose(1, 0, 2).copy())
    inputs = inputs.pin_memory() if device.type == "cuda" else inputs  # pinned memory is copied while the GPU computes
    return inputs.to(device, non_blocking=True).unbind()


# ------------------------------------------------------------------------------------------------------------ training
@torch.no_grad()
def evaluate(model: PolychromaticLM, corpus: Corpus, ranks: machine.Ranks, autocast) -> dict:
    """Validation loss of each domain, in nats per token and bits per byte, and the routing measures on a few rows."""
    model.eval()
    val, measured = {}, []  # rows on which to measure the routing: 8,192 tokens, or 6 rows if that is more
    n_measured = -(-max(6, 2**13 // corpus.cfg.block_size) // len(corpus.cfg.mixture))  # of each domain
    for domain in corpus.cfg.mixture:
        total, count, rows = 0.0, 0.0, []
        for tokens, targets, doc_ids in corpus.val_batches(domain, ranks):
            with autocast:
                loss = model(tokens, targets, doc_ids).item()
            n = (targets >= 0).sum().item()
            total, count = total + loss * n, count + n
            if len(rows) < n_measured:
                rows += zip(tokens, doc_ids, corpus.is_text(tokens, targets))
        measured += rows[:n_measured]
        total, count = ranks.sum(total, count)
        val[domain] = {"loss": total / count, "bits_per_byte": corpus.bits_per_byte(domain, total / count)}
    routing = {}
    if ranks.rank == 0:
        with autocast:
            tokens, doc_ids, is_text = map(torch.stack, zip(*measured))
            routing = routing_stats(model, tokens, doc_ids, is_text)
    model.train()
    return {"val": val, "routing": routing}


def set_up(cfg: TrainConfig, corpus_type: type[Corpus], device: torch.device):
    """The model, corpus and optimizer of a run; the step of its checkpoint (-1: a new run), skipped updates and run id.

    Afterwards cfg is final: its shape is that of the checkpoint or init_from, a missing mixture that of the corpus.
    """
    # checkpoint to resume, or model to start from; with init_from, its shape becomes that of cfg
    checkpoint = runs.find_checkpoint(cfg)
    model = starting_model(cfg) if cfg.init_from and not checkpoint else None

    # data, which sets cfg.mixture if there is none; only now can cfg be compared with the checkpoint's settings
    corpus = corpus_type(cfg)
    if checkpoint:
        runs.print_changes(checkpoint, cfg, corpus.domains)

    # model
    ckpt = Path(cfg.out_dir) / "ckpt.pt"
    if checkpoint:
        model = build_model(cfg.model_config(), checkpoint["model"], ckpt)
    elif not model:
        torch.manual_seed(cfg.seed)
        model = PolychromaticLM(cfg.model_config())
    model.to(device)
    model.activation_checkpointing = cfg.recompute
    freeze(model, cfg.frozen)

    # optimizer
    betas, scales = (cfg.beta1, cfg.beta2), {"routing_lr": cfg.routing_lr, "alpha_lr": cfg.alpha_lr}
    optimizer = model.configure_optimizer(cfg.lr, cfg.weight_decay, betas, **scales)
    if not checkpoint:
        return model, corpus, optimizer, -1, 0, uuid.uuid4().hex[:8]
    ours = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError as e:
        raise ValueError(f"{ckpt} cannot be resumed: {e}; start from its weights with --init_from") from None
    for group, settings in zip(optimizer.param_groups, ours):
        group.update(settings)  # this run's betas, weight decay and lr_scale, not the checkpoint's
    print(f"resumed {ckpt} at step {checkpoint['step']}")
    return model, corpus, optimizer, checkpoint["step"], checkpoint["skipped"], checkpoint["run_id"]


def train(cfg: TrainConfig, corpus_type: type[Corpus] = Corpus):
    """Run the training that cfg describes, from its first step or its checkpoint on. sft.py has its own corpus_type."""
    # machine
    machine.prepare_cpu()
    stop, ranks, folder = machine.StopSignal(), machine.Ranks(cfg.device), Path(cfg.out_dir)
    device, is_main, ckpt = ranks.device, ranks.rank == 0, folder / "ckpt.pt"
    dtype = machine.pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    n_micro = cfg.batch_size // cfg.micro_batch_size
    if n_micro < ranks.world_size:
        raise ValueError(f"{n_micro} micro-batches a step for {ranks.world_size} processes; lower --micro_batch_size")
    lock = contextlib.ExitStack()  # no other process may write to the run folder until this one ends
    if is_main:
        with config.name_write_errors(folder, "; choose another run folder with --out_dir="):
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(config.locked(folder))

    # model, data, optimizer
    model, corpus, optimizer, saved, skipped, run_id = set_up(cfg, corpus_type, device)  # saved: step of ckpt.pt
    first_step, encoding = max(saved, 0), None
    if cfg.sample_tokens and is_main:
        from extras.samples import open_tokenizer, write_sample

        encoding = open_tokenizer(corpus)

    # compile
    forward = model
    compiled = (device.type == "cuda" if cfg.compile is None else cfg.compile) and machine.compiler_works(device)
    if compiled:
        model.compile()
    if ranks.world_size > 1:
        torch._dynamo.config.optimize_ddp = False  # DDP would split each compiled block into three graphs
        forward = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # log
    wandb_run = None
    if cfg.wandb and is_main:
        from extras.wandb_log import open_wandb

        wandb_run = open_wandb(cfg.wandb, run_id, cfg.out_dir, dataclasses.asdict(cfg))

    def log(record: dict):
        record = json.loads(json.dumps(record), parse_constant=lambda name: None)  # NaN and Infinity become null
        if is_main:
            with config.name_write_errors(folder / "log.jsonl"), open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if wandb_run:
            wandb_run.log(record)

    machine.print_start(model, cfg, ranks, compiled)
    ranks.wait()  # all ranks have read the run folder; from here on it changes: --overwrite deletes the old run
    if is_main:
        runs.rewind(folder, saved)
        with config.name_write_errors(folder / "settings.json"):
            config.write_json(folder / "settings.json", dataclasses.asdict(cfg))

    # loop
    stopping, skipped_in_a_row, logged, t0 = False, 0, first_step, time.monotonic()
    model.train()
    for step in range(first_step, cfg.max_steps + 1):  # the last pass only saves and evaluates
        # learning rate and routing temperature of this step
        lr, tau = get_lr(step, cfg), get_tau(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        set_tau(model, tau)

        # save, unless the last update was not finite: then the weights may be ruined already
        overdue = step - saved > cfg.save_interval
        save_due = step % cfg.save_interval == 0 or overdue or step == cfg.max_steps or stopping
        if save_due and step > saved and not skipped_in_a_row:
            saved = step
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "skipped": skipped,
                "run_id": run_id, "model_config": dataclasses.asdict(model.config), "settings": dataclasses.asdict(cfg),
                "domains": corpus.domains,
            }  # fmt: skip
            if is_main:
                with config.name_write_errors(ckpt, "; an earlier checkpoint, if there was one, is intact"):
                    config.write_atomically(ckpt, functools.partial(torch.save, state))
        where_saved = f"{ckpt} is at step {saved}"
        if stopping:
            print(f"stopped; {where_saved}. Go on with: {runs.resume_command()}")
            break

        # evaluate
        if step % cfg.eval_interval == 0 or step == cfg.max_steps:
            started = time.monotonic()
            measured = evaluate(model, corpus, ranks, autocast)
            log({"step": step, "tau": tau, **measured})
            print_evaluation(step, measured)
            is_finite = all(math.isfinite(val["loss"]) for val in measured["val"].values())
            if encoding and is_finite:
                with autocast:
                    print(f"step {step}: sample: {write_sample(model, corpus, encoding)}", flush=True)
            t0 += time.monotonic() - started  # excluded from the throughput
        if step == cfg.max_steps:
            if saved < step:
                raise ValueError(f"the run ended in non-finite updates; {where_saved}; resume with a lower --lr")
            command = shlex.join([*corpus.sample_command, cfg.out_dir])
            print(f"done; {where_saved}. Read what it writes: {command}")
            break

        # accumulate gradients
        loss = torch.zeros((), device=device)
        for i, share, (tokens, targets, doc_ids) in corpus.micro_batches(step, ranks):
            seed = np.random.SeedSequence((cfg.seed, step, i)).generate_state(1, np.uint64)
            torch.manual_seed(int(seed[0]))  # the routing noise does not depend on the number of processes
            forward.require_backward_grad_sync = i + ranks.world_size >= n_micro  # read by DDP: at its last micro-batch
            with autocast:
                micro_loss = forward(tokens, targets, doc_ids) * share
            (micro_loss * ranks.world_size).backward()  # DDP averages the gradients over the ranks; this sums them
            loss += micro_loss.detach()

        # clip and step
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        loss, stops = ranks.sum(loss, float(stop.requested))
        if math.isfinite(norm) and math.isfinite(loss):
            optimizer.step()
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            print(f"step {step}: loss {loss}, gradient norm {norm}; update skipped ({skipped} so far)")
            if skipped_in_a_row == MAX_SKIPPED:
                raise ValueError(f"{MAX_SKIPPED} non-finite updates in a row; {where_saved}; lower --lr")
        optimizer.zero_grad(set_to_none=True)
        stopping = stops > 0 and not skipped_in_a_row  # after a skipped update, only once one succeeds

        # log
        now, log_due = time.monotonic(), (step + 1) % cfg.log_interval == 0 or step + 1 == cfg.max_steps
        if step == first_step and not log_due:
            logged, t0 = step + 1, now  # the first step compiles: excluded from the throughput
        if log_due:
            rate = (step + 1 - logged) * cfg.batch_size * cfg.block_size / (now - t0)
            logged, t0 = step + 1, now
            record = {
                "step": step + 1, "loss": loss, "lr": lr, "tau": tau, "mixture": get_mixture(step, cfg),
                "grad_norm": norm, "skipped": skipped, "tokens_per_second": rate,
                "mfu": rate * machine.flops_per_token(model) / (ranks.world_size * machine.peak_flops(device)),
                "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            }  # fmt: skip
            log(record)
            print_step(record, cfg)
    ranks.wait()
    lock.close()
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()


def print_step(record: dict, cfg: TrainConfig):
    """One line for a record of the log, with the time left at this speed."""
    tokens_left = (cfg.max_steps - record["step"]) * cfg.batch_size * cfg.block_size
    left = datetime.timedelta(seconds=round(tokens_left / record["tokens_per_second"]))
    # MFU counts full T x T attention, as is customary; causal document masks skip half of it or more.
    on_gpu = f"  MFU {record['mfu']:.1%} (full attention)" if math.isfinite(record["mfu"]) else ""
    on_gpu += f"  {record['memory_gib']:.1f} GiB" if record["memory_gib"] else ""
    print(
        f"step {record['step']:>{len(str(cfg.max_steps))}}/{cfg.max_steps}  loss {record['loss']:.3f}  "
        f"lr {record['lr']:.1e}  tau {record['tau']:.2f}  norm {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s{on_gpu}  {left} left",
        flush=True,
    )


def print_evaluation(step: int, measured: dict):
    """Bits per byte of each domain; the routing's dynamic entropy and agreement, means over the layers."""
    bits = "  ".join(f"{domain} {val['bits_per_byte']:.3f}" for domain, val in measured["val"].items())
    print(f"step {step}: val bits per byte: {bits}")
    if routing := measured["routing"]:
        share, agreement = (np.mean(routing[name]) for name in ("dynamic_entropy_share", "agreement"))
        print(f"step {step}: routing: dynamic entropy {share:.1%} of ln K, agreement {agreement:.1%}", flush=True)


def main():
    train(config.load(TrainConfig))


if __name__ == "__main__":
    config.run(main)
