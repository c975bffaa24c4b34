"""Supervised fine-tuning: teach a pretrained model to answer.

python sft.py config/tiny_sft.py     minutes on two CPU cores; first train.py config/tiny.py
python sft.py config/sft.py          the paper's second stage; first prepare_data.py sft, train.py config/pretrain.py

This is train.py's loop, with its settings, checkpoints, --resume and torchrun. Two things differ: whole conversations
are packed into rows, and the loss is on the assistant's words only.
"""

from dataclasses import dataclass
from pathlib import Path

# before torch: it sets environment variables that torch reads, and makes Ctrl-C during the imports one line
from common.settings import load, run  # isort: skip

import numpy as np

from common.data import Conversations
from common.run import read_log
from train import TrainConfig, train


@dataclass
class SFTConfig(TrainConfig):
    """The defaults are the paper's: 13,067 steps of 14 x 4,096 tokens. The model's settings are those of init_from."""

    data_dir: str = "data/sft"  # a corpus of conversations, from prepare_data.py
    max_steps: int = 13_067  # optimizer steps; the schedules span them
    batch_size: int = 14  # rows of block_size tokens in a step: about the paper's 32 conversations, 57 thousand tokens
    micro_batch_size: int = 7  # rows in a forward pass; divides batch_size; does not change the data
    lr: float = 2e-5  # peak learning rate
    warmup_steps: int = 100  # linear warm-up, then cosine decay to min_lr
    tau_start: float = 0.1  # routing temperature; stays where pretraining left it
    tau_end: float = 0.1  # routing temperature after the last step
    out_dir: str = "out/sft"  # the run folder
    init_from: str = "out/pretrain"  # model to start from: a run folder, a checkpoint, a Qwen3 model, ...


def print_routing(folder: Path):
    """Print the five routing measures, averaged over the layers, at the run's first and last evaluation."""
    measured = [(line["step"], line["routing"]) for line in read_log(folder) if line.get("routing")]
    if len(measured) < 2:
        return  # a plain GLU, or a run that was stopped before its second evaluation
    print("routing at the first and the last evaluation, means over the layers (docs/routing.md):")
    for step, routing in (measured[0], measured[-1]):
        usage = "/".join(f"{share:.3f}" for share in np.mean(routing["usage"], axis=0))
        print(
            f"  step {step}: static entropy {np.mean(routing['static_entropy']):.4f} nats, "
            f"dynamic entropy {np.mean(routing['dynamic_entropy']):.4f} nats, usage {usage}, "
            f"input dependence {np.mean(routing['input_dependence']):.4f} nats, "
            f"agreement {np.mean(routing['agreement']):.1%}"
        )


def main():
    cfg = load(SFTConfig)
    train(cfg, Conversations)
    print_routing(Path(cfg.out_dir))


if __name__ == "__main__":
    run(main)
