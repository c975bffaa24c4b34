"""Generate text from a trained model, streamed to the terminal.

python sample.py                                           the newest model under out/ starts a new document
python sample.py out/tiny                                  another model
python sample.py --prompt="Problem: What is 12 + 34?"      continue a text; --prompt=@file reads it from a file
python sample.py --chat                                    chat with a model fine-tuned by sft.py
python sample.py --chat --prompt="What is 12 + 34?"        ask it one question
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# before torch: it sets environment variables that torch reads, and makes Ctrl-C during the imports one line
from common.settings import UserError, check_range, load, run  # isort: skip

import numpy as np
import torch

from common.generate import DECODING_OPTIONS, check_sampling, prepare_weights, text_deltas, visible_text
from common.run import compiler_works, pick_autocast, pick_device
from common.tokenizer import encode, encode_chat, get_tokenizer, stop_tokens
from common.weights import newest_checkpoint, open_model
from model import KVCache, PolychromaticLM, compute_dtype


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
    stop: str | None = None  # end a continuation before this text; <|endoftext|> and <|im_end|> always end it
    # machine
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32 (TF32 on CUDA)
    compile: bool | None = None  # compile the blocks, which takes half a minute; None: from 16,384 tokens on

    def __post_init__(self):
        check_range(self, 1, 10**9, "num_samples", "max_new_tokens")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.chat and self.num_samples > 1:
            raise UserError("chat and num_samples cannot be combined: a chat has one answer")
        if self.system and not self.chat:
            raise UserError("system is the system message of a chat; add --chat")
        if self.chat and not self.prompt and sys.stdin is None:
            raise UserError("a chat reads from the terminal, but standard input is closed; ask one question: --prompt=")
        if self.init_from and self.out_dir and Path(self.init_from) != Path(self.out_dir):
            raise UserError(f"init_from {self.init_from!r} and out_dir {self.out_dir!r} are two models; name one")


def note(message: str):
    """Print a message to stderr: stdout is for generated text."""
    print(message, file=sys.stderr)


def stream(
    model: PolychromaticLM, encoding, ids: list[int], length: int, cfg: SampleConfig, new_ids=None, cache=None
) -> Iterator[str]:
    """Continue token ids up to <|endoftext|>, <|im_end|> or the stop text; yields pieces of text.

    new_ids: a list that collects the new tokens. cache: see generate().
    """
    deltas = text_deltas(
        model, encoding, [ids], length, stop_tokens(encoding), [cfg.stop or ""],
        cfg.temperature, cfg.top_k, cfg.top_p, new_ids=None if new_ids is None else [new_ids], cache=cache,
    )  # fmt: skip
    return (piece for (piece,) in deltas)


def read_prompt(text: str) -> str:
    """The prompt, or for @file the contents of the file; @@ is a literal @."""
    if text.startswith("@@") or not text.startswith("@"):
        return text.removeprefix("@")
    try:
        return Path(text[1:]).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the prompt from {text[1:]!r}: {e}") from None


def continue_text(model: PolychromaticLM, encoding, cfg: SampleConfig):
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
        try:
            for piece in stream(model, encoding, ids, cfg.max_new_tokens, cfg):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)


class Chat:
    """A conversation with the model: keeps its history and prints answers as they are generated."""

    def __init__(self, model: PolychromaticLM, encoding, cfg: SampleConfig):
        self.model, self.encoding, self.cfg = model, encoding, cfg
        self.system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        self.turns: list[dict] = []  # user and assistant alternate; an answer is kept as its token ids
        self.cache: KVCache | None = None  # of the turns so far
        self.cached_ids: list[int] = []  # the tokens that it holds

    def answer(self, question: str):
        """Print the answer to a message of the user, and remember both. Ctrl-C ends the answer early."""
        block_size = self.model.config.block_size
        room = block_size * 3 // 4  # leaves a quarter of the context for the answer
        turns = [*self.turns, {"role": "user", "content": question}]
        while len(ids := encode_chat(self.encoding, self.system + turns, reply=True)[0].tolist()) > room:
            if len(turns) == 1:
                size = f"{len(ids):,} tokens{' with --system' if self.system else ''}"
                raise UserError(f"this takes {size}, but there is room for {room:,}; shorten it")
            turns = turns[2:]
        if len(turns) <= len(self.turns):
            note("(the context is full: the oldest turn is forgotten)")
        new_ids, text = [], ""
        self.open_cache(ids)
        length = min(self.cfg.max_new_tokens, block_size - len(ids))
        try:
            for piece in stream(self.model, self.encoding, ids, length, self.cfg, new_ids, self.cache):
                print(piece, end="", flush=True)
                text += piece
            if self.cache:
                self.cached_ids = (ids + new_ids)[: self.cache.length]
        except BaseException as e:
            self.cache = None  # it may hold half of a step
            if not isinstance(e, KeyboardInterrupt):
                raise
            print(" (stopped)", end="", file=sys.stderr)
            if not new_ids:  # the question counts as not asked
                return
        finally:
            print(flush=True)
        if len(new_ids) == length < self.cfg.max_new_tokens:
            note("(the context is full: the answer ends here)")
        self.turns = [*turns, {"role": "assistant", "content": self.said(new_ids, text)}]

    def open_cache(self, ids: list[int]):
        """Keep the cache if it holds the start of these ids; otherwise, make a new one."""
        config = self.model.config
        goes_on = self.cache and len(self.cached_ids) < len(ids) and ids[: len(self.cached_ids)] == self.cached_ids
        if not config.sees_future and not goes_on:
            dtype = compute_dtype(self.model.embedding.weight)
            self.cache = KVCache(config, 1, config.block_size, self.model.device, dtype)
            self.cached_ids = []

    def said(self, new_ids: list[int], text: str) -> np.ndarray:
        """The answer as the next turn reads it: the tokens that were drawn, up to a stop text."""
        while len(visible := visible_text(self.encoding, new_ids)) > len(text):
            new_ids.pop()
        return np.concatenate([np.array(new_ids, np.uint32), encode(self.encoding, text[len(visible) :])])


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
                note("(conversation cleared)")
            elif line.startswith("/"):
                note(f"(there is no {line.split()[0]}, only /reset and /exit)")
            elif line:
                chat.answer(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n(/exit or Ctrl-D leaves)")
        except UserError as e:  # the message is too long
            note(f"({e})")


def main():
    cfg = load(SampleConfig)
    device = pick_device(cfg.device)
    autocast = pick_autocast(cfg.dtype, device, training=False)
    source = cfg.init_from or cfg.out_dir or newest_checkpoint(fine_tuned=cfg.chat)
    model = open_model(source, device, cfg.revision, cfg.router_context, fine_tuned=cfg.chat)
    with contextlib.redirect_stdout(sys.stderr):
        pays = not cfg.chat and cfg.num_samples * cfg.max_new_tokens >= 2**14
        if (pays if cfg.compile is None else cfg.compile) and compiler_works(device):
            model.compile(options=DECODING_OPTIONS)
    prepare_weights(model, autocast.fast_dtype)
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab)
    torch.manual_seed(cfg.seed)
    with autocast:
        if not cfg.chat:
            continue_text(model, encoding, cfg)
        elif cfg.prompt:
            question = read_prompt(cfg.prompt)
            if not question.strip():
                raise UserError(f"the prompt {cfg.prompt!r} has no text")
            Chat(model, encoding, cfg).answer(question)
        else:
            converse(Chat(model, encoding, cfg))


if __name__ == "__main__":
    run(main)
