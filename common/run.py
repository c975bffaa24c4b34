"""The machine that a script runs on (processes, signals, device, compiler), and run folders (lock, checkpoint, log)."""

import contextlib
import ctypes
import json
import math
import os
import shlex
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock  # comes with torch
import torch
from torch import Tensor

from common.settings import UserError
from model import ModelConfig, PolychromaticLM

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, from the vendor's data sheets


class Ranks:
    """The processes of a run: one, or as many as torchrun started; and this one's rank and device."""

    def __init__(self, device: str):
        """Join the other processes; only rank 0 prints from here on. Raises UserError if the device cannot be used."""
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")

    def items(self, n: int) -> range:
        """Which of n pieces of work are this rank's: rank, rank + world_size, ..."""
        return range(self.rank, n, self.world_size)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value, summed over the ranks."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self, is_last: bool = False):
        """Wait for the other ranks; the last time, part from them."""
        if self.world_size > 1:
            torch.distributed.barrier()
        if self.world_size > 1 and is_last:
            torch.distributed.destroy_process_group()


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
        raise UserError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, training: bool = True) -> torch.dtype:
    """The dtype of the matmuls; "auto": bfloat16 on CUDA, and in training on a CPU, if it is faster; else float32."""
    if name not in ("auto", "bfloat16", "float32"):
        raise UserError(f"dtype is {name!r}; it must be auto, bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.bfloat16 if device.type == "cpu" and has_amx and training else torch.float32


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


def flops_per_token(model: PolychromaticLM, length: int | None = None) -> float:
    """Operations of a training token in rows of `length` (block_size) tokens (arXiv 2204.02311, appendix B)."""
    c = model.config
    attention = 12 * c.n_layer * c.n_head * c.head_dim * (length or c.block_size)
    lookup = 0 if c.tied_head else model.embedding.weight.numel()  # an untied embedding multiplies nothing
    return 6 * (sum(p.numel() for p in model.parameters()) - lookup) + attention


# ---------------------------------------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make this folder, and keep other processes from writing to it. UserError if one already does."""
    with name_write_errors(folder, "; choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another process is writing to {folder}; wait for it, or choose another folder") from None
    with lock:
        yield


@contextlib.contextmanager
def name_write_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turn a write error, such as a full disk, into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}{hint}") from None


def write_atomically(path: Path, write: Callable[[BinaryIO], object], hint: str = ""):
    """Replace `path` by what write(file) writes, or leave it as it was: write beside it, flush to disk, rename."""
    partial = path.with_suffix(".partial")
    with name_write_errors(path, hint):
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError):
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: dict, hint: str = ""):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()), hint)


def load_checkpoint(source: str | Path) -> dict:
    """Read a torch checkpoint, or the one in a run folder: tensors on the CPU and plain values, never code."""
    path = Path(source) / "ckpt.pt" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if damaged := archive.testzip():
                raise ValueError(f"bad checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged zip, a truncated tensor and refused code each raise their own type
        raise UserError(f"{path} is damaged or not a checkpoint ({' '.join(str(e).split())[:120]})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of a model")
    return checkpoint


def build_model(config: ModelConfig, state: dict[str, Tensor], path: str | Path) -> PolychromaticLM:
    """A float32 model with these weights. Raises UserError, naming `path`, for tensors that do not fit."""
    with torch.device("meta"):  # no storage and no random numbers: the weights follow
        model = PolychromaticLM(config)
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    if "tau" in copies:  # one temperature for all layers: older checkpoints, the release, Qwen3
        tau = copies.pop("tau")
        copies |= {name: tau.clone() for name in model.state_dict() if name.endswith(".tau")}
    try:
        model.load_state_dict(copies, assign=True)
    except RuntimeError as e:  # a missing or unexpected tensor, or another shape
        raise UserError(f"{path} does not fit the model: {' '.join(str(e).split()[6:])[:300]}") from None
    return model


def append_log(folder: Path, record: dict):
    """Append a record to a run's log.jsonl, NaN and Infinity as null."""
    record = json.loads(json.dumps(record), parse_constant=lambda name: None)
    with name_write_errors(folder / "log.jsonl"), open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.jsonl, without lines that a kill cut short."""
    path, records = folder / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def rewind(folder: Path, step: int):
    """Remove from a run folder what lies after this step: lines of the log; for a new run (0), all of an old one."""
    with name_write_errors(folder):
        # The checkpoint first: a kill here must not leave it beside a new log.
        for name in ("ckpt.pt", "eval.json", "layers.png", "usage.png", "training.png") if step == 0 else ():
            (folder / name).unlink(missing_ok=True)
    # Evaluations of this step run again.
    kept = [r for r in read_log(folder) if r["step"] < step or (r["step"] == step and "loss" in r)]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(folder / "log.jsonl", lambda file: file.write(text.encode()))


def resume_command() -> str:
    """The command line of this run, with --resume."""
    args = [arg for arg in sys.argv if arg.split("=")[0] not in ("--resume", "--overwrite")]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = ["python"] if processes == "1" else ["torchrun", f"--nproc_per_node={processes}"]
    return shlex.join([*start, *args, "--resume"])
