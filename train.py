"""Train a PolychromaticLM.

python train.py config/smoke.py                 data, training, evaluation and a sample in a minute
python train.py config/tiny.py                  four minutes on two CPU cores
python train.py config/tiny.py --max_steps=50   a flag overrides any setting
python train.py config/tiny.py --resume         continue a stopped run
torchrun --nproc_per_node=8 --shutdown_timeout=600 train.py config/pretrain.py
                                                8 GPUs: the same steps and data

The defaults are the paper's pretraining run; config/pretrain.py adds the data mixture. The run folder
gets ckpt.pt, log.jsonl and settings.json; if asked, best.pt, ckpt_<step>.pt and trace.json too.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import math
import shlex
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

# before torch: it sets environment variables that torch reads, and makes Ctrl-C during the imports one line
from common import settings  # isort: skip

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from common import run as runtime
from common.data import Corpus, to_inputs
from common.routing import routing_stats
from common.run import Ranks
from common.settings import UserError, check_range
from model import ModelConfig, PolychromaticLM, set_tau

# a resumed run does not report changes to these settings; check_changes() reports init_from itself
UNREPORTED = "resume overwrite eval_only init_from revision out_dir profile".split()
MAX_SKIPPED = 5  # consecutive non-finite updates after which a run gives up


@dataclass
class TrainConfig(ModelConfig):
    """Settings of a run and its model. The defaults are the paper's pretraining."""

    overridden: ClassVar[frozenset[str]] = frozenset()  # set by load(): names in files and flags
    # data
    data_dir: str = "data/pretrain"  # a corpus of prepare_data.py
    mixture: dict[str, float] | None = None  # each domain's share of a step; None: as in the corpus
    mixture_end: dict[str, float] | None = None  # shares at the last step; None: unchanged
    anneal_start: float = 0.8  # fraction of the run after which the mixture moves to mixture_end
    seed: int = 1337  # of the initial weights, the data order and the routing noise
    # steps
    max_steps: int = 19_531  # optimizer steps; the schedules span them
    batch_size: int = 128  # rows of block_size tokens in a step
    micro_batch_size: int = 8  # rows in a forward pass; divides batch_size; does not change the data
    # optimizer
    lr: float = 1e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at which the decay ends
    warmup_steps: int = 2000  # linear warm-up, then cosine decay to min_lr
    routing_lr: float = 1.0  # learning rate of alpha, beta and the router, as a multiple of lr
    alpha_lr: float = 1.0  # a further multiple for alpha
    beta1: float = 0.9  # AdamW, decay of the mean of gradients
    beta2: float = 0.95  # AdamW, decay of the mean of their squares
    weight_decay: float = 0.1  # AdamW, on weight matrices and the embedding only
    grad_clip: float = 1.0  # maximum gradient norm
    frozen: tuple[str, ...] = ()  # parameters to freeze: names or parts of names, for example alpha
    # routing temperature
    tau_start: float = 1.0  # routing temperature at the first step
    tau_end: float = 0.1  # routing temperature after the last step; linear in between
    # where a run starts and ends
    out_dir: str = "out/pretrain"  # the run folder
    init_from: str | None = None  # run folder, checkpoint, Qwen3, ... to start from; None: random
    revision: str | None = None  # commit or tag of an init_from on the hub
    resume: bool = False  # continue from the run folder's checkpoint
    overwrite: bool = False  # start over in a run folder that already holds a checkpoint
    # evaluation, checkpoints and log
    eval_interval: int = 1000  # steps between evaluations; one is at the start, one at the end
    eval_tokens: int | None = None  # tokens of each val.bin; None: a million, but in all no more than the run trains on
    eval_only: bool = False  # evaluate out_dir's checkpoint, else init_from, and change no file
    save_interval: int = 500  # at most this many steps between checkpoints
    keep_best: bool = False  # also save best.pt when an evaluation finds the lowest loss so far
    keep_every: int | None = None  # also save ckpt_<step>.pt every so many steps; None: never
    log_interval: int = 10  # steps between lines on the screen and in log.jsonl
    sample_tokens: int = 80  # length of the text that the model writes at every evaluation; 0: none
    wandb: str | None = None  # Weights & Biases project to log to as well; None: log.jsonl only
    profile: bool = False  # trace the sixth to eighth step of this start with torch's profiler, into trace.json
    # machine
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of matmuls: auto (bfloat16 if fast), bfloat16 or float32 (TF32 on CUDA); weights stay float32
    compile: bool | None = None  # torch.compile; None: on CUDA, and on a CPU from 1,000 steps on
    recompute: bool = False  # activation checkpointing: less memory, more time

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 1, 10**8, "max_steps", "eval_interval", "save_interval", "log_interval")
        check_range(self, 1, 2**20, "batch_size", "micro_batch_size")
        check_range(self, 1, 2**40, "eval_tokens", "keep_every")
        check_range(self, 0, 2**20, "sample_tokens")
        check_range(self, 0, 2**63 - 1, "seed", "warmup_steps")
        check_range(self, 0, 1, "anneal_start", "weight_decay")
        check_range(self, 0, 0.99999, "beta1", "beta2")
        check_range(self, 1e-12, 1e12, "lr", "grad_clip")
        check_range(self, 0, self.lr, "min_lr")
        check_range(self, 0, 1e12, "routing_lr", "alpha_lr")
        check_range(self, 1e-3, 1e3, "tau_start", "tau_end")
        batch, micro = self.batch_size, self.micro_batch_size
        if batch % micro:
            found = f"batch_size is {batch}; it must be a multiple of micro_batch_size {micro}"
            raise UserError(f"{found}; change either")
        if self.init_from == "resume":
            raise UserError("init_from='resume' is nanoGPT's; here it is --resume")
        if self.overwrite and (self.resume or self.eval_only):
            other = "resume" if self.resume else "eval_only"
            raise UserError(f"{other} and overwrite cannot be combined; --overwrite=False turns one off")

    def model_config(self) -> ModelConfig:
        try:
            return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})
        except ValueError as e:  # an override contradicts what init_from has
            raise UserError(str(e)) from None


