"""Generate text from a trained model, streamed to the terminal.

python sample.py                                           the newest model under out/ starts a new document
python sample.py out/tiny                                  another model
python sample.py --prompt="Problem: What is 12 + 34?"      continue a text; --prompt=@file reads it from a file
python sample.py --chat                                    chat with a model fine-tuned by sft.py
python sample.py --chat --prompt="What is 12 + 34?"        ask it one question
"""

import codecs
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from common.generate import generate
from common.run import compiler_works, newest_checkpoint, pick_device, pick_dtype
from common.settings import check_range, load, run
from common.tokenizer import encode, encode_chat, get_tokenizer, stop_tokens
from common.weights import from_pretrained
from model import PolychromaticLM


@dataclass
class SampleConfig:
    """Settings of sampling."""

    # model
    init_from: str | None = None  # run folder, checkpoint or any other model that loads; None: the newest under out/
    out_dir: str | None = None  # synonym of init_from, so that a run's own flag names it here too
    revision: str | None = None  # commit of a model on the hub
    router_context: str | None = None  # what the router reads: prefix, token or sequence; None: as trained
    # prompt
    prompt: str = ""  # text to continue, or @file (@@ for a literal @); empty: start a new document
    chat: bool = False  # answer the prompt as a question; without a prompt, chat in the terminal
    system: str = ""  # chat: the system message
    # what it writes
    num_samples: int = 1  # number of continuations
    max_new_tokens: int = 500  # maximum length of each, in tokens
    temperature: float = 0.8  # 0 always takes the most likely token; higher is more random
    top_k: int | None = None  # sample from the k most likely tokens
    top_p: float | None = None  # sample from the fewest tokens whose probabilities sum to p
    seed: int = 1337  # of the sampling
    stop: str | None = None  # end a continuation before this text; <|endoftext|> always ends it
    # machine
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32
    compile: bool = False  # compile the blocks: takes half a minute, pays off for long texts

    def __post_init__(self):
        self.init_from = self.init_from or self.out_dir
        check_range(self, 1, 10**9, "num_samples", "max_new_tokens")
        check_range(self, 0, 1e6, "temperature")
        check_range(self, 0, 2**63 - 1, "seed")
        if self.chat and self.num_samples > 1:
            raise ValueError("chat and num_samples exclude each other: a chat has one answer")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def note(message: str):
    """Print a message to stderr: stdout is for generated text."""
    print(message, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------- text


def open_model(
    source: str | Path, device: torch.device, revision: str | None = None, router_context: str | None = None
) -> PolychromaticLM:
    """Load a model for inference."""
    model = from_pretrained(source, revision, router_context)
    note(f"model: {source}")
    if model.config.sees_future:
        note(
            "slow: its router averages the whole sequence, so every token is computed again from the start; "
            "--router_context=prefix reads only the past, with a cache"
        )
    return model.to(device).eval()


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls by its name. "auto" is train.py's choice on CUDA and float32 elsewhere."""
    if name not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"dtype is {name!r}; it must be auto, bfloat16 or float32")
    return pick_dtype("float32" if name == "auto" and device.type != "cuda" else name, device)


