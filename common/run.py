"""The machine that a script runs on (processes, signals, device, compiler), and run folders (lock, checkpoint, log)."""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, from the vendor's data sheets


class Ranks:
    """The processes of a run: one, or as many as torchrun started; and this one's rank and device."""

    def __init__(self, device: str):
        """Join the other processes; only rank 0 prints from here on. Raises ValueError if the device cannot be used."""
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def share(self, n: int) -> range:
        """Which of n pieces of work are this rank's: rank, rank + world_size, ..."""
        return range(self.rank, n, self.world_size)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value, summed over the ranks."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self):
        """Wait for the other ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


class StopSignal:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested = True
        os.write(2, b"finishing the step, then saving; once more stops at once\n")  # print() is not reentrant
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto": cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls; "auto": bfloat16 where the hardware multiplies it faster, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.bfloat16 if device.type == "cpu" and has_amx else torch.float32


def prepare_cpu():
    """Process settings that make a CPU faster."""
    torch.set_flush_denormal(True)  # at low tau, routing weights are denormal (1e-40), which would halve the speed
    # glibc returns freed tensors to the system, and the next tensors fault the pages in again, one by one: 11 of 163 ms
    # in a step of the benchmark's feed-forward layer. With these settings it keeps up to 512 MiB.
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: free memory to keep at the end of the heap
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: size from which a block is mapped by itself


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works here; prints why if not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
        return True
    except Exception as e:  # no C++ compiler, no Python headers, no Triton: each raises its own type
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        print(f"going on uncompiled, slower: torch.compile does not work here ({reason.strip()[:150]})")
        return False


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a GPU, dense bf16; NaN if unknown."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), math.nan)


def flops_per_token(model: torch.nn.Module, length: int | None = None) -> float:
    """Floating-point operations of a training token, forward and backward, in rows of `length` (block_size) tokens.

    6 per parameter, except an untied embedding, which is only looked up, and 12 n_layer n_head head_dim T for
    attention over the full T x T, although causal and document masks skip part of it (arXiv 2204.02311, app. B).
    """
    c = model.config
    attention = 12 * c.n_layer * c.n_head * c.head_dim * (length or c.block_size)
    lookup = 0 if c.tied_head else model.embedding.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - lookup) + attention


def estimate_memory(model: torch.nn.Module, cfg) -> int:
    """Bytes of GPU memory that a compiled run needs: an estimate, as in docs/performance.md."""
    c, tokens = model.config, cfg.micro_batch_size * model.config.block_size
    size = pick_dtype(cfg.dtype, model.device).itemsize  # of what a matmul reads
    # Kept for the backward pass, per token and block: the residual stream twice, both norms, the heads before and after
    # QK-norm and RoPE, attention's output, and gate, up and their product.
    heads = (3 * c.n_head + 4 * c.n_kv_head) * c.head_dim
    block = 2 * 4 * c.n_embd + size * (2 * c.n_embd + heads + 3 * c.d_ff)
    kept = tokens * (4 * c.n_embd * c.n_layer + block if cfg.recompute else block * c.n_layer)
    head = (4 + size) * (min(2**28, tokens * c.vocab_size) + c.n_embd * c.vocab_size)  # a chunk of logits, the gradient
    # A trained parameter takes 16 bytes: itself, its gradient and AdamW's two moments.
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) + kept + head


def print_start(model: torch.nn.Module, cfg, ranks: Ranks, compiled: bool):
    """Print the model and the machine; on a GPU also its memory and an estimate of what the run needs."""
    size, device, dtype = sum(p.numel() for p in model.parameters()), ranks.device, pick_dtype(cfg.dtype, ranks.device)
    machine = f"{ranks.world_size} x {device.type} in {str(dtype)[6:]}{', compiled' if compiled else ''}"
    tokens_per_step = cfg.batch_size * cfg.block_size
    print(
        f"{size:,} parameters, {'/'.join(cfg.activations)}, on {machine}; {tokens_per_step:,} tokens a step", flush=True
    )
    if device.type == "cuda":
        card, needed = torch.cuda.get_device_properties(device), estimate_memory(model, cfg) / 2**30
        more = "" if compiled else " when compiled; uncompiled it needs more and may not fit"
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB; the run needs an estimated {needed:.0f} GiB{more}")
    if compiled:
        print("compiling, about half a minute", flush=True)


# ---------------------------------------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to this folder. Raises ValueError if one already does."""
    with open(folder / ".lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"another process is writing to {folder}; wait for it, or choose another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield


def write_atomically(path: Path, write: Callable[[typing.BinaryIO], object]):
    """Replace `path` by what write(file) writes, or leave it as it was: write beside it, flush to disk, rename."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError):
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def name_write_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turn a write error, such as a full disk, into a ValueError that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise ValueError(f"cannot write {path}: {reason}{hint}") from None


def write_json(path: Path, value: dict):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def load_checkpoint(source: str | Path) -> dict:
    """Read a torch checkpoint, or the one in a run folder: tensors on the CPU and plain values, never code."""
    path = Path(source) / "ckpt.pt" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if damaged := archive.testzip():
                raise ValueError(f"bad checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged zip, a truncated tensor and refused code each raise their own type
        raise ValueError(f"{path} is damaged or not a checkpoint ({' '.join(str(e).split())[:120]})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of a model")
    return checkpoint


def find_checkpoint(cfg) -> dict | None:
    """The checkpoint to resume; None for a run that starts at step 0. Raises ValueError if cfg allows neither.

    With init_from, cfg takes over the shape of the checkpoint, as it took over that of init_from.
    """
    path = Path(cfg.out_dir) / "ckpt.pt"
    if not cfg.resume and not cfg.overwrite and path.exists():
        raise ValueError(f"{path} exists; --resume continues that run, --overwrite starts over in its place")
    if not cfg.resume:
        return None
    if not path.exists():
        print(f"nothing to resume in {path.parent} yet: starting at step 0")
        return None
    checkpoint = load_checkpoint(path)
    if not {"model_config", "optimizer", "settings", "step", "skipped", "run_id"} <= checkpoint.keys():
        raise ValueError(f"{path} holds weights alone and cannot be resumed; start over with --overwrite")
    if cfg.init_from:
        inherit_shape(cfg, checkpoint["model_config"], path)
    for name, ours in dataclasses.asdict(cfg).items():
        theirs = checkpoint["settings"].get(name, ours)
        if ours != theirs and (name in checkpoint["model_config"] or name == "frozen"):
            raise ValueError(f"{path} was trained with {name}={theirs!r}, not {ours!r}; --resume cannot change that")
    if checkpoint["step"] > cfg.max_steps:
        raise ValueError(f"{path} is already at step {checkpoint['step']}, beyond max_steps, {cfg.max_steps}")
    return checkpoint


def print_changes(checkpoint: dict, cfg, domains: dict):
    """Print what a resumed run changes: settings, and the data (the domains of meta.json)."""
    for name, theirs in checkpoint["settings"].items():
        ours = getattr(cfg, name, theirs)
        if ours != theirs and name not in ("resume", "overwrite", "init_from", "revision"):
            print(f"resuming with {name}={ours!r}; it was {theirs!r}")
    if checkpoint.get("domains", domains) != domains:
        print(f"resuming on other data: {cfg.data_dir} has changed since the checkpoint")


def inherit_shape(cfg, shape: dict, source: str | Path):
    """Copy the starting model's shape into cfg. Raises ValueError for an override that contradicts its weights."""
    free = {"block_size", "gumbel", "router_context", "router_centred", "tokenizer"}  # no weight depends on these
    if len(shape["activations"]) == 1 and set(shape["activations"]) <= set(cfg.activations):
        free |= {"activations", "router_hidden"}  # upcycling
    for name, theirs in shape.items():
        ours = getattr(cfg, name)
        if name not in cfg.overridden:
            setattr(cfg, name, theirs)
        elif ours != theirs and name not in free:
            raise ValueError(f"{source} has {name}={theirs!r}, not {ours!r}")


def newest_checkpoint(root: Path = Path("out")) -> Path:
    """The most recently written checkpoint under root."""
    paths = list(root.glob("**/ckpt.pt"))
    if not paths:
        raise ValueError(
            f"no checkpoint under {root}; train one (python train.py config/tiny.py) or name it with --init_from="
        )
    return max(paths, key=lambda path: path.stat().st_mtime)


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.jsonl, without lines that a kill cut short."""
    path, records = folder / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def how_to_make(data_dir: str, tokenizer: str, advice: str) -> str:
    """What to do about a missing or damaged corpus: name the one in this folder, or run the command that makes it."""
    folder = Path(data_dir)
    if corpora := sorted(folder.glob("*/meta.json")):
        return f"did you mean --data_dir={shlex.quote(str(corpora[0].parent))}?"
    try:
        from prepare_data import CORPORA
    except ImportError as e:  # training needs fewer packages than preparing data
        return f"prepare_data.py makes it, and needs a package: pip install {e.name}"
    if folder.name not in CORPORA:
        return f"prepare_data.py makes {', '.join(CORPORA)}"
    source = " --source=input.txt" if folder.name == "text" else ""
    default = getattr(CORPORA[folder.name], "tokenizer", tokenizer)  # tiny and tiny_sft have no such setting
    source += f" --tokenizer={tokenizer}" if tokenizer != default else ""
    root = "" if folder.parent == Path("data") else f" --data_dir={shlex.quote(str(folder.parent))}"
    return f"{advice}: python prepare_data.py {folder.name}{source}{root}"


def rewind(folder: Path, step: int):
    """Remove from a run folder what lies after this step: lines of the log; for a new run (-1), all of an old one."""
    with name_write_errors(folder / "log.jsonl"):
        if step < 0:
            # The checkpoint first: a kill here must not leave it beside a new log.
            for name in ("ckpt.pt", "eval.json", "layers.png", "usage.png", "training.png"):
                (folder / name).unlink(missing_ok=True)
        records = read_log(folder) if step >= 0 else []
        kept = [r for r in records if r["step"] < step or (r["step"] == step and "loss" in r)]  # evaluations run again
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(folder / "log.jsonl", lambda file: file.write(text.encode()))


def resume_command() -> str:
    """The command line of this run, with --resume."""
    args = [arg for arg in sys.argv if arg.split("=")[0] not in ("--resume", "--overwrite")]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = ["python"] if processes == "1" else ["torchrun", f"--nproc_per_node={processes}"]
    return shlex.join([*start, *args, "--resume"])
