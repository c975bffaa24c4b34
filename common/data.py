"""Read the tokens that prepare_data.py wrote as rows of a batch.

A corpus is a folder: meta.json, and <domain>/{train,val}.bin of token ids with <|endoftext|> after every document.
Conversations also have {train,val}.mask: one byte per token, 1 if it counts in the loss.
"""

import json
import math
import shlex
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.settings import UserError

CORPUS_NAMES = ("text", "tiny", "tiny_sft", "pretrain", "sft")  # that prepare_data.py makes

# entries of meta.json and their types, and those of each of its domains
META = {"tokenizer": str, "vocab_size": int, "end_of_text": int, "dtype": str, "domains": dict, "vocab": str | None}
COUNTS = {"train_tokens": int, "val_tokens": int, "val_bytes": int, "val_targets": int, "share": int | float}


class Corpus:
    """One split, "train" or "val", of the domains (none: all) of a corpus, in rows of block_size tokens.

    The seed orders the rows. Raises UserError if the corpus is missing, damaged, or too small for a row.
    """

    sample_command = ("python", "sample.py")  # shows what a model trained on it writes

    def __init__(
        self, folder: str | Path, block_size: int, split: str = "train", domains: Collection[str] = (), seed=0
    ):
        self.folder, self.block_size, self.split, self.seed = Path(folder), block_size, split, seed
        meta = read_meta(self.folder)
        if unknown := [domain for domain in domains if domain not in meta["domains"]]:
            raise UserError(f"{folder} has no domain {unknown[0]!r}; there are {', '.join(meta['domains'])}")
        self.tokenizer: str = meta["tokenizer"]
        self.vocab: str | None = meta["vocab"]  # the tokenizer's file
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_text: int = meta["end_of_text"]
        self.dtype = np.dtype(meta["dtype"])
        self.domains: dict[str, dict] = {d: meta["domains"][d] for d in domains or meta["domains"]}  # counts
        self.orders: dict[str, tuple[int, np.ndarray]] = {}  # by domain: the epoch and the order of its rows
        self.tokens = {domain: self.open_domain(domain) for domain in self.domains}

    @property
    def shares(self) -> dict[str, float]:
        """Each domain's share of a step: as written in meta.json, else by size."""
        has_shares = all("share" in counts for counts in self.domains.values())
        weights = {d: counts["share" if has_shares else "train_tokens"] for d, counts in self.domains.items()}
        return {domain: weight / sum(weights.values()) for domain, weight in weights.items()}

    def open_domain(self, domain: str) -> np.ndarray:
        """The token ids of a domain, memory-mapped."""
        tokens = self.open_file(domain, f"{self.split}.bin", self.dtype)
        if len(tokens) <= self.block_size:
            path = self.folder / domain / f"{self.split}.bin"
            raise UserError(f"{path} has {len(tokens):,} tokens, fewer than block_size {self.block_size} + 1")
        return tokens

    def open_file(self, domain: str, name: str, dtype: np.dtype) -> np.ndarray:
        path = self.folder / domain / name
        expected = self.domains[domain][f"{self.split}_tokens"] * dtype.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise damaged(path, f"holds {size:,} bytes, not the {expected:,} of meta.json", self.folder)
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)

    def read(self, domain: str, start: int, end: int) -> np.ndarray:
        """Tokens [start:end] of a domain, int64."""
        tokens = self.tokens[domain][start:end].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            path = self.folder / domain / f"{self.split}.bin"
            raise damaged(path, f"is damaged: it has the token id {tokens.max()}", self.folder)
        return tokens

    def has_changed_since(self, checkpoint: dict) -> bool:
        """Whether meta.json describes a domain differently from this checkpoint."""
        before = checkpoint.get("domains", {})
        return any(before.get(domain, counts) != counts for domain, counts in self.domains.items())

    def n_rows(self, domain: str) -> int:
        return (len(self.tokens[domain]) - 1) // self.block_size

    def row(self, domain: str, index: int) -> np.ndarray:
        """Tokens, their targets (the next tokens; -1: no loss) and document ids: [3, block_size] int64."""
        window = self.read(domain, index * self.block_size, (index + 1) * self.block_size + 1)
        ends = window[:-1] == self.end_of_text  # <|endoftext|> is the last token of its document
        return np.stack((window[:-1], window[1:], ends.cumsum() - ends))

    def nth_row(self, domain: str, n: int) -> int:
        """Index of the n-th row that training visits: each row once an epoch, in a new random order each time."""
        epoch, place = divmod(n, self.n_rows(domain))
        if domain not in self.orders or self.orders[domain][0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, *domain.encode()])
            self.orders[domain] = epoch, rng.permutation(self.n_rows(domain))
        return self.orders[domain][1][place]

    def spread_rows(self, domain: str, max_tokens: int) -> np.ndarray:
        """Indices of rows of at most max_tokens tokens (one row at least), evenly spread over the split."""
        total = self.n_rows(domain)
        return np.linspace(0, total - 1, min(total, max(1, max_tokens // self.block_size))).astype(np.int64)

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


class Conversations(Corpus):
    """A corpus of conversations, each whole in a row of block_size tokens; the seed fixes the packing too.

    Each conversation is a document. The padding of a row is one more document, without targets.
    """

    sample_command = ("python", "sample.py", "--chat")

    def __init__(self, *arguments, **keywords):
        self.masks, self.ends, self.packed = {}, {}, {}  # by domain; open_domain() fills them
        super().__init__(*arguments, **keywords)

    def open_domain(self, domain: str) -> np.ndarray:
        """The token ids of a domain. Also opens its mask, finds its conversations and packs them into rows."""
        path = self.folder / domain / f"{self.split}.mask"
        tokens = self.open_file(domain, f"{self.split}.bin", self.dtype)
        if not path.exists():
            raise UserError(f"{self.folder} has no conversations; to make some: python prepare_data.py tiny_sft")
        mask = self.masks[domain] = self.open_file(domain, path.name, np.dtype(np.uint8))
        ends = np.flatnonzero(tokens == self.end_of_text)
        ends = self.ends[domain] = np.append(-1, ends)  # conversation i lies between ends i and i + 1
        lengths = np.diff(ends) - 1  # <|endoftext|> is never an input
        if not len(lengths) or not mask.any():
            raise damaged(path, "is damaged: it has no conversation with a token to learn", self.folder)
        if lengths.max() > self.block_size:
            raise UserError(
                f"{self.folder} has a conversation of {lengths.max() + 1:,} tokens, too many for block_size "
                f"{self.block_size:,}; prepare it again with --max_length={self.block_size + 1}"
            )
        order = np.random.default_rng(self.seed).permutation(len(lengths))
        self.packed[domain] = [order[row] for row in pack(lengths[order], self.block_size)]
        return tokens

    def n_rows(self, domain: str) -> int:
        return len(self.packed[domain])

    def row(self, domain: str, index: int) -> np.ndarray:
        """Tokens of whole conversations, their targets (-1: no loss) and document ids: [3, block_size] int64."""
        conversations = self.packed[domain][index]
        ends = self.ends[domain]
        at = 0
        row = np.empty((3, self.block_size), dtype=np.int64)
        row[:] = [[self.end_of_text], [-1], [len(conversations)]]  # padding
        for document, i in enumerate(conversations):
            start, end = ends[i] + 1, ends[i + 1]
            tokens = self.read(domain, start, end + 1)
            targets = np.where(self.masks[domain][start + 1 : end + 1] == 1, tokens[1:], -1)
            row[:, at : at + end - start] = np.stack((tokens[:-1], targets, np.full_like(targets, document)))
            at += end - start
        return row

    def prompt(self) -> list[int]:
        """The first conversation, up to its first answer."""
        domain = next(iter(self.tokens))
        return self.tokens[domain][: self.masks[domain].argmax()].tolist()


def pack(lengths: np.ndarray, room: int, open_rows: int = 64) -> list[list[int]]:
    """Pack pieces of these lengths into rows of `room` tokens (best-fit bin packing): the indices of each row's pieces.

    Each piece goes to the open row where it fits most tightly. If it fits in none, a new row replaces the fullest.
    """
    rows: list[list[int]] = [[] for _ in range(open_rows)]
    row_of_slot, free = np.arange(open_rows), np.full(open_rows, room)
    for i, length in enumerate(lengths):
        left = np.where(free >= length, free - length, room + 1)
        slot = left.argmin()
        if left[slot] > room:
            slot = free.argmin()
            row_of_slot[slot], free[slot] = len(rows), room
            rows.append([])
        rows[row_of_slot[slot]].append(i)
        free[slot] -= length
    return [row for row in rows if row]


def to_inputs(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, 3, block_size] -> tokens, targets and doc_ids, each [B, block_size] int64, on the device."""
    inputs = torch.from_numpy(rows.transpose(1, 0, 2).copy())
    inputs = inputs.pin_memory() if device.type == "cuda" else inputs  # pinned memory is copied while the GPU computes
    return inputs.to(device, non_blocking=True).unbind()


def read_meta(folder: Path) -> dict:
    """The contents of a corpus's meta.json. Raises UserError if there is none, or if it is damaged."""
    try:
        meta = {"vocab": None, **json.loads((folder / "meta.json").read_text(encoding="utf-8"))}
        check_types(meta, META)
        if meta["dtype"] not in ("uint16", "uint32") or meta["end_of_text"] >= meta["vocab_size"]:
            raise ValueError("dtype or end_of_text is wrong")
        for counts in meta["domains"].values():
            check_types({"share": 0, "val_targets": 0, **counts}, COUNTS)  # these two are optional
        if not any(counts["train_tokens"] and counts.get("share", 1) for counts in meta["domains"].values()):
            raise ValueError("no domain has tokens")
        return meta
    except OSError:
        raise UserError(f"no data in {folder}; {how_to_make(folder)}") from None
    except (ValueError, TypeError, RecursionError) as e:  # TypeError: a list or a number in place of a dict
        raise damaged(folder / "meta.json", f"is damaged ({e})", folder) from None


def check_types(entries: dict, types: dict):
    """Raise ValueError, naming the entry, if one is missing, has another type or is a negative number."""
    for name, kind in types.items():
        value = entries.get(name)
        is_number = isinstance(value, (int, float))
        if not isinstance(value, kind) or isinstance(value, bool) or (is_number and not 0 <= value < math.inf):
            raise ValueError(f"{name} is {value!r:.60}")


def detect_corpus_type(folder: str | Path) -> type[Corpus]:
    """Conversations or Corpus, by what prepare_data.py wrote there."""
    counts = read_meta(Path(folder))["domains"].values()
    return Conversations if any("val_targets" in domain for domain in counts) else Corpus


def damaged(path: Path, fault: str, folder: Path) -> UserError:
    return UserError(f"{path} {fault}; {how_to_make(folder)}")


def how_to_make(folder: Path) -> str:
    """What to do about a missing or damaged corpus: the command that makes it, or the corpus that was meant."""
    if corpora := sorted(folder.glob("*/meta.json")):
        return f"did you mean --data_dir={shlex.quote(str(corpora[0].parent))}?"
    if folder.name not in CORPUS_NAMES:
        return f"prepare_data.py makes {', '.join(CORPUS_NAMES)}"
    source = " --source=input.txt" if folder.name == "text" else ""
    parent = "" if folder.parent == Path("data") else f" --data_dir={shlex.quote(str(folder.parent))}"
    return f"make it: python prepare_data.py {folder.name}{source}{parent}"
