"""Run folders: the checkpoint, what a resumed run may change, and the log."""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import zipfile
from pathlib import Path

import torch

from config import name_write_errors, write_atomically


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
