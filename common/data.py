"""Tokens on disk, as prepare_data.py writes them, to batches."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.run import Ranks, how_to_make


class Corpus:
    """A corpus of prepare_data.py. A step's batch depends on (seed, step) alone, so there is no state to save."""

    sample_command = ("python", "sample.py")  # shows what a model trained on it writes

    def __init__(self, cfg):
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
        return how_to_make(self.cfg.data_dir, self.cfg.tokenizer, advice)

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

    def micro_batches(self, step: int, ranks: Ranks) -> Iterator[tuple[int, float, tuple]]:
        """This rank's micro-batches of a step: index in the step, share of the step's targets, to_inputs()."""
        batch = self.batch(step)
        parts = np.split(batch, self.cfg.batch_size // self.cfg.micro_batch_size)
        total = np.count_nonzero(batch[:, 1] >= 0)
        for i in ranks.share(len(parts)):
            yield i, np.count_nonzero(parts[i][:, 1] >= 0) / total, to_inputs(parts[i], ranks.device)

    def val_batches(self, domain: str, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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


class Conversations(Corpus):
    """A corpus of conversations, each packed whole into a row of block_size tokens.

    Each conversation is a document, so attention and the router's mean stay inside it. Padding is one more document,
    without targets. The seed fixes the packing; Corpus orders the rows.
    """

    sample_command = ("python", "sample.py", "--chat")

    def __init__(self, cfg):
        self.masks, self.ends, self.packed = {}, {}, {}
        super().__init__(cfg)

    def open_tokens(self, domain: str, split: str) -> np.ndarray:
        length, key, path = self.domains[domain][f"{split}_tokens"], (domain, split), self.folder / domain / split
        tokens = self.open_file(domain, f"{split}.bin", length, self.dtype)
        if not path.with_suffix(".mask").exists():
            raise ValueError(f"{self.folder} is no corpus of conversations; make one: python prepare_data.py tiny_sft")
        self.masks[key] = self.open_file(domain, f"{split}.mask", length, np.dtype(np.uint8))
        chunks = range(0, length, 2**24)
        ends = [start + np.flatnonzero(tokens[start : start + 2**24] == self.end_of_text) for start in chunks]
        self.ends[key] = np.concatenate([[-1], *ends])  # conversation i lies between ends i and i + 1
        lengths, room = np.diff(self.ends[key]) - 1, self.cfg.block_size  # <|endoftext|> is never an input
        if not len(lengths):
            raise ValueError(f"{path}.bin has no conversation; {self.how_to_make()}")
        if lengths.max() > room:
            raise ValueError(
                f"{self.folder} has a conversation of {lengths.max() + 1:,} tokens, too many for block_size {room:,}; "
                f"prepare it again with --max_length={room + 1}"
            )
        if not self.masks[key].any():
            raise ValueError(f"{path}.mask is damaged: it has no token to learn; {self.how_to_make()}")
        order = np.random.default_rng(self.cfg.seed).permutation(len(lengths))
        self.packed[key] = [order[row] for row in pack(lengths[order], room)]
        return tokens

    def n_rows(self, domain: str, split: str) -> int:
        return len(self.packed[domain, split])

    def prompt(self) -> list[int]:
        """The first held-out conversation, up to its first answer."""
        domain = next(iter(self.tokens))
        return self.tokens[domain]["val"][: self.masks[domain, "val"].argmax()].tolist()

    def row(self, domain: str, split: str, index: int) -> np.ndarray:
        """Tokens of whole conversations, their targets (-1: no loss) and document ids: [3, block_size] int64."""
        key, at = (domain, split), 0
        conversations = self.packed[key][index]
        row = np.empty((3, self.cfg.block_size), dtype=np.int64)
        row[:] = [[self.end_of_text], [-1], [len(conversations)]]  # padding
        for document, i in enumerate(conversations):
            start, end = self.ends[key][i] + 1, self.ends[key][i + 1]
            tokens = self.read(domain, split, start, end + 1)
            targets = np.where(self.masks[key][start + 1 : end + 1] == 1, tokens[1:], -1)
            row[:, at : at + end - start] = np.stack((tokens[:-1], targets, np.full_like(targets, document)))
            at += end - start
        return row


def pack(lengths: np.ndarray, room: int, open_rows: int = 64) -> list[list[int]]:
    """Pack pieces into rows of `room`, with little space left over: the indices of each row's pieces.

    Each piece goes to the open row where it fits most tightly. If it fits in none, a new row replaces the fullest.
    """
    rows: list[list[int]] = [[] for _ in range(open_rows)]
    open_now, free = np.arange(open_rows), np.full(open_rows, room)
    for i, length in enumerate(lengths):
        left = np.where(free >= length, free - length, room + 1)
        slot = left.argmin()
        if left[slot] > room:
            slot = free.argmin()
            open_now[slot], free[slot] = len(rows), room
            rows.append([])
        rows[open_now[slot]].append(i)
        free[slot] -= length
    return [row for row in rows if row]


def get_mixture(step: int, cfg) -> dict[str, float]:
    """Shares of the domains in a step: mixture, moving linearly to mixture_end after anneal_start of the run."""
    start = cfg.anneal_start * cfg.max_steps
    moved = min(1.0, max(0.0, (step - start) / max(1.0, cfg.max_steps - 1 - start)))
    end = cfg.mixture_end or cfg.mixture
    return {domain: share + moved * (end[domain] - share) for domain, share in cfg.mixture.items()}


def quotas(cfg) -> np.ndarray:
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
