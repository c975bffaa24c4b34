"""Text from a trained model, streamed as it is made.

python sample.py                                            from the newest checkpoint under out/
python sample.py --prompt="Problem: What is 12 + 34?"       continue a text; --prompt=@file reads it from a file
python sample.py --chat                                     talk to a model of sft.py
python sample.py --chat --prompt="What is 12 + 34?"         ask it one thing
"""

import codecs
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

import config
from model import PolychromaticLM
from prepare_data import encode, encode_chat, get_tokenizer, stop_tokens
from train import compiler_works, pick_device, pick_dtype


@dataclass
class SampleConfig:
    """Settings of sampling."""

    out_dir: str | None = None  # run folder or checkpoint; None: the newest checkpoint under out/
    init_from: str | None = None  # or any other model: the paper's weights, a Qwen3, a name on the hub
    revision: str | None = None  # of a model on the hub
    router_context: str | None = None  # what the router reads, prefix, token or sequence; None: as it was trained
    prompt: str = ""  # text to continue, or @file (@@ for an @ itself); empty: start a new document
    chat: bool = False  # a conversation: prompt is the one question, or without it you are asked
    system: str = ""  # chat: what the model is told first
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
    compile: bool = False  # compile what makes a token: takes half a minute first, worth it for long texts

    def __post_init__(self):
        config.check_range(self, 1, 10**9, "num_samples", "max_new_tokens")
        config.check_range(self, 0, 1e6, "temperature")
        config.check_range(self, 0, 2**63 - 1, "seed")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")
        if self.chat and self.num_samples > 1:
            raise ValueError("chat and num_samples exclude each other: a chat has one answer")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")


def newest_checkpoint(root: Path = Path("out")) -> Path:
    """The checkpoint under root that was written last."""
    found = sorted(root.glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"no checkpoint under {root}; train one (python train.py config/tiny.py) or name it with --init_from="
        )
    return found[-1]


def load_model(
    source: str | None, device: torch.device, revision: str | None = None, router_context: str | None = None
) -> PolychromaticLM:
    """What from_pretrained() loads (None: the newest checkpoint), for evaluation; ends the script if there is none."""
    path = source or newest_checkpoint()
    try:
        from extras.weights import from_pretrained

        model = from_pretrained(path, revision, router_context)
    except (OSError, ValueError) as e:
        raise ValueError(str(e)) from None
    print(f"model: {path}", file=sys.stderr)
    if model.config.sees_future:
        print(
            "slow: its router averages the whole sequence, so every token is computed again from the start; "
            "--router_context=prefix reads the past alone, with a cache",
            file=sys.stderr,
        )
    return model.to(device).eval()


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls of that name; "auto": train.py's on CUDA, float32 elsewhere."""
    return pick_dtype("float32" if name == "auto" and device.type != "cuda" else name, device)


def read_prompt(text: str) -> str:
    """The prompt itself, or for @file what the file holds; @@ stands for an @ at the start."""
    if text.startswith("@@") or not text.startswith("@"):
        return text.removeprefix("@")
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read the prompt from {text[1:]!r}: {e}") from None


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
    model: PolychromaticLM, encoding: tiktoken.Encoding, ids: list[int], cfg: SampleConfig, generator: torch.Generator,
    max_new_tokens: int,
) -> Iterator[str]:  # fmt: skip
    """Continue token ids up to <|endoftext|>, in a chat <|im_end|>; yields text as soon as its bytes are whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ends = stop_tokens(encoding) if cfg.chat else {encoding.eot_token}
    dtype = inference_dtype(cfg.dtype, model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for step in model.generate([ids], max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, ends, generator):
            if step.item() not in ends:
                yield decoder.decode(encoding.decode_single_token_bytes(step.item()))
    yield decoder.decode(b"", final=True)


def continue_text(model: PolychromaticLM, encoding: tiktoken.Encoding, cfg: SampleConfig, generator: torch.Generator):
    """Print num_samples continuations of the prompt."""
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
    for i in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f"--- sample {i + 1} of {cfg.num_samples} ---")
        print(prompt, end="", flush=True)
        for piece in until(stream(model, encoding, ids, cfg, generator, cfg.max_new_tokens), cfg.stop):
            print(piece, end="", flush=True)
        print()


class Chat:
    """A conversation with the model: its history, and answers to it, printed as they are made."""

    def __init__(
        self, model: PolychromaticLM, encoding: tiktoken.Encoding, cfg: SampleConfig, generator: torch.Generator
    ):
        self.model, self.encoding, self.cfg, self.generator = model, encoding, cfg, generator
        self.reset()

    def reset(self):
        self.messages = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []

    def fit(self) -> list[int]:
        """Tokens of the conversation, its oldest turns dropped until a quarter of the context is left for the answer.

        Raises ValueError, and forgets it, if the newest message alone is too long.
        """
        room, first = self.model.config.block_size * 3 // 4, 1 if self.cfg.system else 0

        def tokens(messages: list[dict[str, str]]) -> list[int]:
            return encode_chat(self.encoding, messages, reply=True)[0].tolist()

        if (n := len(tokens(self.messages[:first] + self.messages[-1:]))) > room:
            self.messages.pop()
            told = " with --system" if first else ""
            raise ValueError(f"this takes {n:,} tokens{told} of {room:,} that there is room for; say it shorter")
        while len(tokens(self.messages)) > room:
            del self.messages[first : first + 2]
            print("(the context is full: the oldest turn is forgotten)", file=sys.stderr)
        return tokens(self.messages)

    def answer(self, question: str):
        """Print the answer to what the user says next, and remember both. Ctrl-C ends the answer where it is."""
        self.messages.append({"role": "user", "content": question})
        ids, said = self.fit(), ""
        length = min(self.cfg.max_new_tokens, self.model.config.block_size - len(ids))
        try:
            for piece in until(stream(self.model, self.encoding, ids, self.cfg, self.generator, length), self.cfg.stop):
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=sys.stderr)
        print(flush=True)
        self.messages.append({"role": "assistant", "content": said})


def converse(chat: Chat):
    """Answer lines of the terminal until Ctrl-D or /exit; /reset forgets the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print("/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
            continue
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
            print("(forgotten)", file=sys.stderr)
        elif line.startswith("/"):
            print(f"(there is no {line.split()[0]}, but /reset and /exit)", file=sys.stderr)
        elif line:
            try:
                chat.answer(line)
            except ValueError as e:
                print(f"({e})", file=sys.stderr)


def main():
    cfg = config.load(SampleConfig)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ? instead
    device = pick_device(cfg.device)
    model = load_model(cfg.init_from or cfg.out_dir, device, cfg.revision, cfg.router_context)
    with contextlib.redirect_stdout(sys.stderr):
        if cfg.compile and compiler_works(device):
            for block in model.blocks:
                block.compile()
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    try:
        if not cfg.chat:
            continue_text(model, encoding, cfg, generator)
        elif cfg.prompt:
            Chat(model, encoding, cfg, generator).answer(read_prompt(cfg.prompt))
        else:
            converse(Chat(model, encoding, cfg, generator))
    except KeyboardInterrupt:
        print()
    except ValueError as e:
        raise ValueError(str(e)) from None


if __name__ == "__main__":
    config.run(main)
