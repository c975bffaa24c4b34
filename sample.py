"""Text from a trained model, streamed as it is made.

python sample.py                                            from the newest checkpoint under out/
python sample.py --prompt="Problem: What is 12 + 34?"       continue a text; --prompt=@file reads it from a file
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

import config
from model import PolychromaticLM
from prepare_data import encode, get_tokenizer
from train import pick_device, pick_dtype


@dataclass
class SampleConfig:
    """Settings of sampling."""

    out_dir: str | None = None  # run folder or checkpoint; None: the newest checkpoint under out/
    prompt: str = ""  # text to continue, or @file (@@ for an @ itself); empty: start a new document
    num_samples: int = 1  # how many continuations to write
    max_new_tokens: int = 500  # length of each, at most, in tokens
    temperature: float = 0.8  # 0 takes the likeliest token; higher is wilder
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together have this probability
    seed: int = 1337  # of the draws
    stop: str | None = None  # end a continuation before this text; <|endoftext|> ends it always
    vocab: str | None = None  # vocab.json of a qwen3 model's tokenizer; None: from the hub, kept in its cache
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32

    def __post_init__(self):
        config.check_range(self, 1, 10**9, "num_samples", "max_new_tokens")
        config.check_range(self, 0, 1e6, "temperature")
        config.check_range(self, 0, 2**63 - 1, "seed")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")


def newest_checkpoint(root: Path = Path("out")) -> Path:
    """The checkpoint under root that was written last."""
    found = sorted(root.glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        config.fail(
            f"no checkpoint under {root}; train one (python train.py config/tiny.py) or name it with --out_dir="
        )
    return found[-1]


def load_model(source: str | None, device: torch.device) -> PolychromaticLM:
    """The model in a run folder or checkpoint (None: the newest), for evaluation; ends the script if there is none."""
    path = Path(source) if source else newest_checkpoint()
    try:
        model = PolychromaticLM.from_pretrained(path)
    except (OSError, ValueError) as e:
        config.fail(str(e))
    print(f"model: {path}", file=sys.stderr)
    return model.to(device).eval()


def read_prompt(text: str) -> str:
    """The prompt itself, or for @file what the file holds; @@ stands for an @ at the start."""
    if text.startswith("@@") or not text.startswith("@"):
        return text.removeprefix("@")
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        config.fail(f"cannot read the prompt from {text[1:]!r}: {e}")


def until(pieces: Iterator[str], stop: str | None) -> Iterator[str]:
    """The pieces of a text up to where `stop` first occurs in it; what could be its beginning is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        keep = next((n for n in range(min(len(stop or ""), len(held)), 0, -1) if stop.startswith(held[-n:])), 0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def stream(
    model: PolychromaticLM, encoding: tiktoken.Encoding, ids: list[int], cfg: SampleConfig, generator: torch.Generator
) -> Iterator[str]:
    """Continue token ids; yields text as soon as its bytes are whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    steps = model.generate(
        [ids], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, {encoding.eot_token}, generator
    )
    for step in steps:
        if step.item() != encoding.eot_token:
            yield decoder.decode(encoding.decode_single_token_bytes(step.item()))
    yield decoder.decode(b"", final=True)


def main():
    cfg = config.load(SampleConfig)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ? instead
    device = pick_device(cfg.device)
    model = load_model(cfg.out_dir, device)
    try:
        encoding = get_tokenizer(model.config.tokenizer, cfg.vocab)
    except ValueError as e:
        config.fail(str(e))
    prompt = read_prompt(cfg.prompt)
    ids = encode(encoding, prompt).tolist()
    if not ids:
        print("empty prompt: starting a new document", file=sys.stderr)
        ids = [encoding.eot_token]
    if len(ids) > (block_size := model.config.block_size):
        print(
            f"the prompt has {len(ids):,} tokens, the context {block_size:,}: reading the last {block_size // 2:,}",
            file=sys.stderr,
        )
    dtype = pick_dtype("float32" if cfg.dtype == "auto" and device.type != "cuda" else cfg.dtype, device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    try:
        for i in range(cfg.num_samples):
            if cfg.num_samples > 1:
                print(f"--- sample {i + 1} of {cfg.num_samples} ---")
            print(prompt, end="", flush=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                for piece in until(stream(model, encoding, ids, cfg, generator), cfg.stop):
                    print(piece, end="", flush=True)
            print()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    config.run(main)
