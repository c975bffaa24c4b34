"""Supervised fine-tuning: teach a pretrained model to answer.

python sft.py config/tiny_sft.py     minutes on two CPU cores; first prepare_data.py tiny_sft, train.py config/tiny.py
python sft.py config/sft.py          the paper's second stage; first prepare_data.py sft, train.py config/pretrain.py

This is train.py's loop, with its settings, checkpoints, --resume and torchrun. Two things differ: whole conversations
are packed into rows, and the loss is on the assistant's words only. Without an override file the settings are the
paper's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config.runs import read_log
from train import Corpus, TrainConfig, train


@dataclass
class SFTConfig(TrainConfig):
    """Settings of a run. The defaults are the paper's fine-tuning: 13,067 steps of 14 x 4,096 tokens.

    The model's settings are those of init_from.
    """

    data_dir: str = "data/sft"  # a corpus of conversations, from prepare_data.py
    max_steps: int = 13_067  # optimizer steps; the schedules span them
    batch_size: int = 14  # rows of block_size tokens in a step: about the paper's 32 conversations, 57 thousand tokens
    micro_batch_size: int = 7  # rows in one forward pass; divides batch_size; the data stay the same
    lr: float = 2e-5  # peak learning rate
    warmup_steps: int = 100  # linear warm-up, then cosine decay to 0
    tau_start: float = 0.1  # routing temperature; stays where pretraining left it
    tau_end: float = 0.1  # routing temperature after the last step
    out_dir: str = "out/sft"  # the run folder
    init_from: str = "out/pretrain"  # model to start from: a run folder, a checkpoint, a Qwen3, ...

    def __post_init__(self):
        super().__post_init__()
        if not self.init_from:
            raise ValueError("init_from is empty; name the model to start from, a run folder or a checkpoint")


class Conversations(Corpus):
    """A corpus of conversations, each packed whole into a row of block_size tokens.

    Each conversation is a document, so attention and the router's mean stay inside it. Padding is one more document,
    without targets. The seed fixes the packing; Corpus orders the rows.
    """

    sample_command = ("python", "sample.py", "--chat")

    def __init__(self, cfg: SFTConfig):
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


def print_routing(folder: Path):
    """The five routing measures, averaged over the layers, at the run's first and last evaluation."""
    measured = [(line["step"], line["routing"]) for line in read_log(folder) if line.get("routing")]
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
    print_routing(Path(cfg.out_dir))


if __name__ == "__main__":
    config.run(main)
