"""What a trained model can do, in numbers.

python eval.py --problems                         held-out arithmetic, asked of the newest checkpoint under out/
python eval.py --problems --init_from=out/tiny    of another model
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

import config
from model import PolychromaticLM
from prepare_data import FAMILIES, encode_chat, open_tokenizer, problems
from sample import load_model
from train import pick_device, pick_dtype


@dataclass
class EvalConfig:
    """Settings of an evaluation."""

    init_from: str | None = None  # run folder or checkpoint; None: the newest checkpoint under out/
    problems: bool = False  # ask the generated problems that are held out of all training data
    limit: int = 40  # problems of each family
    batch_size: int = 64  # prompts answered at once
    seed: int = 1  # of the generated problems
    vocab: str | None = None  # vocab.json of a qwen3 model's tokenizer; None: from the hub, kept in its cache
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32

    def __post_init__(self):
        config.check_range(self, 1, 1000, "limit")  # a family has few more that are held out
        config.check_range(self, 1, 2**20, "batch_size")
        config.check_range(self, 0, 2**63 - 1, "seed")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")


def answers(model: PolychromaticLM, encoding, questions: list[str], batch_size: int) -> Iterator[str]:
    """The model's answer to each question, greedily, many at once, until <|im_end|> or the end of its context."""
    eot, end = (encoding.encode_single_token(name) for name in ("<|endoftext|>", "<|im_end|>"))
    for i in range(0, len(questions), batch_size):
        batch = questions[i : i + batch_size]
        prompts = [encode_chat(encoding, [{"role": "user", "content": q}], reply=True)[0].tolist() for q in batch]
        room = max(1, model.config.block_size - max(map(len, prompts)))
        steps = list(model.generate(prompts, room, temperature=0, stop={eot, end}))
        for row in torch.stack(steps, 1).tolist():
            yield encoding.decode_bytes([t for t in row if t not in (-1, eot, end)]).decode(errors="replace")


def is_right(said: str, answer: str) -> bool:
    """Whether the last line of what was said is the answer, to the letter."""
    return said.rstrip().rpartition("\n")[2] == f"Answer: {answer}"


def standard_error(share: float, n: int) -> float:
    """Of a share of n independent trials."""
    return math.sqrt(share * (1 - share) / n)


def solve_problems(model: PolychromaticLM, encoding, cfg: EvalConfig) -> dict[str, dict[str, float]]:
    """Exact match per family: {family: {"n", "exact_match", "standard_error"}}, "all" last."""
    asked = list(itertools.islice(problems(cfg.seed, reserved=True), cfg.limit * len(FAMILIES)))
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    two_digit = []
    said = answers(model, encoding, [question for _, question, _, _ in asked], cfg.batch_size)
    for (family, question, _, answer), text in zip(asked, tqdm(said, desc="problems", total=len(asked))):
        right[family].append(is_right(text, answer))
        if family == "addition" and sum(len(word) > 1 and word.isdigit() for word in question.strip("?").split()) == 2:
            two_digit.append(right[family][-1])
    groups = {**right, "addition, both of two digits": two_digit, "all": list(itertools.chain(*right.values()))}
    results = {}
    for name, outcomes in groups.items():
        share = sum(outcomes) / max(1, len(outcomes))
        error = standard_error(share, max(1, len(outcomes)))
        results[name] = {"n": len(outcomes), "exact_match": share, "standard_error": error}
    return results


def main():
    cfg = config.load(EvalConfig)
    if not cfg.problems:
        config.fail("nothing to measure; name it: --problems")
    device = pick_device(cfg.device)
    model = load_model(cfg.init_from, device)
    encoding = open_tokenizer(model.config.tokenizer, cfg.vocab)
    dtype = pick_dtype("float32" if cfg.dtype == "auto" and device.type != "cuda" else cfg.dtype, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        results = solve_problems(model, encoding, cfg)
    print(f"{'held-out problems':<30}{'n':>5}{'exact match':>14}{'standard error':>17}")
    for name, r in results.items():
        print(f"{name:<30}{r['n']:>5}{r['exact_match']:>13.1%} {r['standard_error']:>16.1%}")


if __name__ == "__main__":
    config.run(main)
