"""Supervised fine-tuning: teach a pretrained model to answer.

python sft.py config/tiny_sft.py     minutes on two CPU cores; after prepare_data.py tiny_sft, train.py config/tiny.py
python sft.py config/sft.py          the paper's second stage; after prepare_data.py sft, train.py config/pretrain.py

It is train.py's loop, with its settings, checkpoints, --resume and torchrun. What differs is the data, conversations
packed whole into rows, and the loss, on the assistant's words alone. Without an override file the settings are the
paper's.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import config
from train import Corpus, TrainConfig, read_log, train


@dataclass
class SFTConfig(TrainConfig):
    """Settings of a run. The defaults are the paper's fine-tuning; the model's shape is that of init_from."""

    data_dir: str = "data/sft"  # a corpus of conversations, of prepare_data.py
    out_dir: str = "out/sft"  # the run folder
    init_from: str = "out/pretrain"  # run folder or checkpoint whose model to start from
    max_steps: int = 13_067  # optimizer steps; the schedules span them
    batch_size: int = 14  # rows of block_size tokens in a step: 14 x 4,096 hold the paper's 57 thousand tokens
    micro_batch_size: int = 7  # rows in one forward pass; divides batch_size; the data stay the same
    lr: float = 2e-5  # peak learning rate
    warmup_steps: int = 100  # linear warm-up, then a cosine to 0
    tau_start: float = 0.1  # routing temperature, frozen where pretraining left it
    tau_end: float = 0.1  # the same
    mixture: dict[str, float] = field(default_factory={"chat": 1.0}.copy)  # conversations alone
    mixture_end: dict[str, float] | None = None  # at the last step; None: unchanged

    def __post_init__(self):
        super().__post_init__()
        if not self.init_from:
            raise ValueError("init_from is empty; name the model to start from, a run folder or a checkpoint")


class Conversations(Corpus):
    """A corpus of conversations, packed whole into rows of block_size tokens.

    Each is a document of its row, so attention and the router's mean stay inside it. The rest of a row is one more
    document, of padding, with no targets. The packing is fixed by the seed; the order of the rows is Corpus's.
    """

    def __init__(self, cfg: SFTConfig):
        self.masks, self.ends, self.packed = {}, {}, {}
        super().__init__(cfg)

    def open_tokens(self, domain: str, split: str, again: str) -> np.ndarray:
        length, key = self.domains[domain][f"{split}_tokens"], (domain, split)
        tokens = self.open_file(domain, f"{split}.bin", length, self.dtype, again)
        if not (self.folder / domain / f"{split}.mask").exists():
            raise ValueError(f"{self.folder} is no corpus of conversations; make one: python prepare_data.py tiny_sft")
        self.masks[key] = self.open_file(domain, f"{split}.mask", length, np.dtype(np.uint8), again)
        pieces = range(0, length, 2**24)
        ends = [start + np.flatnonzero(tokens[start : start + 2**24] == self.end_of_text) for start in pieces]
        self.ends[key] = np.concatenate([[-1], *ends])  # of conversation i - 1 at i
        lengths = np.diff(self.ends[key]) - 1  # <|endoftext|> predicts nothing and is not read
        if not len(lengths):
            raise ValueError(f"{self.folder / domain / split}.bin has no conversation; make it again: {again}")
        if lengths.max() > self.cfg.block_size:
            raise ValueError(
                f"{self.folder} has a conversation of {lengths.max() + 1:,} tokens, too many for block_size "
                f"{self.cfg.block_size:,}; prepare it again with --max_length={self.cfg.block_size + 1}"
            )
        if not self.masks[key].any():
            raise ValueError(
                f"{self.folder / domain / split}.mask is damaged: it takes no loss; make it again: {again}"
            )
        order = np.random.default_rng(self.cfg.seed).permutation(len(lengths))
        self.packed[key] = [order[row] for row in pack(lengths[order], self.cfg.block_size)]
        return tokens

    def n_rows(self, domain: str, split: str) -> int:
        return len(self.packed[domain, split])

    def row(self, domain: str, split: str, index: int) -> np.ndarray:
        """Tokens of whole conversations, their targets (-1 where no loss is taken), document ids: [3, T] int64."""
        key, at = (domain, split), 0
        conversations = self.packed[key][index]
        row = np.empty((3, self.cfg.block_size), dtype=np.int64)
        row[:] = [[self.end_of_text], [-1], [len(conversations)]]  # padding, but for what is written over it
        for document, i in enumerate(conversations):
            start, end = self.ends[key][i] + 1, self.ends[key][i + 1]
            tokens = self.tokens[domain][split][start : end + 1].astype(np.int64)
            if tokens.max() >= self.cfg.vocab_size:
                raise ValueError(f"{self.folder / domain / split}.bin is damaged: it has a token {tokens.max()}")
            targets = np.where(self.masks[key][start + 1 : end + 1] == 1, tokens[1:], -1)
            row[:, at : at + end - start] = np.stack((tokens[:-1], targets, np.full_like(targets, document)))
            at += end - start
        return row


def pack(lengths: np.ndarray, room: int, open_rows: int = 64) -> list[list[int]]:
    """Which of the pieces go into each row, so that they fit and little stays empty.

    Each piece in turn goes where it fits most tightly among the open rows; where it fits nowhere, a new row takes the
    place of the fullest.
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


def print_routing(out_dir: str):
    """The five measures of the routing, means over the layers, at the run's first evaluation and its last."""
    measured = [(line["step"], line["routing"]) for line in read_log(Path(out_dir)) if line.get("routing")]
    if len(measured) < 2:
        return  # a plain GLU, or a run that was stopped early
    print("routing, means over the layers:")
    for step, routing in (measured[0], measured[-1]):
        usage = "/".join(f"{share:.3f}" for share in np.mean(routing["usage"], axis=0))
        print(
            f"  step {step}: static entropy {np.mean(routing['static_entropy']):.4f} nats, "
            f"dynamic entropy {np.mean(routing['dynamic_entropy']):.4f} nats, usage {usage}, "
            f"input dependence {np.mean(routing['input_dependence']):.4f} nats, "
            f"agreement {np.mean(routing['agreement']):.1%}"
        )


def main():
    cfg = config.load(SFTConfig)
    train(cfg, Conversations)
    print_routing(cfg.out_dir)


if __name__ == "__main__":
    config.run(main)
