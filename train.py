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
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from common import run as machine
from common.data import Corpus, get_mixture
from common.generate import open_tokenizer, write_sample
from common.routing import routing_stats
from common.settings import check_range, load, run
from common.weights import build_model, freeze, starting_model
from model import ModelConfig, PolychromaticLM, set_tau

MAX_SKIPPED = 5  # consecutive non-finite updates after which a run gives up


@dataclass
class TrainConfig(ModelConfig):
    """Settings of a run and its model. The defaults are the paper's recipe: 19,531 steps of 128 x 4,096 tokens."""

    overridden: ClassVar[frozenset[str]] = frozenset()  # names that files and flags set; filled in by load()
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
        check_range(self, 1, 10**8, "max_steps", "eval_interval", "save_interval", "log_interval")
        check_range(self, 1, 2**20, "batch_size", "micro_batch_size")
        check_range(self, 1, 2**40, "eval_tokens")
        check_range(self, 0, 2**20, "sample_tokens")
        check_range(self, 0, 2**63 - 1, "seed", "warmup_steps")
        check_range(self, 0, 1, "anneal_start", "weight_decay")
        check_range(self, 0, 0.99999, "beta1", "beta2")
        check_range(self, 1e-12, 1e12, "lr", "grad_clip")
        check_range(self, 0, 1e12, "routing_lr", "alpha_lr")
        check_range(self, 1e-3, 1e3, "tau_start", "tau_end")
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
    checkpoint = machine.find_checkpoint(cfg)
    model = starting_model(cfg) if cfg.init_from and not checkpoint else None

    # data, which sets cfg.mixture if there is none; only now can cfg be compared with the checkpoint's settings
    corpus = corpus_type(cfg)
    if checkpoint:
        machine.print_changes(checkpoint, cfg, corpus.domains)

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
        with machine.name_write_errors(folder, "; choose another run folder with --out_dir="):
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(machine.locked(folder))

    # model, data, optimizer
    model, corpus, optimizer, saved, skipped, run_id = set_up(cfg, corpus_type, device)  # saved: step of ckpt.pt
    first_step, encoding = max(saved, 0), None
    if cfg.sample_tokens and is_main:
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
            with machine.name_write_errors(folder / "log.jsonl"), open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if wandb_run:
            wandb_run.log(record)

    machine.print_start(model, cfg, ranks, compiled)
    ranks.wait()  # all ranks have read the run folder; from here on it changes: --overwrite deletes the old run
    if is_main:
        machine.rewind(folder, saved)
        with machine.name_write_errors(folder / "settings.json"):
            machine.write_json(folder / "settings.json", dataclasses.asdict(cfg))

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
                with machine.name_write_errors(ckpt, "; an earlier checkpoint, if there was one, is intact"):
                    machine.write_atomically(ckpt, functools.partial(torch.save, state))
        where_saved = f"{ckpt} is at step {saved}"
        if stopping:
            print(f"stopped; {where_saved}. Go on with: {machine.resume_command()}")
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
    train(load(TrainConfig))


if __name__ == "__main__":
    run(main)
