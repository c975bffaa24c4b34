"""The machine that a script runs on (processes, signals, device, compiler), and run folders (lock, checkpoint, log)."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock  # comes with torch
import torch
from torch import Tensor

from common.settings import UserError, convert, reason
from model import REQUIRED, ModelConfig, PolychromaticLM

PEAK_FLOPS = {  # dense bf16 with float32 sums, from the vendor's data sheets; regular expressions for the GPU's name
    "A100": 312e12, "H100 PCIe": 756e12, "H100 80GB HBM3": 989e12, "H200$": 989e12, "RTX 4090$": 165e12,
    "RTX 3090$": 71e12,
}  # fmt: skip


class Ranks:
    """The processes of a run: one, or as many as torchrun started; and this one's rank and device."""

    def __init__(self, device: str):
        """Join the other processes; only rank 0 prints from here on. Raises UserError if the device cannot be used."""
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.world_size > 1 else 0
        self.is_main = self.rank == 0
        if self.world_size > 1 and not {"LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
            raise UserError("WORLD_SIZE is set without torchrun's other variables; start with torchrun, or unset it")
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device)
        if self.world_size > 1:
            backend, device_id = ("nccl", self.device) if self.device.type == "cuda" else ("gloo", None)
            torch.distributed.init_process_group(backend, device_id=device_id)
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")

    def items(self, n: int) -> range:
        """Which of n pieces of work are this rank's: rank, rank + world_size, ..."""
        return range(self.rank, n, self.world_size)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value, summed over the ranks in float32."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def wait(self, is_last: bool = False):
        """Wait for the other ranks; the last time, leave the process group as well."""
        if self.world_size > 1:
            torch.distributed.barrier()
        if self.world_size > 1 and is_last:
            torch.distributed.destroy_process_group()


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP ask the loop to stop after its step; a second one stops at once."""

    def __init__(self, is_main: bool = True):
        self.is_main = is_main  # prints
        self.requested = False
        self.time = 0.0  # of the first signal
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN):  # as nohup does
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.requested:
            if time.monotonic() > self.time + 1:  # sooner, it is torchrun repeating the terminal's Ctrl-C
                raise KeyboardInterrupt
            return
        self.requested, self.time = True, time.monotonic()
        message = b"stopping after this step; a second signal (Ctrl-C) stops at once\n" if self.is_main else b""
        # print() is not reentrant. Writing nothing tells whether stdout is still there.
        for descriptor, text in ((1, b""), (2, message)):
            try:
                os.write(descriptor, text)
            except OSError:  # the terminal was closed: go on without it
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto": cuda, else mps, else cpu.

    A named GPU becomes the current one. On CUDA this turns on TF32, for the products that autocast leaves in float32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    device = torch.device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        if device.index is not None:
            torch.cuda.set_device(device)  # CUDA graphs are captured on the current GPU
    return device


def pick_autocast(name: str, device: torch.device, training: bool = True) -> torch.autocast:
    """Autocast to a dtype; "auto": bfloat16 on CUDA and, in training, on a CPU with AMX; otherwise float32."""
    if name not in ("auto", "bfloat16", "float32"):
        raise UserError(f"dtype is {name!r}; it must be auto, bfloat16 or float32")
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    elif name == "auto":
        has_amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        name = "bfloat16" if device.type == "cpu" and has_amx and training else "float32"
    return torch.autocast(device.type, getattr(torch, name), enabled=name == "bfloat16")


def prepare_cpu():
    """Process settings that make a CPU faster."""
    torch.set_flush_denormal(True)  # at low tau, routing weights can be as small as 1e-40, which is slow


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works here; prints why if not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
        return True
    except Exception as e:  # no C++ compiler, no Python headers, no Triton: each raises its own type
        fault = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        print(f"continuing uncompiled, which is slower: torch.compile does not work here ({fault.strip()[:150]})")
        return False


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a GPU, dense bf16; NaN if unknown."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(name, card)), math.nan)


def flops_per_token(model: PolychromaticLM) -> float:
    """Operations per training token, in rows of block_size tokens (arXiv 2204.02311, appendix B)."""
    c = model.config
    attention = 12 * c.n_layer * c.n_head * c.head_dim * c.block_size
    lookup = 0 if c.tied_head else model.embedding.weight.numel()  # an untied embedding is only a lookup
    return 6 * (sum(p.numel() for p in model.parameters()) - lookup) + attention


@contextlib.contextmanager
def tracing(path: Path) -> Iterator[Callable[[], None]]:
    """Trace the sixth to eighth step into this file. Yields what to call after every step."""

    def write(profiler):
        with name_write_errors(path):
            profiler.export_chrome_trace(str(path))
        print(f"trace: {path}; open it in ui.perfetto.dev")

    schedule = torch.profiler.schedule(wait=4, warmup=1, active=3, repeat=1)  # the first steps compile
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
    if profiler.step_num <= 4:
        print("no trace: it starts with the sixth step")


# ---------------------------------------------------------------------------------------------------------- run folders


def locked(folder: Path, name: str = ".lock") -> contextlib.AbstractContextManager:
    """Make this folder and take its lock `name`, until the end of a with block. UserError if another process has it."""
    with name_write_errors(folder, "; choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    with name_write_errors(folder / name):
        try:
            return filelock.FileLock(folder / name, timeout=0).acquire()
        except filelock.Timeout:
            found = f"another process is writing to {folder}"
            raise UserError(f"{found}; wait for it, or choose another folder") from None


@contextlib.contextmanager
def name_write_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turn a write error, such as a full disk, into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError, during an OSError
        cause = e if isinstance(e, OSError) else e.__context__
        fault = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"cannot write {path}: {fault}{hint}") from None


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
        except BaseException:  # a second Ctrl-C too
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: dict, hint: str = ""):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()), hint)


def read_json(path: Path) -> dict:
    """The dict in a JSON file. Raises UserError if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or reason(e)}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object")
    return value