def stream(
    model: PolychromaticLM, encoding: tiktoken.Encoding, ids: list[int], cfg: SampleConfig, max_new_tokens: int
) -> Iterator[str]:
    """Continue token ids up to <|endoftext|> (in a chat, <|im_end|>); yields text once its bytes form characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ends = stop_tokens(encoding) if cfg.chat else {encoding.eot_token}
    settings = cfg.temperature, cfg.top_k, cfg.top_p, ends, encoding.eot_token
    for token in generate(model, [ids], max_new_tokens, *settings):
        if token.item() not in ends:
            yield decoder.decode(encoding.decode_single_token_bytes(token.item()))
    yield decoder.decode(b"", final=True)


def until_stop(pieces: Iterator[str], stop: str | None) -> Iterator[str]:
    """Pieces of a text up to where `stop` begins. Holds back the last characters, which may be the start of it."""
    held, keep = "", len(stop) - 1 if stop else 0
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        end = max(0, len(held) - keep)
        yield held[:end]
        held = held[end:]
    yield held


def read_prompt(text: str) -> str:
    """The prompt, or for @file the contents of the file; @@ is a literal @."""
    if text.startswith("@@") or not text.startswith("@"):
        return text.removeprefix("@")
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read the prompt from {text[1:]!r}: {e}") from None


def continue_text(model: PolychromaticLM, encoding: tiktoken.Encoding, cfg: SampleConfig):
    """Print num_samples continuations of the prompt."""
    prompt, block_size = read_prompt(cfg.prompt), model.config.block_size
    ids = encode(encoding, prompt).tolist()
    if not ids:
        note("empty prompt: starting a new document")
        ids = [encoding.eot_token]
    if len(ids) > block_size:
        note(f"the prompt has {len(ids):,} tokens, the context {block_size:,}: reading the last {block_size // 2:,}")
    for i in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f"--- sample {i + 1} of {cfg.num_samples} ---")
        print(prompt, end="", flush=True)
        for piece in until_stop(stream(model, encoding, ids, cfg, cfg.max_new_tokens), cfg.stop):
            print(piece, end="", flush=True)
        print()


class Chat:
    """A conversation with the model: keeps its history and prints answers as they are generated."""

    def __init__(self, model: PolychromaticLM, encoding: tiktoken.Encoding, cfg: SampleConfig):
        self.model, self.encoding, self.cfg = model, encoding, cfg
        self.system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        self.turns: list[dict[str, str]] = []  # user and assistant alternate

    def encode(self) -> list[int]:
        """Tokens of the conversation. Drops its oldest turns until a quarter of the context is left for the answer.

        Raises ValueError, and drops the newest message, if that message alone is too long.
        """
        room = self.model.config.block_size * 3 // 4

        def tokens(turns: list[dict[str, str]]) -> list[int]:
            return encode_chat(self.encoding, self.system + turns, reply=True)[0].tolist()

        if (n := len(tokens(self.turns[-1:]))) > room:
            self.turns.pop()
            with_system = " with --system" if self.system else ""
            raise ValueError(f"this takes {n:,} tokens{with_system}, but there is room for {room:,}; say it shorter")
        while len(ids := tokens(self.turns)) > room:
            del self.turns[:2]
            note("(the context is full: the oldest turn is forgotten)")
        return ids

    def answer(self, question: str):
        """Print the answer to a message of the user, and remember both. Ctrl-C ends the answer early."""
        self.turns.append({"role": "user", "content": question})
        ids, text = self.encode(), ""
        length = min(self.cfg.max_new_tokens, self.model.config.block_size - len(ids))
        try:
            pieces = stream(self.model, self.encoding, ids, self.cfg, length)
            for piece in until_stop(pieces, self.cfg.stop):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=sys.stderr)
        print(flush=True)
        self.turns.append({"role": "assistant", "content": text})


def converse(chat: Chat):
    """Answer lines typed in the terminal until Ctrl-D or /exit; /reset clears the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    note("/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/exit":
                return
            if line == "/reset":
                chat.turns.clear()
                note("(forgotten)")
            elif line.startswith("/"):
                note(f"(there is no {line.split()[0]}, only /reset and /exit)")
            elif line:
                chat.answer(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n(/exit or Ctrl-D leaves)")
        except ValueError as e:  # the message is too long
            note(f"({e})")


def main():
    cfg = load(SampleConfig)
    device = pick_device(cfg.device)
    dtype = inference_dtype(cfg.dtype, device)
    model = open_model(cfg.init_from or newest_checkpoint(), device, cfg.revision, cfg.router_context)
    with contextlib.redirect_stdout(sys.stderr):
        if cfg.compile and compiler_works(device):
            model.compile()
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab)
    torch.manual_seed(cfg.seed)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if not cfg.chat:
                continue_text(model, encoding, cfg)
            elif cfg.prompt:
                Chat(model, encoding, cfg).answer(read_prompt(cfg.prompt))
            else:
                converse(Chat(model, encoding, cfg))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run(main)