# --------------------------------------------------------------------------------------- schedules


def get_lr(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step (0-based): linear warm-up, then cosine decay to min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def get_tau(step: int, cfg: TrainConfig) -> float:
    """Routing temperature of a step: linear from tau_start to tau_end, as in the paper."""
    return cfg.tau_start + (cfg.tau_end - cfg.tau_start) * min(1.0, step / cfg.max_steps)


def get_mixture(step: int, cfg: TrainConfig) -> dict[str, float]:
    """Shares of the domains: mixture until anneal_start, then linear to mixture_end."""
    start = min(cfg.anneal_start * cfg.max_steps, cfg.max_steps - 2)  # the last step has mixture_end
    moved = max(0.0, (step - start) / (cfg.max_steps - 1 - start))
    end = cfg.mixture_end or cfg.mixture
    return {domain: share + moved * (end[domain] - share) for domain, share in cfg.mixture.items()}


def rows_per_step(cfg: TrainConfig) -> np.ndarray:
    """Rows of each domain in each step, [max_steps, domains] int64: shares of batch_size, rounded.

    Rounds down; the rows left over go to the domains that are owed most from all steps so far.
    """
    table = np.empty((cfg.max_steps, len(cfg.mixture)), dtype=np.int64)
    owed = np.zeros(len(cfg.mixture))
    for step in range(cfg.max_steps):
        ideal = np.array(list(get_mixture(step, cfg).values())) * cfg.batch_size
        owed += ideal
        table[step] = np.floor(ideal + 1e-9)
        by_debt = np.argsort(table[step] - owed, kind="stable")  # first the domain that is owed most
        fractional = [d for d in by_debt if ideal[d] - table[step, d] > 1e-9]  # others need no rounding
        n_left = cfg.batch_size - table[step].sum()
        table[step, fractional[:n_left]] += 1
        owed -= table[step]
    return table


# --------------------------------------------------------------------------------- what a run holds


@dataclass
class Progress:
    """How far a run has got. It is saved in the checkpoint: a resumed run continues with the next unread row."""

    step: int = 0  # optimizer steps taken
    rows_read: dict[str, int] = field(default_factory=dict)  # training rows, by domain
    skipped: int = 0  # updates that were not finite
    skipped_in_a_row: int = 0
    last_saved_step: int = 0  # 0: nothing saved yet
    best_loss: float = math.inf  # of best.pt: bits per byte, the mean of the domains
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # for Weights & Biases


@dataclass
class Run:
    """All that a training run works with, and how far it has got."""

    cfg: TrainConfig  # set_up() has filled in the model's shape, the mixture and eval_tokens
    ranks: Ranks
    model: PolychromaticLM
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    val_corpus: Corpus
    progress: Progress
    wandb: object = None  # the run in Weights & Biases, if --wandb asks for one

    def __post_init__(self):
        self.folder = Path(self.cfg.out_dir)
        self.autocast = runtime.pick_autocast(self.cfg.dtype, self.ranks.device)
        self.is_writer = self.ranks.is_main and not self.cfg.eval_only

    def where_saved(self) -> str:
        step = self.progress.last_saved_step
        return f"{self.folder / 'ckpt.pt'} is at step {step}" if step else "nothing was saved yet"


# ------------------------------------------------------------------------------- a step of training


def configure_optimizer(model: PolychromaticLM, cfg: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW. Weight matrices and the embedding decay; alpha, beta, norms and biases never do.

    The loop multiplies the learning rate by each group's lr_scale.
    """
    scale = cfg.routing_lr
    router_decay = cfg.weight_decay / (scale or 1)  # AdamW decays by lr * this: a higher lr decays no more
    groups = {
        "matrices": {"lr_scale": 1.0, "weight_decay": cfg.weight_decay},
        "vectors": {"lr_scale": 1.0, "weight_decay": 0.0},
        "router matrices": {"lr_scale": scale, "weight_decay": router_decay},
        "router vectors": {"lr_scale": scale, "weight_decay": 0.0},
        "alpha": {"lr_scale": scale * cfg.alpha_lr, "weight_decay": 0.0},
    }
    for name, p in model.named_parameters():
        kind = "matrices" if p.dim() == 2 else "vectors"
        kind = f"router {kind}" if ".ffn.router_" in name or name.endswith(".ffn.beta") else kind
        kind = "alpha" if name.endswith(".ffn.alpha") else kind
        if p.requires_grad:
            groups[kind].setdefault("params", []).append(p)
    groups = [group for group in groups.values() if "params" in group]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)


def next_rows(run: Run, n_rows: np.ndarray) -> np.ndarray:
    """The next n_rows[d] rows of each domain d, [batch_size, 3, T]: tokens, targets, doc_ids.

    Counts them in progress.rows_read.
    """
    rows = []
    for domain, n in zip(run.cfg.mixture, n_rows.tolist()):
        first = run.progress.rows_read.get(domain, 0)
        indices = [run.corpus.nth_row(domain, first + i) for i in range(n)]  # in shuffled order
        rows += [run.corpus.row(domain, index) for index in indices]
        run.progress.rows_read[domain] = first + n
    return np.stack(rows)


def optimizer_step(model, run: Run, rows: np.ndarray, step: int) -> tuple[float, float]:
    """Accumulate the gradients of these rows, clip, update; returns the loss and the norm before clipping.

    model is run.model as compiled and distributed. A non-finite loss or norm changes no weight.
    """
    ranks = run.ranks
    loss = torch.zeros((), device=ranks.device)
    parts = np.split(rows, len(rows) // run.cfg.micro_batch_size)
    n_targets = np.count_nonzero(rows[:, 1] >= 0)
    for i in ranks.items(len(parts)):  # several GPUs share them
        # the routing noise does not depend on the number of GPUs
        seed = np.random.SeedSequence((run.cfg.seed, step, i)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        weight = np.count_nonzero(parts[i][:, 1] >= 0) / n_targets
        model.require_backward_grad_sync = i + ranks.world_size >= len(parts)  # DDP: in this rank's last one only
        with run.autocast:
            micro_loss = model(*to_inputs(parts[i], ranks.device)) * weight
        (micro_loss * ranks.world_size).backward()  # DDP averages over the GPUs; this sums
        loss += micro_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.cfg.grad_clip).item()
    (loss,) = ranks.sum(loss)
    if math.isfinite(loss) and math.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def count_step(run: Run, loss: float, norm: float):
    """Count a step. Raises UserError after MAX_SKIPPED non-finite updates in a row; none of them was applied."""
    progress = run.progress
    progress.step += 1
    if math.isfinite(loss) and math.isfinite(norm):
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    skipped = f"update skipped ({progress.skipped} so far)"
    print(f"step {progress.step}: loss {loss}, gradient norm {norm}; {skipped}")
    if progress.skipped_in_a_row == MAX_SKIPPED:
        raise UserError(f"{MAX_SKIPPED} non-finite updates in a row; {run.where_saved()}; lower --lr")


# ------------------------------------------------------------------------------------------ the run


def train(cfg: TrainConfig, corpus_type: type[Corpus] = Corpus):
    """Run the training that cfg describes, from its first step or its checkpoint on."""
    # the machine, and the lock on the run folder
    runtime.prepare_cpu()
    ranks = Ranks(cfg.device)
    folder, is_writer = Path(cfg.out_dir), ranks.is_main and not cfg.eval_only
    lock = runtime.locked(folder) if is_writer else contextlib.nullcontext()
    is_traced = is_writer and cfg.profile
    trace = runtime.tracing(folder / "trace.json") if is_traced else contextlib.nullcontext(lambda: None)
    with lock, trace as end_traced_step:
        # model, data, optimizer, and how far an earlier start got
        run = set_up(cfg, corpus_type, ranks)
        model = compile_and_distribute(run)
        progress = run.progress
        n_rows = rows_per_step(cfg)
        step_seconds = []  # since the last line of the log
        stop = None

        # --eval_only: evaluate once
        if cfg.eval_only:
            report(run)
            ranks.wait(is_last=True)
            return

        model.train()
        set_tau(model, get_tau(progress.step, cfg))
        for step in range(progress.step, cfg.max_steps):
            # evaluate
            if step % cfg.eval_interval == 0:
                report(run)

            # set the learning rate of this step
            for group in run.optimizer.param_groups:
                group["lr"] = get_lr(step, cfg) * group["lr_scale"]

            # forward, backward, update
            started = time.perf_counter()
            loss, norm = optimizer_step(model, run, next_rows(run, n_rows[step]), step)
            step_seconds.append(time.perf_counter() - started)
            end_traced_step()
            count_step(run, loss, norm)
            # from now on, Ctrl-C saves first; until this step there was nothing to save
            if stop is None:
                stop = runtime.StopSignal(ranks.is_main)

            # set the temperature of the next step, which a checkpoint keeps
            set_tau(model, get_tau(progress.step, cfg))

            # log
            is_done = progress.step == cfg.max_steps
            if progress.step % cfg.log_interval == 0 or is_done:
                # the median leaves out the steps that compiled
                log_step(run, loss, norm, statistics.median(step_seconds))
                step_seconds.clear()

            # save, and stop if any rank was asked to; but not after a skipped update, because the one before
            # it may have damaged the weights
            is_sound = not progress.skipped_in_a_row
            is_stopping = is_sound and not is_done and ranks.sum(float(stop.requested))[0] > 0
            is_due = progress.step - progress.last_saved_step >= cfg.save_interval
            is_kept = cfg.keep_every is not None and progress.step % cfg.keep_every == 0
            if is_sound and (is_due or is_kept or is_done or is_stopping):
                save(run, f"ckpt_{progress.step}.pt" if is_kept else None)
            if is_stopping:
                print(f"stopped; {run.where_saved()}. Resume with: {runtime.resume_command()}")
                break
        if progress.step == cfg.max_steps:
            finish(run)
        ranks.wait(is_last=True)
    if progress.step < cfg.max_steps:
        raise SystemExit(130)  # as after Ctrl-C: what && or a script does next is not for an unfinished model


def finish(run: Run):
    """Evaluate the last step, and say how to sample. UserError if it was not saved, or its loss is not finite."""
    if run.progress.last_saved_step < run.progress.step:
        found = f"the run ended in non-finite updates; {run.where_saved()}"
        raise UserError(f"{found}; resume with a lower --lr")
    val = report(run)
    if not all(math.isfinite(x["loss"]) for x in val.values()):
        raise UserError("the held-out loss at the last step is not finite; start over with a lower --lr: --overwrite")
    command = shlex.join([*run.corpus.sample_command, run.cfg.out_dir])
    print(f"done; {run.where_saved()}. Sample from it: {command}")


# ---------------------------------------------------------------------------- starting and resuming


def set_up(cfg: TrainConfig, corpus_type: type[Corpus], ranks: Ranks) -> Run:
    """A new run, or the one to resume. Fills in cfg: init_from's shape, the mixture, eval_tokens."""
    # a micro-batch for each process
    if cfg.batch_size < cfg.micro_batch_size * ranks.world_size:
        found = f"each of {ranks.world_size} processes needs a micro-batch of its own"
        raise UserError(f"{found}; lower --micro_batch_size or raise --batch_size")
    # model and data; the model's shape comes first, because the corpus is checked against it
    checkpoint = find_checkpoint(cfg)
    model = None
    if cfg.init_from:
        from common.weights import inherit_shape, starting_model

        if checkpoint:
            inherit_shape(cfg, checkpoint["model_config"], cfg.out_dir)
        else:
            model = starting_model(cfg)
    make_embedded_corpus(Path(cfg.data_dir), ranks)
    corpus, val_corpus = open_corpora(cfg, corpus_type)
    if checkpoint:
        check_changes(checkpoint, cfg, corpus)
        model = runtime.build_model(cfg.model_config(), checkpoint["model"], cfg.out_dir)
    elif model is None:
        torch.manual_seed(cfg.seed)
        model = PolychromaticLM(cfg.model_config())
    if cfg.frozen:
        from common.weights import freeze

        freeze(model, cfg.frozen)
    model.to(ranks.device)
    model.activation_checkpointing = cfg.recompute
    # optimizer: the moments of the checkpoint; betas, weight decay and lr_scale of this run
    optimizer = configure_optimizer(model, cfg)
    progress = Progress()
    if checkpoint:
        if not cfg.eval_only:
            load_moments(optimizer, checkpoint["optimizer"], cfg.out_dir)
        progress = Progress(**checkpoint["progress"])
        what = "evaluating" if cfg.eval_only else "resumed"
        print(f"{what} {cfg.out_dir}/ckpt.pt at step {progress.step}")
    run = Run(cfg, ranks, model, optimizer, corpus, val_corpus, progress)
    if run.is_writer and cfg.wandb:
        from extras.wandb_log import open_wandb

        run.wandb = open_wandb(cfg.wandb, progress.run_id, cfg.out_dir, dataclasses.asdict(cfg))
    if cfg.warmup_steps >= cfg.max_steps and not cfg.eval_only:
        print(f"the warm-up of {cfg.warmup_steps:,} steps outlasts the run: the learning rate never falls")
    # all checks passed: delete what an old run left, or what followed the checkpoint
    ranks.wait()  # all have read the folder
    if run.is_writer:
        evaluates_again = progress.step % cfg.eval_interval == 0 or progress.step == cfg.max_steps
        runtime.rewind(run.folder, progress.step, evaluates_again, cfg.overwrite)
        runtime.write_json(run.folder / "settings.json", dataclasses.asdict(cfg))
    return run


def find_checkpoint(cfg: TrainConfig) -> dict | None:
    """The checkpoint to resume; None for a new run. Raises UserError if cfg allows neither."""
    path = Path(cfg.out_dir) / "ckpt.pt"
    if not (cfg.resume or cfg.eval_only):
        if path.exists() and not cfg.overwrite:
            raise UserError(f"{path} exists; --resume continues that run, --overwrite starts over")
        return None
    if not path.exists():
        if cfg.eval_only and not cfg.init_from:
            raise UserError(f"no checkpoint at {path}; name the run to evaluate, --out_dir=, or --init_from=")
        if cfg.resume:
            print(f"there is no checkpoint in {path.parent} yet: starting at step 0")
        return None
    try:
        checkpoint = runtime.load_checkpoint(path)
    except UserError as e:
        could_open = e.__cause__ is None
        hint = "; --overwrite starts over" if could_open and not cfg.eval_only else ""
        raise UserError(f"{e}{hint}") from None
    keys = {"model_config", "optimizer", "settings", "progress", "domains"}
    is_run = keys <= checkpoint.keys()
    # older checkpoints lack best_loss, and nothing else
    if not is_run or checkpoint["progress"].keys() | {"best_loss"} != vars(Progress()).keys():
        found = f"{path} holds weights alone, or was written by another version of this code"
        if cfg.eval_only:
            raise UserError(f"{found}; python eval.py {path} --data_dir={cfg.data_dir} evaluates weights alone")
        raise UserError(f"{found}: it cannot be resumed; --overwrite starts over")
    return checkpoint


def check_changes(checkpoint: dict, cfg: TrainConfig, corpus: Corpus):
    """Print what a resumed run changes. UserError if it changes the model or ends before the checkpoint."""
    what = "evaluating" if cfg.eval_only else "resuming"
    for name, theirs in checkpoint["settings"].items():
        ours = getattr(cfg, name, "(no such setting)")
        if ours == theirs or name in UNREPORTED:
            continue
        if name in checkpoint["model_config"] or name == "frozen":
            found = f"{cfg.out_dir} was trained with {name}={theirs!r}, not {ours!r}"
            raise UserError(f"{found}; --resume cannot change that")
        if not cfg.eval_only or name == "data_dir":
            print(f"{what} with {name}={ours!r}; it was {theirs!r}")
    if "init_from" in cfg.overridden and cfg.init_from != checkpoint["settings"].get("init_from"):
        print(f"{what} the model of {cfg.out_dir}; init_from={cfg.init_from!r} is ignored")
    if corpus.has_changed_since(checkpoint) and checkpoint["settings"]["data_dir"] == cfg.data_dir:
        print(f"{what} on other data: {cfg.data_dir} has changed since the checkpoint")
    step = checkpoint["progress"]["step"]
    if step > cfg.max_steps and not cfg.eval_only:
        raise UserError(f"{cfg.out_dir} is already at step {step}, beyond max_steps, {cfg.max_steps}")


def load_moments(optimizer: torch.optim.AdamW, saved: dict, out_dir: str):
    """Load the moments of a checkpoint's optimizer, not its settings. UserError if it trained other parameters."""
    ours = optimizer.state_dict()
    if [group["params"] for group in ours["param_groups"]] != [group["params"] for group in saved["param_groups"]]:
        found = f"{out_dir}/ckpt.pt was written by a version of this code that trained other parameters"
        raise UserError(f"{found}: it cannot be resumed; --overwrite starts over")
    # a copy: on Windows, save() cannot replace a file that is mapped to memory
    optimizer.load_state_dict({**ours, "state": copy.deepcopy(saved["state"])})


def make_embedded_corpus(folder: Path, ranks: Ranks):
    """Prepare a missing data/tiny or data/tiny_sft, which works offline. Other corpora are never prepared unasked."""
    is_embedded = folder.parent.name == "data" and folder.name in ("tiny", "tiny_sft")
    if ranks.is_main and is_embedded and not (folder / "meta.json").exists():
        print(f"there is no {folder} yet: preparing it, which takes about half a minute", flush=True)
        script = Path(__file__).with_name("prepare_data.py")
        elsewhere = [] if folder.parent == Path("data") else [f"--data_dir={folder.parent}"]
        command = [sys.executable, script, folder.name, *elsewhere]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(1)  # it has printed why
    ranks.wait()


def open_corpora(cfg: TrainConfig, corpus_type: type[Corpus] = Corpus) -> tuple[Corpus, Corpus]:
    """The training and validation splits, after checking that they fit cfg.

    Sets a missing mixture, and missing eval_tokens: a million of each domain, but altogether no more
    than the run trains on.
    """
    corpus = corpus_type(cfg.data_dir, cfg.block_size, "train", cfg.mixture or (), cfg.seed)
    cfg.mixture = cfg.mixture or corpus.shares
    if corpus_type is Corpus and any("val_targets" in counts for counts in corpus.domains.values()):
        raise UserError(f"{cfg.data_dir} holds conversations; train on it with sft.py")
    n_tokens = cfg.max_steps * cfg.batch_size * cfg.block_size
    cfg.eval_tokens = cfg.eval_tokens or max(1, min(2**20, n_tokens // len(cfg.mixture)))
    for mixture in (cfg.mixture, cfg.mixture_end or cfg.mixture):
        shares, names = mixture.values(), ", ".join(cfg.mixture)
        if mixture.keys() != cfg.mixture.keys() or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"the mixture {mixture} must give a share to each of {names}, and sum to 1")
    if corpus.tokenizer != cfg.tokenizer or corpus.vocab_size > cfg.vocab_size:
        theirs = f"{corpus.folder} has tokenizer {corpus.tokenizer!r} with {corpus.vocab_size:,} tokens"
        flags = f"--tokenizer={corpus.tokenizer} --vocab_size={corpus.vocab_size}"
        ours = f"the model {cfg.tokenizer!r} with {cfg.vocab_size:,}"
        raise UserError(f"{theirs}, {ours}; prepare other data, or train a new model with {flags}")
    return corpus, corpus_type(cfg.data_dir, cfg.block_size, "val", cfg.mixture, cfg.seed)


def compile_and_distribute(run: Run) -> torch.nn.Module:
    """The model as a step calls it: compiled if asked for and possible, shared by all GPUs."""
    cfg, ranks, model = run.cfg, run.ranks, run.model
    is_long = cfg.max_steps >= 1000 and not cfg.eval_only
    pays = {"cuda": True, "cpu": is_long}.get(ranks.device.type, False)
    wants_compile = pays if cfg.compile is None else cfg.compile
    compiled = wants_compile and runtime.compiler_works(ranks.device)
    what = f"{sum(p.numel() for p in model.parameters()):,} parameters, {'/'.join(cfg.activations)}"
    dtype = str(run.autocast.fast_dtype).removeprefix("torch.")
    where = f"{ranks.world_size} x {ranks.device.type} in {dtype}{', compiled' if compiled else ''}"
    print(f"{what}, on {where}; {cfg.batch_size * cfg.block_size:,} tokens a step", flush=True)
    if compiled:
        print("compiling, which takes about half a minute", flush=True)
        model.compile()
    if ranks.world_size == 1:
        return model
    torch._dynamo.config.optimize_ddp = False  # it would split each block into three graphs
    buffers = [name for name, _ in model.named_buffers()]  # tau, which every process sets
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


# --------------------------------------------------------------------------------------- evaluation


def val_batches(corpus: Corpus, domain: str, cfg: TrainConfig, ranks: Ranks) -> Iterator[tuple]:
    """This process's batches of eval_tokens held-out tokens: tokens, targets and doc_ids."""
    B = cfg.micro_batch_size
    chosen = corpus.spread_rows(domain, cfg.eval_tokens)
    for i in ranks.items(math.ceil(len(chosen) / B)):
        rows = np.stack([corpus.row(domain, index) for index in chosen[i * B : i * B + B]])
        # The last batch repeats rows, so that the shape stays and nothing recompiles.
        batch = np.resize(rows, (B, *rows.shape[1:]))
        batch[len(rows) :, 1] = -1  # the repeats have no targets
        yield to_inputs(batch, ranks.device)


@torch.no_grad()
def evaluate(model: PolychromaticLM, corpus: Corpus, cfg: TrainConfig, ranks, autocast) -> dict:
    """Held-out loss of each domain, in nats per token and bits per byte; on rank 0, routing measures.

    Leaves the model in training mode.
    """
    model.eval()
    val = {}
    for domain in corpus.domains:
        total, count = 0.0, 0
        for tokens, targets, doc_ids in val_batches(corpus, domain, cfg, ranks):
            n = (targets >= 0).sum().item()
            with autocast:
                total += model(tokens, targets, doc_ids).item() * n
            count += n
        total, count = ranks.sum(total, count)
        loss = total / count
        val[domain] = {"loss": loss, "bits_per_byte": corpus.bits_per_byte(domain, loss)}
    routing = {}
    if ranks.is_main:  # on the first of these rows: about 8,192 tokens, at least 6 rows
        rows = []
        n = math.ceil(max(6, 2**13 // cfg.block_size) / len(corpus.domains))  # of each domain
        for domain in corpus.domains:
            rows += [corpus.row(domain, i) for i in corpus.spread_rows(domain, cfg.eval_tokens)[:n]]
        tokens, targets, doc_ids = to_inputs(np.stack(rows), ranks.device)
        with autocast:
            routing = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets))
    model.train()
    return {"val": val, "routing": routing}


def report(run: Run) -> dict:
    """Evaluate: log and print the losses and the routing, print a sample, keep the best. Returns the losses."""
    step, cfg = run.progress.step, run.cfg
    measured = evaluate(run.model, run.val_corpus, cfg, run.ranks, run.autocast)
    log(run, {"step": step, "tau": get_tau(step, cfg), **measured})
    val, routing = measured["val"], measured["routing"]
    bits = "  ".join(f"{domain} {x['bits_per_byte']:.3f}" for domain, x in val.items())
    print(f"step {step}: val bits per byte: {bits}")
    if routing:
        entropy, agreement = (np.mean(routing[x]) for x in ("dynamic_entropy_share", "agreement"))
        print(f"step {step}: routing: dynamic entropy {entropy:.1%} of ln K, agreement {agreement:.1%}")
    if cfg.sample_tokens and run.ranks.is_main and all(math.isfinite(x["loss"]) for x in val.values()):
        from common.generate import print_sample

        with run.autocast:
            print_sample(f"step {step}: sample:", run.model, run.val_corpus, cfg.sample_tokens, cfg.seed)
    mean_bits = sum(x["bits_per_byte"] for x in val.values()) / len(val)
    is_sound = step > 0 and not run.progress.skipped_in_a_row
    if cfg.keep_best and not cfg.eval_only and is_sound and mean_bits < run.progress.best_loss:
        run.progress.best_loss = mean_bits
        save(run, "best.pt")
    return val


# ------------------------------------------------------------------------------- log and checkpoint


def log(run: Run, record: dict):
    """Append a record to log.jsonl and, if asked for, to Weights & Biases."""
    if run.is_writer:
        runtime.append_log(run.folder, record)
    if run.wandb:
        run.wandb.log(record)


def log_step(run: Run, loss: float, norm: float, seconds: float):
    """Log the step that has just been taken, and print it in one line."""
    cfg, device, step = run.cfg, run.ranks.device, run.progress.step
    rate = cfg.batch_size * cfg.block_size / seconds
    record = {
        "step": step, "loss": loss, "lr": get_lr(step - 1, cfg), "tau": get_tau(step - 1, cfg),
        "mixture": get_mixture(step - 1, cfg), "grad_norm": norm, "skipped": run.progress.skipped,
        "tokens_per_second": rate,
        "mfu": rate * runtime.flops_per_token(run.model) / run.ranks.world_size / runtime.peak_flops(device),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
    log(run, record)
    left = datetime.timedelta(seconds=round((cfg.max_steps - step) * seconds))
    # MFU counts full T x T attention, as is customary; document masks skip half of it or more.
    on_gpu = f"  MFU {record['mfu']:.1%} (full attention)" if math.isfinite(record["mfu"]) else ""
    on_gpu += f"  {record['memory_gib']:.1f} GiB" if record["memory_gib"] else ""
    line = f"step {step:>{len(str(cfg.max_steps))}}/{cfg.max_steps}  loss {loss:.3f}  lr {record['lr']:.1e}"
    line += f"  tau {record['tau']:.2f}  norm {norm:.2f}  {rate:,.0f} tokens/s{on_gpu}  {left} left"
    print(line, flush=True)


def save(run: Run, copy_name: str | None = None):
    """Write ckpt.pt, and if a name is given, a copy under that name: each whole or not at all."""
    run.progress.last_saved_step = run.progress.step
    state = {
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "model_config": dataclasses.asdict(run.model.config), "settings": dataclasses.asdict(run.cfg),
        "progress": dataclasses.asdict(run.progress), "domains": run.corpus.domains,
    }  # fmt: skip
    if run.ranks.is_main:
        hint = "; an earlier checkpoint, if there was one, is intact"
        # ckpt.pt last: its best_loss must be that of a best.pt which exists
        for name in filter(None, (copy_name, "ckpt.pt")):
            runtime.write_atomically(run.folder / name, functools.partial(torch.save, state), hint)


def main():
    train(settings.load(TrainConfig))


if __name__ == "__main__":
    settings.run(main)