def load_checkpoint(source: str | Path, verify: bool = True) -> dict:
    """Read a torch checkpoint, or the one in a run folder: tensors on the CPU and plain values, never code.

    A "model_config" in it is checked, and completed with this version's defaults. verify=False leaves the weights
    unread. Raises UserError for a missing, damaged or unreadable file; only the last sets its __cause__.
    """
    path = Path(source) / "ckpt.pt" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if damaged := verify and archive.testzip():
                raise ValueError(f"bad checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, UnicodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    except Exception as e:  # a damaged zip, a truncated tensor and refused code each raise their own type
        raise UserError(f"{path} is damaged or not a checkpoint ({reason(e)})") from None
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is not a checkpoint of a model")
    if wrong := [x for x in ("settings", "progress", "domains") if not isinstance(checkpoint.get(x, {}), dict)]:
        raise UserError(f"{path} is not a checkpoint of this project: its {wrong[0]} are not a dict")
    if "model_config" in checkpoint:
        checkpoint["model_config"] = dataclasses.asdict(read_config(checkpoint["model_config"], path))
    return checkpoint


def read_config(settings, path: str | Path) -> ModelConfig:
    """A model's settings as saved with it. Raises UserError, naming `path`, for what this version does not know."""
    kinds = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    try:
        if missing := [name for name in REQUIRED if name not in settings]:
            raise ValueError(f"it lacks the setting {missing[0]}")
        if unknown := [name for name in settings if name not in kinds]:
            raise ValueError(f"this version does not know its setting {unknown[0]}")
        return ModelConfig(**{name: convert(value, (kinds[name],), name) for name, value in settings.items()})
    except (AttributeError, TypeError, ValueError) as e:  # TypeError, AttributeError: it is no dict
        raise UserError(f"{path} does not hold a model of this project: {e}") from None


def build_model(config: ModelConfig, state: dict[str, Tensor], path: str | Path) -> PolychromaticLM:
    """A float32 model with these weights. UserError, naming `path`, for tensors that do not fit or have bad values."""
    n_blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if n_blocks != config.n_layer:
        raise UserError(f"{path} does not fit the model: it has {n_blocks} blocks, but n_layer is {config.n_layer}")
    with torch.device("meta"):  # no storage and no random numbers: the weights follow
        model = PolychromaticLM(config)
    try:
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
        broken = [name for name, tensor in copies.items() if not tensor.isfinite().all()]
    except RuntimeError as e:  # tensors without data, sparse or quantized
        raise UserError(f"{path} does not fit the model: {reason(e)}") from None
    if broken:
        raise UserError(f"{path} is damaged: {broken[0]} holds NaN or infinity; use an earlier checkpoint")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path} does not fit the model: {name} is {tensor.dtype}; weights must be floating-point")
        if name.endswith("tau") and not (copies[name] > 0).all():
            raise UserError(f"{path} is damaged: {name} is {tensor.tolist()}; it must be above 0")
    if "tau" in copies:  # one temperature for all layers: older checkpoints, the release, Qwen3
        tau = copies.pop("tau")
        copies |= {name: tau.clone() for name in model.state_dict() if name.endswith(".tau")}
    try:
        model.load_state_dict(copies, assign=True)
    except RuntimeError as e:  # a missing or unexpected tensor, or another shape
        fault = " ".join(str(e).split()[6:])[:300]  # without "Error(s) in loading state_dict for PolychromaticLM:"
        raise UserError(f"{path} does not fit the model: {fault}") from None
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
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def rewind(folder: Path, step: int, evaluates_again: bool, overwrite: bool):
    """Make a run's log end at this step. To overwrite, remove the old run's checkpoints, plots and evaluations as well.

    evaluates_again: the evaluation at this step will be repeated, so its record goes. A new run in a folder without a
    checkpoint keeps the records it finds: they move to log.old.jsonl.
    """
    records = read_log(folder)
    with name_write_errors(folder):
        if overwrite:
            # The checkpoint first: a kill here must not leave it beside a new log.
            names = ["ckpt.pt", "best.pt", "trace.json", "layers.png", "usage.png", "training.png"]
            for path in [*(folder / name for name in names), *folder.glob("ckpt_*.pt"), *folder.glob("eval*.json")]:
                path.unlink(missing_ok=True)
        elif step == 0 and records:
            with open(folder / "log.old.jsonl", "a") as old:
                old.writelines(json.dumps(record) + "\n" for record in records)
    if evaluates_again:  # an evaluation's record has no "loss"
        records = [record for record in records if "loss" in record or record["step"] < step]
    text = "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step)
    write_atomically(folder / "log.jsonl", lambda file: file.write(text.encode()))


def resume_command() -> str:
    """The command line of this run, with --resume."""
    command = re.sub(r" --(resume|overwrite)([ =](true|false))?(?= |$)", "", shlex.join(sys.argv), flags=re.IGNORECASE)
    processes, machines = (os.environ.get(f"{name}_WORLD_SIZE", "1") for name in ("LOCAL", "GROUP"))
    if processes == machines == "1":
        return f"python {command} --resume"
    from torch.distributed.run import get_args_parser

    torchrun = f"torchrun --nproc_per_node={processes}"
    # Without the timeout, torchrun kills the processes 30 seconds after a stop signal. An older one does not have it.
    if "--shutdown_timeout" in get_args_parser().format_help():
        torchrun += " --shutdown_timeout=600"
    if machines != "1":
        torchrun += f" --nnodes={machines} --rdzv_backend=c10d --rdzv_endpoint={os.environ['MASTER_ADDR']}:29500"
    return f"{torchrun} {command} --resume"
