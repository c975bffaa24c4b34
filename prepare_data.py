"""Text to tokens on disk.

python prepare_data.py tiny    the embedded corpus, no network: generated math with worked steps, docstring prose of the
                               installed numpy and torch (stem), the source of Python's standard library (code)

python prepare_data.py tiny_sft
                               questions and answers of the same families, as conversations

python prepare_data.py pretrain
                               the paper's three data sets, streamed from the hub, in the tokens of Qwen3
python prepare_data.py pretrain --source.math='dumps/*.parquet' --max_tokens=1e8
                               the same from local files, up to a number of tokens a domain

python prepare_data.py sft     the paper's conversations, or with --source='dumps/*.jsonl' local ones

A corpus is data/<corpus>/meta.json and data/<corpus>/<domain>/{train,val}.bin: flat token ids, <|endoftext|> after
every document; beside those of conversations, {train,val}.mask: a byte a token, 1 where loss is taken. A document goes
to val by a hash of its text, so that a duplicate never straddles the split. A preparation that was killed goes on where
it was when it is run again.
"""

import ast
import contextlib
import functools
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
import sysconfig
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

import config

CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_SPECIALS = (
    *CHAT_SPECIALS, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class PrepareConfig:
    """Settings of every corpus."""

    data_dir: str = "data"  # where the corpora live; each in a folder of its name
    val_fraction: float = 0.001  # share of the documents that goes to val
    commit_seconds: float = 2.0  # between records of how far a preparation has come, from which it can go on

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")


@dataclass
class TinyConfig(PrepareConfig):
    """Settings of the embedded corpora, tiny and tiny_sft."""

    val_fraction: float = 0.05  # share of the documents that goes to val
    seed: int = 0  # of the generated text
    math_mb: float = 6.0  # megabytes of generated math
    max_length: int = 256  # tiny_sft: tokens of a conversation, at most; longer ones are cut

    def __post_init__(self):
        super().__post_init__()
        config.check_range(self, 1e-6, 1e6, "math_mb")
        config.check_range(self, 16, 2**30, "max_length")


@dataclass
class PretrainConfig(PrepareConfig):
    """Settings of the paper's pretraining data."""

    max_tokens: int | None = None  # train tokens of each domain; None: the paper's, 7.0, 2.5 and 0.5 billion
    source: dict[str, str] = field(default_factory=dict)  # local files, --source.math=x/*.parquet
    text_field: dict[str, str] = field(default_factory=dict)  # --text_field.math=name, where it is another
    vocab: str | None = None  # vocab.json of the Qwen3 tokenizer; None: from the hub, kept in its cache

    def __post_init__(self):
        super().__post_init__()
        if self.max_tokens is not None:
            config.check_range(self, 1, 2**50, "max_tokens")
        for name in (*self.source, *self.text_field):
            if name not in PRETRAIN:
                raise ValueError(f"there is no domain {name!r}; there are {', '.join(PRETRAIN)}")


@dataclass
class SFTDataConfig(PrepareConfig):
    """Settings of the paper's conversations."""

    max_tokens: int | None = None  # train tokens; None: all of the data set
    source: str | None = None  # local files with a field of messages, x/*.jsonl or x/*.parquet; None: the paper's
    messages_field: str = "messages"  # where the messages are, each {"role": ..., "content": ...}
    max_length: int = 4096  # tokens of a conversation, at most; longer ones are cut
    tokenizer: str = "qwen3"  # or bytes, for a model of the embedded corpus
    vocab: str | None = None  # vocab.json of the Qwen3 tokenizer; None: from the hub, kept in its cache

    def __post_init__(self):
        super().__post_init__()
        config.check_range(self, 16, 2**30, "max_length")
        if self.max_tokens is not None:
            config.check_range(self, 1, 2**50, "max_tokens")


# ----------------------------------------------------------------------------------------------------------- tokenizers


@functools.cache
def get_tokenizer(name: str, vocab: str | None = None) -> tiktoken.Encoding:
    """The tokenizer of that name, as a tiktoken.Encoding; encode documents with encode().

    "bytes": the 256 bytes, then the chat specials <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258.
    "qwen3": byte-level BPE from `vocab`, a local vocab.json (None: Qwen/Qwen3-0.6B-Base on the hub, kept in the hub's
    cache), then 26 specials. The ids of vocab.json are the merge ranks.
    Raises ValueError for an unknown name, a file that is no such vocabulary, or a hub that cannot be reached.
    """
    if name == "bytes":
        ranks, specials, pattern = {bytes([i]): i for i in range(256)}, CHAT_SPECIALS, r"[^\n]+|\n+"
    elif name == "qwen3":
        ranks, specials, pattern = read_vocab(vocab or download_vocab()), QWEN3_SPECIALS, QWEN3_PATTERN
    else:
        raise ValueError(f"unknown tokenizer {name!r}; there are bytes, qwen3")
    ids = {special: len(ranks) + i for i, special in enumerate(specials)}
    return tiktoken.Encoding(name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)


def download_vocab() -> str:
    """Path of Qwen3's vocab.json in the hub's cache, downloaded if it is not there yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # not a line for every retry
    try:
        return hf_hub_download("Qwen/Qwen3-0.6B-Base", "vocab.json")
    except OSError:
        raise ValueError(
            "cannot fetch the Qwen3 tokenizer, the hub cannot be reached; name a copy of its vocab.json with --vocab="
        ) from None


def read_vocab(path: str) -> dict[bytes, int]:
    """{token's bytes: merge rank} of a byte-level BPE vocab.json, which spells bytes in GPT-2's printable alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8"))
        ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids.items()}
    except OSError as e:
        raise ValueError(f"cannot read the vocabulary {path}: {e.strerror}") from None
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a vocab.json of a byte-level BPE tokenizer") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"{path} is not a vocab.json of a byte-level BPE tokenizer: ids or bytes are missing")
    return ranks


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of a text, uint32; never a special token, whatever the text spells. For qwen3 it is made NFC first."""
    if encoding.name == "qwen3":
        text = unicodedata.normalize("NFC", text)
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates become U+FFFD
        return encode(encoding, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:  # the pattern cannot take a run of a million spaces: cut the text in two
        return np.concatenate([encode(encoding, text[: len(text) // 2]), encode(encoding, text[len(text) // 2 :])])


ROLES = ("system", "user", "assistant")


def encode_chat(
    encoding: tiktoken.Encoding, messages: Sequence[dict[str, str]], reply: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation in ChatML: token ids [n] uint32 and loss mask [n] uint8.

    messages are {"role": "system", "user" or "assistant", "content": text}. What a message spells stays text: no
    special token comes of it. The mask is 1 on each assistant message's content, its <|im_end|> and newline. The end is
    <|endoftext|>, or with reply=True the opening of an assistant's message. Raises ValueError, naming the fault, for
    anything else than such messages.
    """
    eot, start, end = (np.array([encoding.encode_single_token(name)], dtype=np.uint32) for name in CHAT_SPECIALS)
    parts, learnt = [], []
    for message in messages:
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ValueError(f"the role {role!r}, not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError("content that is not text")
        parts += [start, encode(encoding, f"{role}\n"), encode(encoding, content), end, encode(encoding, "\n")]
        learnt += [False, False, *[role == "assistant"] * 3]
    if not parts:
        raise ValueError("no messages")
    parts += [start, encode(encoding, "assistant\n")] if reply else [eot]
    learnt += [False] * (len(parts) - len(learnt))
    return np.concatenate(parts), np.repeat(np.array(learnt, dtype=np.uint8), [len(part) for part in parts])


def chat_ends(encoding: tiktoken.Encoding) -> set[int]:
    """The tokens that end an answer."""
    return {encoding.encode_single_token(name) for name in ("<|endoftext|>", "<|im_end|>")}


# ------------------------------------------------------------------------------------------------------- tokens on disk


def is_held_out(text: str, fraction: float) -> bool:
    """Whether this document belongs to val: a hash of its text, uniform on [0, 1), lies below fraction."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


Batches = Iterator[tuple[list, object]]  # documents, and the state (plain values) from which to go on after them


def in_batches(documents: Iterable, state: int | None, size: int = 256) -> Batches:
    """Batches of documents that can be made again from the start; the state is how many have been taken."""
    taken = state or 0
    documents = itertools.islice(documents, taken, None)
    while batch := list(itertools.islice(documents, size)):
        taken += len(batch)
        yield batch, taken


class Encoded(NamedTuple):
    """A document as it goes to disk. Without tokens, it is left out."""

    ids: np.ndarray  # [n], <|endoftext|> last
    text: str  # what decides, by its hash, whether it goes to val
    mask: np.ndarray | None = None  # [n] uint8, 1 where loss is taken; None: everywhere
    note: str | None = None  # what a person should hear of it, counted


def encode_document(encoding: tiktoken.Encoding, text: str) -> Encoded:
    return Encoded(np.append(encode(encoding, text), np.uint32(encoding.eot_token)), text)


def encode_conversation(encoding: tiktoken.Encoding, max_length: int, messages: list[dict]) -> Encoded:
    """A conversation cut after max_length tokens, or left out if it has nothing to learn from; the note says why."""

    def left_out(why: str) -> Encoded:
        return Encoded(np.empty(0, np.uint32), "", np.empty(0, np.uint8), f"left out: {why[:60]}")

    if not isinstance(messages, list):
        return left_out("messages that are no list")
    try:
        ids, mask = encode_chat(encoding, messages)
    except ValueError as e:
        return left_out(str(e))
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        return left_out("an assistant message without text")
    if not mask.any():
        return left_out("no assistant message")
    text = json.dumps([[m["role"], m["content"]] for m in messages])
    if len(ids) <= max_length:
        return Encoded(ids, text, mask)
    ids, mask = ids[:max_length], mask[:max_length]
    ids[-1], mask[-1] = encoding.eot_token, 0
    if not mask.any():
        return left_out(f"no answer within {max_length} tokens")
    return Encoded(ids, text, mask, f"cut to {max_length} tokens")


def write_domain(
    folder: Path,
    open_batches: Callable[[object], Batches],
    encode_one: Callable[[object], Encoded],
    encoding: tiktoken.Encoding,
    val_fraction: float,
    made_of: dict,
    max_tokens: int | None = None,
    commit_seconds: float = 2.0,
    masked: bool = False,
) -> dict:
    """Tokenize documents into folder/{train,val}.bin, up to the document that completes max_tokens of train.

    Masked ones get {train,val}.mask as well. Tokens go to *.partial; every commit_seconds they are flushed to disk and
    progress.json records their reach. Killed at any moment and called again with the same made_of (what decides the
    tokens), it goes on from there; the bytes are those of an unbroken run. A .bin appears only whole, and an earlier
    one stays until then. Returns the counts for meta.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress_path, dtype = folder / "progress.json", token_dtype(encoding.n_vocab)
    kinds = {"bin": dtype, "mask": np.dtype(np.uint8)} if masked else {"bin": dtype}
    files = {(split, kind): folder / f"{split}.{kind}" for split in ("train", "val") for kind in kinds}
    partial = {key: path.with_name(path.name + ".partial") for key, path in files.items()}
    counts = {"train_tokens": 0, "val_tokens": 0, "val_bytes": 0} | ({"val_targets": 0, "notes": {}} if masked else {})
    progress = {"made_of": made_of, "state": None, "finished": False, **counts}

    def sizes(of: dict) -> dict[tuple[str, str], int]:
        return {(split, kind): of[f"{split}_tokens"] * kinds[kind].itemsize for split, kind in files}

    with contextlib.suppress(OSError, ValueError, LookupError):  # no progress yet, or its files are gone
        before = json.loads(progress_path.read_text())
        there = {key: partial[key] if partial[key].exists() else path for key, path in files.items()}
        reached = {key: path.stat().st_size for key, path in there.items()}
        wanted = sizes(before)
        whole = reached == wanted if before["finished"] else all(reached[key] >= wanted[key] for key in files)
        if whole and before["made_of"] == json.loads(json.dumps(made_of)):
            progress = before
    if not progress["finished"]:
        batches = open_batches(progress["state"])
        first = list(itertools.islice(batches, 1))  # until there is something new, nothing earlier is removed
        if progress["state"] is None:
            progress_path.unlink(missing_ok=True)  # before its tokens: it must never speak of others
        for path in partial.values():
            path.touch()
        bar = tqdm(desc=folder.name, total=max_tokens, initial=progress["train_tokens"], unit="tok", unit_scale=True)
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
            opened = {key: stack.enter_context(open(path, "r+b")) for key, path in partial.items()}
            for key, size in sizes(progress).items():
                opened[key].truncate(size)
                opened[key].seek(0, os.SEEK_END)
            stack.enter_context(bar)
            committed = time.monotonic()
            for documents, state in itertools.chain(first, batches):
                written = {key: [np.empty(0, kinds[key[1]])] for key in opened}
                for document in pool.map(encode_one, documents):
                    if max_tokens and progress["train_tokens"] >= max_tokens:
                        break
                    if document.note:
                        progress["notes"][document.note] = progress["notes"].get(document.note, 0) + 1
                    split = "val" if is_held_out(document.text, val_fraction) else "train"
                    written[split, "bin"].append(document.ids)
                    progress[f"{split}_tokens"] += len(document.ids)
                    bar.update(len(document.ids) if split == "train" else 0)
                    if masked:
                        written[split, "mask"].append(document.mask)
                    if split == "val":
                        learnt = document.ids[document.mask == 1] if masked else document.ids
                        text = learnt[learnt < encoding.eot_token]  # specials, the last ids, are no text
                        progress["val_bytes"] += len(encoding.decode_bytes(text.tolist()))
                        if masked:
                            progress["val_targets"] += len(learnt)
                for key, parts in written.items():
                    opened[key].write(np.concatenate(parts).astype(kinds[key[1]]).tobytes())
                progress["state"] = state
                full = max_tokens and progress["train_tokens"] >= max_tokens
                if full or time.monotonic() - committed >= commit_seconds:
                    commit(opened.values(), progress, progress_path)
                    committed = time.monotonic()
                if full:
                    break
            progress["finished"] = True
            commit(opened.values(), progress, progress_path)
    if progress["train_tokens"] and progress["val_tokens"]:  # else what was there before stays
        for key, path in files.items():
            if partial[key].exists():
                (folder.parent / "meta.json").unlink(missing_ok=True)  # it spoke of what now goes
                os.replace(partial[key], path)
    return {name: progress[name] for name in counts}


def commit(files: Iterable[BinaryIO], progress: dict, path: Path):
    """Flush the files to disk, then record that they reach as far as progress says."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    write_json(path, progress)


def write_json(path: Path, value: dict):
    config.write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def prepare(folder: Path, encoding: tiktoken.Encoding, domains: dict[str, Callable[[], dict]]):
    """Write every domain, then meta.json: without it a corpus does not count as prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    with config.locked(folder):
        counts = {name: write() for name, write in domains.items()}
        for count in counts.values():
            if not count["train_tokens"] or not count["val_tokens"]:
                notes = "".join(f"; {n:,} {note}" for note, n in count.get("notes", {}).items())
                split = "val: raise --val_fraction=, or add text" if count["train_tokens"] else "training"
                raise ValueError(f"nothing of {count['source']} is left for {split}{notes}")
        meta = {
            "tokenizer": encoding.name,
            "vocab_size": encoding.n_vocab,
            "end_of_text": encoding.eot_token,
            "dtype": token_dtype(encoding.n_vocab).name,
            "domains": counts,
        }
        write_json(folder / "meta.json", meta)
    for name, count in counts.items():
        print(f"{name}: {count['train_tokens']:,} train and {count['val_tokens']:,} val tokens ({count['source']})")
        for note, n in count.get("notes", {}).items():
            print(f"{name}: {n:,} {note}")
    script = "sft.py" if folder.name.endswith("sft") else "train.py"
    print(f"wrote {folder}; next: python {script} config/{folder.name}.py")


# -------------------------------------------------------------------------------------------------- tiny: math problems
# A family makes one problem: question, the steps a person would write, answer. The answer is reached by the steps, and
# checked against the definition of the operation before it is handed out.

Problem = tuple[str, list[str], str]
NAMES = "Ada Ben Chloe David Emma Farid Grace Hugo Iris Jonas Kira Liam Mia Noah".split()
SYSTEMS = ("You are a careful calculator.", "Answer step by step.", "Work it out, then give the answer.")
THINGS = "apples books coins pencils stamps shells marbles cards stickers oranges tickets".split()


def check(holds: bool, problem: str):
    """A generated answer that is wrong is a bug of this file."""
    if not holds:
        raise AssertionError(f"the generator got this wrong: {problem}")


def number_facts(rng: random.Random) -> Problem:
    """What the other families are made of: single-digit sums and differences, the tables up to 10."""
    asked, results = [], []
    for sign in rng.choices("+-*/", k=6):
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        a = {"+": a, "-": a + b, "*": a, "/": a * b}[sign]
        asked.append(f"{a} {sign} {b}")
        results.append({"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign])
        check(sign != "/" or results[-1] * b == a, asked[-1])
    steps = [f"{expression} = {result}" for expression, result in zip(asked, results)]
    return f"Work out {', '.join(asked)}.", steps, ", ".join(map(str, results))


def addition(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    steps = [f"{a % 10} + {b % 10} = {ones}" + (f", write {ones % 10}, carry 1" if ones > 9 else "")]
    carried = " + 1" if ones > 9 else ""
    result = 10 * (tens + ones // 10) + ones % 10
    if tens:
        steps.append(f"{a // 10} + {b // 10}{carried} = {tens + ones // 10}")
    check(result == a + b, f"{a} + {b}")
    return f"What is {a} + {b}?", [*steps, f"{a} + {b} = {result}"], str(result)


def subtraction(rng: random.Random) -> Problem:
    b, a = sorted((rng.randint(1, 99), rng.randint(1, 99)))
    borrow = int(a % 10 < b % 10)
    ones, tens = 10 * borrow + a % 10 - b % 10, a // 10 - b // 10 - borrow
    steps = [f"{10 * borrow + a % 10} - {b % 10} = {ones}" + (", borrow 1" if borrow else "")]
    if a > 9:
        steps.append(f"{a // 10} - {b // 10}{' - 1' if borrow else ''} = {tens}")
    check(10 * tens + ones == a - b, f"{a} - {b}")
    return f"What is {a} - {b}?", [*steps, f"{a} - {b} = {10 * tens + ones}"], str(10 * tens + ones)


def multiplication(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 99), rng.randint(2, 9)
    parts = [part for part in (a // 10 * 10, a % 10) if part]
    steps = [f"{part} * {b} = {part * b}" for part in parts]
    if len(parts) > 1:
        steps.append(f"{parts[0] * b} + {parts[1] * b} = {sum(part * b for part in parts)}")
    result = sum(part * b for part in parts)
    check(result == a * b, f"{a} * {b}")
    return f"What is {a} * {b}?", steps, str(result)


def division(rng: random.Random) -> Problem:
    b = rng.randint(2, 10)
    a = rng.randint(2, 11 * b - 1)
    quotient, rest = divmod(a, b)
    steps = [f"{quotient} * {b} = {quotient * b}", f"{a} - {quotient * b} = {rest}"]
    check(quotient * b + rest == a and 0 <= rest < b, f"{a} / {b}")
    return f"Divide {a} by {b}, with remainder.", steps, f"{quotient} remainder {rest}"


def fraction(rng: random.Random) -> Problem:
    b, d = rng.randint(2, 8), rng.randint(2, 8)
    a, c = rng.randint(1, b), rng.randint(1, d)
    sign = rng.choice("+-")
    if sign == "-" and a * d < c * b:
        a, b, c, d = c, d, a, b
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    top = x + y if sign == "+" else x - y
    divisor = math.gcd(top, common)
    n, m = top // divisor, common // divisor
    steps = [f"{p}/{q} = {z}/{common}" for p, q, z in ((a, b, x), (c, d, y)) if q != common]
    steps.append(f"{x} {sign} {y} = {top}, so {top}/{common}")
    answer = str(n) if m == 1 else f"{n}/{m}"
    if divisor > 1:
        steps.append(f"divide both by {divisor}: {answer}")
    check(n * b * d == m * (a * d + c * b if sign == "+" else a * d - c * b), f"{a}/{b} {sign} {c}/{d}")
    return f"What is {a}/{b} {sign} {c}/{d}?", steps, answer


def linear_equation(rng: random.Random) -> Problem:
    a, b, x = rng.randint(2, 10), rng.randint(1, 20), rng.randint(1, 10)
    sign, inverse = rng.choice((("+", "-"), ("-", "+")))
    c = a * x + b if sign == "+" else a * x - b
    right = c - b if sign == "+" else c + b
    check(right == a * x and right % a == 0, f"{a}x {sign} {b} = {c}")
    steps = [f"{a}x = {c} {inverse} {b} = {right}", f"x = {right} / {a} = {right // a}"]
    return f"Solve {a}x {sign} {b} = {c} for x.", steps, f"x = {right // a}"


def sequence(rng: random.Random) -> Problem:
    step, start, kind = rng.randint(2, 9), rng.randint(1, 40), rng.choice(("add", "add", "subtract", "multiply by"))
    if kind == "multiply by":
        step, start = rng.randint(2, 3), rng.randint(1, 12)
        terms, sign = [start * step**i for i in range(5)], "*"
        found = f"{terms[1]} / {terms[0]} = {step}"
    elif kind == "add":
        terms, sign = [start + step * i for i in range(5)], "+"
        found = f"{terms[1]} - {terms[0]} = {step}"
    else:
        terms, sign = [start + step * (4 - i) for i in range(5)], "-"
        found = f"{terms[0]} - {terms[1]} = {step}"
    rules = {"*": lambda x: x * step, "+": lambda x: x + step, "-": lambda x: x - step}
    check(all(rules[sign](x) == y for x, y in zip(terms, terms[1:])), str(terms))
    steps = [f"{found}, so {kind} {step}", f"{terms[3]} {sign} {step} = {terms[4]}"]
    return f"What comes next: {', '.join(map(str, terms[:-1]))}, ...?", steps, str(terms[-1])


def greatest_common_divisor(rng: random.Random) -> Problem:
    factor = rng.randint(1, 10)
    a, b = sorted((factor * rng.randint(2, 10), factor * rng.randint(2, 10)), reverse=True)
    x, y, steps = a, b, []
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    check(x == math.gcd(a, b), f"gcd({a}, {b})")
    return f"What is the greatest common divisor of {a} and {b}?", steps, str(x)


def percentage(rng: random.Random) -> Problem:
    base = 10 * rng.randint(1, 30)
    unit = 25 if base % 4 == 0 and rng.random() < 0.3 else 10
    percent = unit * rng.randint(1, 100 // unit - 1)
    part, times = base * unit // 100, percent // unit
    steps = [f"{unit}% of {base} is {base} / {100 // unit} = {part}"]
    if times > 1:
        steps.append(f"{percent}% is {times} * {part} = {times * part}")
    check(times * part * 100 == percent * base, f"{percent}% of {base}")
    return f"What is {percent}% of {base}?", steps, str(times * part)


def word_problem(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(2, 50), rng.randint(2, 30)
        c = rng.randint(1, a + b - 1)
        question = f"{name} has {a} {thing}. {other} gives {name} {b} more. {name} then loses {c}. How many are left?"
        steps, answer = [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"], a + b - c
        holds = answer + c - b == a
    elif kind == 1:
        boxes, each, extra = rng.randint(2, 10), rng.randint(2, 12), rng.randint(1, 30)
        question = f"{name} fills {boxes} boxes with {each} {thing} each and has {extra} left. How many in all?"
        packed, answer = boxes * each, boxes * each + extra
        steps = [f"{boxes} * {each} = {packed}", f"{packed} + {extra} = {answer}"]
        holds = divmod(answer - extra, each) == (boxes, 0)
    elif kind == 2:
        friends, answer = rng.randint(2, 10), rng.randint(2, 12)
        total = friends * answer
        question = f"{name} shares {total} {thing} equally among {friends} friends. How many does each get?"
        steps = [f"{total} / {friends} = {answer}"]
        holds = divmod(total, friends) == (answer, 0)
    else:
        price, count = rng.randint(2, 10), rng.randint(2, 12)
        paid = price * count + rng.randint(1, 50)
        question = f"{name} buys {count} {thing} at {price} euros each and pays {paid} euros. How much change is due?"
        cost, answer = count * price, paid - count * price
        steps = [f"{count} * {price} = {cost}", f"{paid} - {cost} = {answer}"]
        holds = divmod(paid - answer, price) == (count, 0)
    check(holds, question)
    return question, steps, str(answer)


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    "number facts": number_facts,
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "division": division,
    "fractions": fraction,
    "equations": linear_equation,
    "sequences": sequence,
    "gcd": greatest_common_divisor,
    "percentages": percentage,
    "word problems": word_problem,
}


def is_reserved(question: str) -> bool:
    """Whether a question is kept out of all training data, for eval.py. 12 + 34 goes with 34 + 12, and with 12 - 34."""
    return is_held_out(" ".join(sorted(re.findall(r"\w+", question))), 0.1)


def gives_away(steps: list[str]) -> bool:
    """Whether a step works out a reserved sum, difference or product; those of a digit are needed everywhere."""
    for a, sign, b in re.findall(r"(\d+) ([-+*]) (\d+) =", "; ".join(steps)):
        is_fact = int(a) <= 10 and int(b) <= 10 if sign == "*" else min(len(a), len(b)) == 1
        if not is_fact and is_reserved(f"What is {a} {sign} {b}?"):
            return True
    return False


def problems(seed: int, reserved: bool, limit: int | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Distinct problems of all families in turn: family, question, worked steps with the answer, answer.

    All are reserved ones, or none is, nor gives one away. A family ends after `limit`, or when it has no more.
    """
    rng, seen, left = random.Random(seed), set(), dict.fromkeys(FAMILIES, limit or math.inf)

    def fits(problem: Problem) -> bool:
        question, steps, _ = problem
        return question not in seen and is_reserved(question) == reserved and (reserved or not gives_away(steps))

    while any(left.values()):
        for family in FAMILIES:
            made = (FAMILIES[family](rng) for _ in range(2000 if left[family] else 0))
            found = next(filter(fits, made), None)
            left[family] = left[family] - 1 if found else 0
            if found is None:
                continue
            question, steps, answer = found
            seen.add(question)
            yield family, question, "".join(f"{step}\n" for step in steps) + f"Answer: {answer}", answer


def up_to(size: float, texts: Iterable, length: Callable[[object], int]) -> Iterator:
    """The first of the texts that together hold `size` bytes."""
    total = 0
    for text in texts:
        if total >= size:
            return
        total += length(text)
        yield text


def math_documents(seed: int, size: float) -> Iterator[str]:
    """Solved problems, `size` bytes of them."""
    return up_to(size, (f"Problem: {question}\n{worked}\n" for _, question, worked, _ in problems(seed, False)), len)


def math_conversations(seed: int, size: float) -> Iterator[list[dict[str, str]]]:
    """Questions and worked answers, `size` bytes of them; one in eight begins with a system message, some ask twice."""
    rng, source = random.Random(seed), problems(seed, False)

    def length(messages: list[dict[str, str]]) -> int:
        return sum(len(message["content"]) for message in messages)

    def conversation() -> list[dict[str, str]]:
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 1 / 8 else []
        for _ in range(2 if rng.random() < 1 / 4 else 1):
            _, question, worked, _ = next(source)
            turn = [{"role": "user", "content": question}, {"role": "assistant", "content": worked}]
            if len(messages) < 2 or length(messages + turn) <= 180:  # bytes that fit into the context
                messages += turn
        return messages

    return up_to(size, iter(conversation, None), length)


# -------------------------------------------------------------------------------------------------- tiny: stem and code


def docstring_prose(path: Path) -> list[str]:
    """The docstrings of a Python file and those it hands to add_docstr() and the like; no examples, no short ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []  # syntax of a later Python
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and "doc" in getattr(node.func, "id", getattr(node.func, "attr", "")):
            texts = [inner for arg in node.args for inner in ast.walk(arg) if isinstance(inner, ast.Constant)]
            found += [inspect.cleandoc(text.value) for text in texts if isinstance(text.value, str)]
    prose = [re.sub(r"^ *>>>.*\n(?:.*\S.*\n?)*", "", text + "\n", flags=re.M).strip() for text in found]
    return [text + "\n" for text in prose if len(text) >= 200]


def stem_documents() -> Iterator[str]:
    """Distinct docstrings of the installed numpy and torch, in the order of their files."""
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    paths = [path for root in roots for path in sorted(root.rglob("*.py"))]
    with ProcessPoolExecutor() as pool:
        found = pool.map(docstring_prose, paths, chunksize=16)
        seen = set()
        for text in (text for texts in found for text in texts):
            if text not in seen:
                seen.add(text)
                yield text


def code_documents() -> Iterator[str]:
    """The files of the running Python's standard library, without its tests, character tables and generated topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if not left_out.intersection(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text


def prepare_embedded(cfg: TinyConfig, name: str, sources: dict[str, tuple[Callable[[], Iterable], str]], chat: bool):
    """Write data/<name> from generators of documents; deterministic for the seed and the installed versions."""
    folder, encoding = Path(cfg.data_dir) / name, get_tokenizer("bytes")
    encode_one = functools.partial(encode_conversation, encoding, cfg.max_length)
    encode_one = encode_one if chat else functools.partial(encode_document, encoding)

    def write(domain: str) -> dict:
        documents, source = sources[domain]
        code = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()  # a new generator, new problems
        made_of = {"source": source, "val_fraction": cfg.val_fraction, "max_length": cfg.max_length, "code": code}
        opened = lambda state: in_batches(documents(), state)  # noqa: E731
        counts = write_domain(
            folder / domain, opened, encode_one, encoding, cfg.val_fraction, made_of,
            commit_seconds=cfg.commit_seconds, masked=chat,
        )  # fmt: skip
        return {"source": source, **counts}

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in sources})


def prepare_tiny(cfg: TinyConfig):
    sources = {
        "math": (lambda: math_documents(cfg.seed, cfg.math_mb * 1e6), f"generated, {cfg.math_mb} MB, seed {cfg.seed}"),
        "stem": (stem_documents, f"docstrings of numpy {version('numpy')} and torch {version('torch')}"),
        "code": (code_documents, f"standard library of Python {sys.version.split()[0]}"),
    }
    prepare_embedded(cfg, "tiny", sources, chat=False)


def prepare_tiny_sft(cfg: TinyConfig):
    made = lambda: math_conversations(cfg.seed + 1, cfg.math_mb * 1e6)  # noqa: E731
    prepare_embedded(cfg, "tiny_sft", {"chat": (made, f"generated, {cfg.math_mb} MB, seed {cfg.seed + 1}")}, chat=True)


# ------------------------------------------------------------------------------------------------ pretrain: the hub


class HubData(NamedTuple):
    """Where the documents of a domain come from, and how many tokens of them the paper takes (None: all)."""

    dataset: str
    subset: str | None
    split: str
    text_field: str
    tokens: int | None
    revision: str | None = None  # commit on the hub; None: the newest


PRETRAIN = {
    "math": HubData("nvidia/Nemotron-CC-Math-v1", "4plus", "train", "text", 7_000_000_000),
    "stem": HubData("openbmb/Ultra-FineWeb", None, "en", "content", 2_500_000_000),
    "code": HubData("lumees/github-code-2025-language-split", "python", "train", "content", 500_000_000),
}
CHAT = HubData("nvidia/Nemotron-Math-v2", None, "high_part00", "messages", None)
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def open_dataset(source: str | HubData):
    """A streamed `datasets` data set: from the hub, or from local files by their ending (a .txt file is one document).

    Ends the script with one line for a gated data set, a hub that cannot be reached, or files that are not there.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    if isinstance(source, HubData):
        try:
            return datasets.load_dataset(
                source.dataset, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        except datasets.exceptions.DatasetNotFoundError as e:
            if "gated" in str(e):
                raise ValueError(
                    f"{source.dataset} is gated: accept its terms on its page, then log in: hf auth login"
                ) from None
            raise ValueError(f"cannot open {source.dataset}: {' '.join(str(e).split())[:300]}") from None
        except ConnectionError:
            raise ValueError(
                f"the hub cannot be reached for {source.dataset}; local files go in with --source, see --help"
            ) from None
        except ValueError as e:  # no such subset or split
            raise ValueError(f"cannot open {source.dataset}: {' '.join(str(e).split())[:300]}") from None
    files = sorted(glob.glob(source, recursive=True))
    if not files:
        raise ValueError(f"no file matches {source}")
    reader = READERS.get(Path(files[0]).suffix)
    if reader is None or any(READERS.get(Path(file).suffix) != reader for file in files):
        raise ValueError(f"{source}: files of one kind are needed, {', '.join(READERS)}")
    options = {"sample_by": "document"} if reader == "text" else {}
    with reading(source):
        return datasets.load_dataset(reader, data_files=files, split="train", streaming=True, **options)


def pinned(source: HubData, progress: Path) -> HubData:
    """The data set at one commit: that of the preparation under way, else the newest, so that all of it is of one."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        before = HubData(*json.loads(progress.read_text())["made_of"]["source"])
        if before.revision and before._replace(revision=None) == source:
            return before
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return source._replace(revision=HfApi().dataset_info(source.dataset).sha)
    except RepositoryNotFoundError as e:  # gated ones, without a login, among them
        raise ValueError(f"cannot open {source.dataset}: {' '.join(str(e).split())[:300]}") from None
    except Exception:  # of the hub's own HTTP library, whichever that is
        raise ValueError(
            f"the hub cannot be reached for {source.dataset}; local files go in with --source, see --help"
        ) from None


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what goes wrong while a data set is read into one line."""
    try:
        yield
    except Exception as e:  # a lost connection or a damaged file: each library has its own kinds
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(
            f"cannot read {where}: {reason}; if it was the network, run the command again to go on"
        ) from None


def streamed(source: str | HubData, column: str, kind: type, state: dict | None, size: int = 256) -> Batches:
    """Batches of one field of a data set, from the start or an earlier state; of kind str, what is no text is left out.

    Ends the script with one line if there is no such field, or if the data cannot be read on.
    """
    where = source.dataset if isinstance(source, HubData) else source
    stream = open_dataset(source)
    with reading(where):
        if state:
            stream.load_state_dict(state)
        batches = stream.iter(batch_size=size)
    while True:
        with reading(where):
            batch = next(batches, None)
        if batch is None:
            return
        if column not in batch:
            setting = "--text_field.<domain>=" if kind is str else "--messages_field="
            raise ValueError(f"{where} has no field {column!r} but {', '.join(batch)}; name one: {setting}")
        yield [value for value in batch[column] if kind is list or isinstance(value, kind)], stream.state_dict()


def write_streamed(
    cfg: PretrainConfig | SFTDataConfig, folder: Path, encoding: tiktoken.Encoding, encode_one: Callable,
    hub: HubData, local: str | None, column: str, kind: type, **more,
) -> dict:  # fmt: skip
    """write_domain() of a data set on the hub, or of local files in its place."""
    source = local or pinned(hub, folder / "progress.json")
    files = sorted(glob.glob(local, recursive=True)) if local else []
    vocab = hashlib.blake2b(b"".join(encoding.token_byte_values()), digest_size=8).hexdigest()
    max_tokens = cfg.max_tokens or hub.tokens
    made_of = {
        "source": source, "files": [(path, os.path.getsize(path)) for path in files], "field": column,
        "val_fraction": cfg.val_fraction, "max_tokens": max_tokens, "vocab": vocab, **more,
    }  # fmt: skip
    opened = functools.partial(streamed, source, column, kind)
    counts = write_domain(
        folder, opened, encode_one, encoding, cfg.val_fraction, made_of, max_tokens, cfg.commit_seconds, kind is list
    )
    return {"source": local or f"{hub.dataset} at {source.revision}", **counts}


def open_tokenizer(name: str, vocab: str | None) -> tiktoken.Encoding:
    """get_tokenizer() for a script: it ends with one line where that raises."""
    try:
        return get_tokenizer(name, vocab)
    except ValueError as e:
        raise ValueError(str(e)) from None


def prepare_pretrain(cfg: PretrainConfig):
    """Write data/pretrain from the paper's data sets, or from local files; can be killed and run again."""
    folder, encoding = Path(cfg.data_dir) / "pretrain", open_tokenizer("qwen3", cfg.vocab)

    def write(domain: str) -> dict:
        hub, local = PRETRAIN[domain], cfg.source.get(domain)
        column = cfg.text_field.get(domain, "text" if local and local.endswith(".txt") else hub.text_field)
        encode_one = functools.partial(encode_document, encoding)
        return write_streamed(cfg, folder / domain, encoding, encode_one, hub, local, column, str)

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in PRETRAIN})


def prepare_sft(cfg: SFTDataConfig):
    """Write data/sft from the paper's conversations, or from local files; can be killed and run again."""
    folder, encoding = Path(cfg.data_dir) / "sft", open_tokenizer(cfg.tokenizer, cfg.vocab)
    encode_one = functools.partial(encode_conversation, encoding, cfg.max_length)

    def write() -> dict:
        return write_streamed(
            cfg, folder / "chat", encoding, encode_one, CHAT, cfg.source, cfg.messages_field, list,
            max_length=cfg.max_length,
        )  # fmt: skip

    prepare(folder, encoding, {"chat": write})


CORPORA: dict[str, tuple[type[PrepareConfig], Callable[[PrepareConfig], None]]] = {
    "tiny": (TinyConfig, prepare_tiny),
    "tiny_sft": (TinyConfig, prepare_tiny_sft),
    "pretrain": (PretrainConfig, prepare_pretrain),
    "sft": (SFTDataConfig, prepare_sft),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("--help", "-h"):
        print(f"{inspect.cleandoc(__doc__)}\n\nThe settings of one: python prepare_data.py tiny --help")
        return
    if name not in CORPORA:
        given = f"not {name!r}" if name else "none was named"
        raise ValueError(f"which corpus? python prepare_data.py {' | '.join(CORPORA)} ({given})")
    settings, write = CORPORA[name]
    cfg = config.load(settings, sys.argv[2:])
    try:
        write(cfg)
    except KeyboardInterrupt:
        raise ValueError("stopped; run the command again to go on") from None
    except OSError as e:
        raise ValueError(f"cannot write the corpus: {e}; mend that and run the command again to go on") from None


if __name__ == "__main__":
    config.run(main)
