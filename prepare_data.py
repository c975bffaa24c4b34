"""Text to tokens on disk.

python prepare_data.py tiny    the embedded corpus, no network: generated math with worked steps, docstring prose of the
                               installed numpy and torch (stem), the source of Python's standard library (code)

python prepare_data.py pretrain
                               the paper's three data sets, streamed from the hub, in the tokens of Qwen3
python prepare_data.py pretrain --source.math='dumps/*.parquet' --max_tokens=1e8
                               the same from local files, up to a number of tokens a domain

A corpus is data/<corpus>/meta.json and data/<corpus>/<domain>/{train,val}.bin: flat token ids, <|endoftext|> after
every document. A document goes to val by a hash of its text, so that a duplicate never straddles the split. A
preparation that was killed goes on where it was when it is run again.
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
from collections.abc import Callable, Iterable, Iterator
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
    seed: int = 0  # tiny: of the generated text
    math_mb: float = 6.0  # tiny: megabytes of generated math
    val_fraction: float | None = None  # share of the documents that goes to val; None: tiny 0.05, pretrain 0.001
    max_tokens: int | None = None  # pretrain: train tokens of each domain; None: the paper's, 7.0, 2.5 and 0.5 billion
    source: dict[str, str] = field(default_factory=dict)  # pretrain: local files, --source.math=x/*.parquet
    text_field: dict[str, str] = field(default_factory=dict)  # pretrain: --text_field.math=name, where it is another
    commit_seconds: float = 2.0  # between records of how far a preparation has come, from which it can go on
    vocab: str | None = None  # pretrain: vocab.json of the Qwen3 tokenizer; None: from the hub, kept in its cache

    def __post_init__(self):
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")
        if self.math_mb <= 0:
            raise ValueError(f"math_mb is {self.math_mb}; it must be above 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        for name in (*self.source, *self.text_field):
            if name not in PRETRAIN:
                raise ValueError(f"there is no domain {name!r}; there are {', '.join(PRETRAIN)}")


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
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # not a line for every retry
    try:
        return huggingface_hub.hf_hub_download("Qwen/Qwen3-0.6B-Base", "vocab.json")
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


# ------------------------------------------------------------------------------------------------------- tokens on disk


def is_held_out(text: str, fraction: float) -> bool:
    """Whether this document belongs to val: a hash of its text, uniform on [0, 1), lies below fraction."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


Batches = Iterator[tuple[list[str], object]]  # documents, and the state (plain values) from which to go on after them


def in_batches(documents: Iterable[str], state: int | None, size: int = 256) -> Batches:
    """Batches of documents that can be made again from the start; the state is how many have been taken."""
    taken = state or 0
    documents = itertools.islice(documents, taken, None)
    while batch := list(itertools.islice(documents, size)):
        taken += len(batch)
        yield batch, taken


def write_domain(
    folder: Path,
    open_batches: Callable[[object], Batches],
    encoding: tiktoken.Encoding,
    val_fraction: float,
    made_of: dict,
    max_tokens: int | None = None,
    commit_seconds: float = 2.0,
) -> dict:
    """Tokenize documents into folder/{train,val}.bin, up to the document that completes max_tokens of train.

    Tokens go to *.bin.partial; every commit_seconds they are flushed to disk and progress.json records their reach.
    Killed at any moment and called again with the same made_of (what decides the tokens), it goes on from there; the
    bytes are those of an unbroken run. A .bin appears only whole. Returns the counts for meta.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress_path, dtype = folder / "progress.json", token_dtype(encoding.n_vocab)
    partial = {split: folder / f"{split}.bin.partial" for split in ("train", "val")}
    counts = {"train_tokens": 0, "val_tokens": 0, "val_bytes": 0}
    progress = {"made_of": made_of, "state": None, "finished": False, **counts}
    with contextlib.suppress(OSError, ValueError):  # no progress yet, or its files are gone
        before = json.loads(progress_path.read_text())
        reached = {
            split: max(p.stat().st_size for p in (path, path.with_suffix("")) if p.exists())
            for split, path in partial.items()
        }
        wanted = {split: before[f"{split}_tokens"] * dtype.itemsize for split in partial}
        whole = reached == wanted if before["finished"] else all(reached[s] >= wanted[s] for s in partial)
        if whole and before["made_of"] == json.loads(json.dumps(made_of)):
            progress = before
    if not progress["finished"]:
        batches = open_batches(progress["state"])
        first = list(itertools.islice(batches, 1))  # until there is something new, nothing earlier is removed
        if progress["state"] is None:
            progress_path.unlink(missing_ok=True)  # before its tokens: it must never speak of others
        (folder.parent / "meta.json").unlink(missing_ok=True)
        for path in partial.values():
            path.with_suffix("").unlink(missing_ok=True)
            path.touch()
        bar = tqdm(desc=folder.name, total=max_tokens, initial=progress["train_tokens"], unit="tok", unit_scale=True)
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
            files = {split: stack.enter_context(open(path, "r+b")) for split, path in partial.items()}
            for split, file in files.items():
                file.truncate(progress[f"{split}_tokens"] * dtype.itemsize)
                file.seek(0, os.SEEK_END)
            stack.enter_context(bar)
            committed = time.monotonic()
            for texts, state in itertools.chain(first, batches):
                written = {"train": [], "val": []}
                for text, ids in zip(texts, pool.map(functools.partial(encode, encoding), texts)):
                    if max_tokens and progress["train_tokens"] >= max_tokens:
                        break
                    split = "val" if is_held_out(text, val_fraction) else "train"
                    written[split] += [ids, [encoding.eot_token]]
                    progress[f"{split}_tokens"] += len(ids) + 1
                    progress["val_bytes"] += len(text.encode("utf-8", "replace")) if split == "val" else 0
                    bar.update(len(ids) + 1 if split == "train" else 0)
                for split, parts in written.items():
                    files[split].write(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype).tobytes())
                progress["state"] = state
                full = max_tokens and progress["train_tokens"] >= max_tokens
                if full or time.monotonic() - committed >= commit_seconds:
                    commit(files, progress, progress_path)
                    committed = time.monotonic()
                if full:
                    break
            progress["finished"] = True
            commit(files, progress, progress_path)
    for path in partial.values():
        if path.exists():
            os.replace(path, path.with_suffix(""))
    return {name: progress[name] for name in counts}


def commit(files: dict[str, BinaryIO], progress: dict, path: Path):
    """Flush the files to disk, then record that they reach as far as progress says."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_json(path, progress)


def write_json(path: Path, value: dict):
    config.write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def prepare(folder: Path, encoding: tiktoken.Encoding, domains: dict[str, Callable[[], dict]]):
    """Write every domain, then meta.json: without it a corpus does not count as prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    with config.claimed(folder):
        counts = {name: write() for name, write in domains.items()}
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
    print(f"wrote {folder}; next: python train.py config/{folder.name}.py")


# -------------------------------------------------------------------------------------------------- tiny: math problems
# A family makes one problem: question, the steps a person would write, answer. The answer is reached by the steps, and
# checked against the definition of the operation before it is handed out.

Problem = tuple[str, list[str], str]
NAMES = (
    "Ada",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Liam",
    "Mia",
    "Noah",
)
THINGS = (
    "apples",
    "books",
    "coins",
    "pencils",
    "stamps",
    "shells",
    "marbles",
    "cards",
    "stickers",
    "oranges",
    "tickets",
)


def number(rng: random.Random, digits: int) -> int:
    """A number of up to that many digits, every length equally likely."""
    n = rng.randint(1, digits)
    return rng.randint(10 ** (n - 1), 10**n - 1)


def check(holds: bool, problem: str):
    """A generated answer that is wrong is a bug of this file."""
    if not holds:
        raise AssertionError(f"the generator got this wrong: {problem}")


PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands")


def addition(rng: random.Random) -> Problem:
    a, b = number(rng, 4), number(rng, 4)
    steps, carry, result = [], 0, 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        digit, carry = total % 10, total // 10
        result += digit * 10**place
        rest = f"write {digit}, carry {carry}" if carry else f"write {digit}"
        steps.append(f"{PLACES[place]}: {x} + {y}{carried} = {total}, {rest}")
    result += carry * 10 ** (place + 1)
    if carry:
        steps.append(f"write the carried {carry} in front")
    check(result == a + b, f"{a} + {b}")
    return f"What is {a} + {b}?", [*steps, f"{a} + {b} = {result}"], str(result)


def subtraction(rng: random.Random) -> Problem:
    b, a = sorted((number(rng, 4), number(rng, 4)))
    steps, borrow, result = [], 0, 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        borrowed = f" - {borrow}" if borrow else ""
        difference = x - y - borrow
        borrow = int(difference < 0)
        digit = difference + 10 * borrow
        result += digit * 10**place
        ten = "10 + " if borrow else ""
        rest = f"write {digit}, borrow 1" if borrow else f"write {digit}"
        steps.append(f"{PLACES[place]}: {ten}{x} - {y}{borrowed} = {digit}, {rest}")
    check(result == a - b, f"{a} - {b}")
    return f"What is {a} - {b}?", [*steps, f"{a} - {b} = {result}"], str(result)


def multiplication(rng: random.Random) -> Problem:
    a, b = number(rng, 3), number(rng, 2)
    parts = [(int(d) * 10 ** (len(str(b)) - 1 - i)) for i, d in enumerate(str(b)) if d != "0"]
    steps = [f"{b} = {' + '.join(map(str, parts))}"] if len(parts) > 1 else []
    products, result = [], 0
    for part in parts:
        products.append(a * part)
        steps.append(f"{a} * {part} = {a * part}")
    for product in products:
        if result:
            steps.append(f"{result} + {product} = {result + product}")
        result += product
    check(result == a * b, f"{a} * {b}")
    return f"What is {a} * {b}?", [*steps, f"{a} * {b} = {result}"], str(result)


def division(rng: random.Random) -> Problem:
    a, b = number(rng, 4), rng.randint(2, 12)
    steps, quotient, rest = [], 0, 0
    for digit in str(a):
        part = 10 * rest + int(digit)
        times, rest = divmod(part, b)
        if times or quotient:
            steps.append(
                f"{part} / {b}: {times} times, since {times} * {b} = {times * b}; {part} - {times * b} = {rest} is left"
            )
        quotient = 10 * quotient + times
    if not steps:
        steps.append(f"{a} is less than {b}, so {b} goes 0 times")
    check(quotient * b + rest == a and 0 <= rest < b, f"{a} / {b}")
    check_line = f"check: {quotient} * {b} + {rest} = {a}"
    return f"Divide {a} by {b}, with remainder.", [*steps, check_line], f"{quotient} remainder {rest}"


def fraction(rng: random.Random) -> Problem:
    b, d = rng.randint(2, 12), rng.randint(2, 12)
    a, c = rng.randint(1, b), rng.randint(1, d)
    sign = rng.choice("+-")
    if sign == "-" and a * d < c * b:
        a, b, c, d = c, d, a, b
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    top = x + y if sign == "+" else x - y
    divisor = math.gcd(top, common)
    n, m = top // divisor, common // divisor
    steps = [
        f"common denominator of {b} and {d}: {common}",
        f"{a}/{b} = {x}/{common} and {c}/{d} = {y}/{common}",
        f"{x} {sign} {y} = {top}, so {top}/{common}",
    ]
    answer = str(n) if m == 1 else f"{n}/{m}"
    if divisor > 1:
        steps.append(f"divide both by {divisor}: {answer}")
    check(n * b * d == m * (a * d + c * b if sign == "+" else a * d - c * b), f"{a}/{b} {sign} {c}/{d}")
    return f"What is {a}/{b} {sign} {c}/{d}?", steps, answer


def linear_equation(rng: random.Random) -> Problem:
    a, b, x = rng.randint(2, 12), rng.randint(1, 60), rng.randint(-20, 20)
    sign, inverse, verb = rng.choice((("+", "-", "subtract"), ("-", "+", "add")))
    c = a * x + b if sign == "+" else a * x - b
    right = c - b if sign == "+" else c + b
    check(right == a * x and right % a == 0, f"{a}x {sign} {b} = {c}")
    steps = [
        f"{verb} {b} on both sides: {a}x = {c} {inverse} {b} = {right}",
        f"divide both sides by {a}: x = {right} / {a} = {right // a}",
    ]
    return f"Solve {a}x {sign} {b} = {c} for x.", steps, f"x = {right // a}"


def sequence(rng: random.Random) -> Problem:
    start, step, length = rng.randint(1, 50), rng.randint(2, 15), 4
    if rng.random() < 0.6:
        down = rng.random() < 0.3
        start = start + step * length if down else start
        terms = [start + (-step if down else step) * i for i in range(length + 1)]
        differences = ", ".join(f"{b} - {a} = {b - a}" for a, b in zip(terms[:-1], terms[1:-1]))
        how = f"subtract {step}" if down else f"add {step}"
        last = f"{terms[-2]} - {step} = {terms[-1]}" if down else f"{terms[-2]} + {step} = {terms[-1]}"
        steps = [f"differences: {differences}", f"the rule is: {how}", last]
        check(len({b - a for a, b in zip(terms, terms[1:])}) == 1, str(terms))
    else:
        start, ratio = rng.randint(1, 12), rng.randint(2, 4)
        terms = [start * ratio**i for i in range(length + 1)]
        ratios = ", ".join(f"{b} / {a} = {b // a}" for a, b in zip(terms[:-1], terms[1:-1]))
        steps = [f"ratios: {ratios}", f"the rule is: multiply by {ratio}", f"{terms[-2]} * {ratio} = {terms[-1]}"]
        check(all(b == a * ratio for a, b in zip(terms, terms[1:])), str(terms))
    return f"What comes next: {', '.join(map(str, terms[:-1]))}, ...?", steps, str(terms[-1])


def greatest_common_divisor(rng: random.Random) -> Problem:
    factor = rng.randint(1, 12)
    a, b = sorted((factor * rng.randint(2, 40), factor * rng.randint(2, 40)), reverse=True)
    x, y, steps = a, b, []
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    steps.append(f"nothing is left, so the answer is {x}")
    check(x == math.gcd(a, b), f"gcd({a}, {b})")
    return f"What is the greatest common divisor of {a} and {b}?", steps, str(x)


def percentage(rng: random.Random) -> Problem:
    percent = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90))
    base = 20 * rng.randint(1, 50)
    tens, fives = divmod(percent, 10)
    tenth, steps, result = base // 10, [], 0
    if tens:
        steps.append(f"10% of {base} is {base} / 10 = {tenth}")
        result = tens * tenth
        if tens > 1:
            steps.append(f"{10 * tens}% is {tens} * {tenth} = {result}")
    if fives:
        half = base // 20
        steps.append(f"5% of {base} is {base} / 20 = {half}")
        if tens:
            steps.append(f"{percent}% is {result} + {half} = {result + half}")
        result += half
    check(result * 100 == percent * base, f"{percent}% of {base}")
    return f"What is {percent}% of {base}?", steps, str(result)


def word_problem(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        c = rng.randint(1, a + b - 1)
        question = (
            f"{name} has {a} {thing}. {other} gives {name} {b} more. {name} then loses {c}. How many {thing} are left?"
        )
        answer = a + b - c
        steps = [f"after the gift: {a} + {b} = {a + b}", f"after the loss: {a + b} - {c} = {answer}"]
        holds = answer + c - b == a
    elif kind == 1:
        boxes, each, extra = rng.randint(2, 12), rng.randint(2, 20), rng.randint(1, 30)
        question = f"{name} fills {boxes} boxes with {each} {thing} each and has {extra} left. How many {thing} in all?"
        packed, answer = boxes * each, boxes * each + extra
        steps = [f"in the boxes: {boxes} * {each} = {packed}", f"with the rest: {packed} + {extra} = {answer}"]
        holds = divmod(answer - extra, each) == (boxes, 0)
    elif kind == 2:
        friends, answer = rng.randint(2, 12), rng.randint(2, 20)
        total = friends * answer
        question = (
            f"{name} shares {total} {thing} equally among {friends} friends. How many {thing} does each friend get?"
        )
        steps = [f"{total} / {friends} = {answer}"]
        holds = divmod(total, friends) == (answer, 0)
    else:
        price, count = rng.randint(2, 15), rng.randint(2, 12)
        paid = price * count + rng.randint(1, 50)
        question = f"{name} buys {count} {thing} at {price} euros each and pays {paid} euros. How much change is due?"
        cost, answer = count * price, paid - count * price
        steps = [f"the price: {count} * {price} = {cost}", f"the change: {paid} - {cost} = {answer}"]
        holds = divmod(paid - answer, price) == (count, 0)
    check(holds, question)
    return question, steps, str(answer)


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
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


def math_documents(seed: int, size: float) -> Iterator[str]:
    """Distinct solved problems of all families in turn, until they hold `size` bytes."""
    rng, seen, written = random.Random(seed), set(), 0
    while written < size:
        for family in FAMILIES.values():
            question, steps, answer = family(rng)
            if question in seen:
                continue
            seen.add(question)
            text = f"Problem: {question}\n" + "".join(f"- {step}\n" for step in steps) + f"Answer: {answer}\n"
            written += len(text)
            yield text


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


def prepare_tiny(cfg: PrepareConfig):
    """Write data/tiny; deterministic for the seed and the installed versions."""
    folder, encoding, fraction = Path(cfg.data_dir) / "tiny", get_tokenizer("bytes"), cfg.val_fraction or 0.05
    sources = {
        "math": (lambda: math_documents(cfg.seed, cfg.math_mb * 1e6), f"generated, {cfg.math_mb} MB, seed {cfg.seed}"),
        "stem": (stem_documents, f"docstrings of numpy {version('numpy')} and torch {version('torch')}"),
        "code": (code_documents, f"standard library of Python {sys.version.split()[0]}"),
    }

    def write(domain: str) -> dict:
        documents, source = sources[domain]
        code = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()  # a new generator, new problems
        made_of = {"source": source, "val_fraction": fraction, "code": code}
        opened = lambda state: in_batches(documents(), state)  # noqa: E731
        return {"source": source, **write_domain(folder / domain, opened, encoding, fraction, made_of)}

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in sources})


# ------------------------------------------------------------------------------------------------ pretrain: the hub


class HubData(NamedTuple):
    """Where the documents of a domain come from, and how many tokens of them the paper takes."""

    dataset: str
    subset: str | None
    split: str
    text_field: str
    tokens: int
    revision: str | None = None  # commit on the hub; None: the newest


PRETRAIN = {
    "math": HubData("nvidia/Nemotron-CC-Math-v1", "4plus", "train", "text", 7_000_000_000),
    "stem": HubData("openbmb/Ultra-FineWeb", None, "en", "content", 2_500_000_000),
    "code": HubData("lumees/github-code-2025-language-split", "python", "train", "content", 500_000_000),
}
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
                config.fail(f"{source.dataset} is gated: accept its terms on its page, then log in: hf auth login")
            config.fail(f"cannot open {source.dataset}: {' '.join(str(e).split())[:300]}")
        except ConnectionError:
            config.fail(f"the hub cannot be reached for {source.dataset}; local files go in with --source.<domain>=")
        except ValueError as e:  # no such subset or split
            config.fail(f"cannot open {source.dataset}: {' '.join(str(e).split())[:300]}")
    files = sorted(glob.glob(source, recursive=True))
    if not files:
        config.fail(f"no file matches {source}")
    reader = READERS.get(Path(files[0]).suffix)
    if reader is None or any(READERS.get(Path(file).suffix) != reader for file in files):
        config.fail(f"{source}: files of one kind are needed, {', '.join(READERS)}")
    options = {"sample_by": "document"} if reader == "text" else {}
    return datasets.load_dataset(reader, data_files=files, split="train", streaming=True, **options)


def pinned(source: HubData, progress: Path) -> HubData:
    """The data set at one commit: that of the preparation under way, else the newest, so that all of it is of one."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        before = HubData(*json.loads(progress.read_text())["made_of"]["source"])
        if before.revision and before._replace(revision=None) == source:
            return before
    import huggingface_hub

    try:
        return source._replace(revision=huggingface_hub.HfApi().dataset_info(source.dataset).sha)
    except huggingface_hub.errors.RepositoryNotFoundError as e:  # gated ones, without a login, among them
        config.fail(f"cannot open {source.dataset}: {' '.join(str(e).split())[:300]}")
    except Exception:  # of the hub's own HTTP library, whichever that is
        config.fail(f"the hub cannot be reached for {source.dataset}; local files go in with --source.<domain>=")


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what goes wrong while a data set is read into one line."""
    try:
        yield
    except Exception as e:  # a lost connection or a damaged file: each library has its own kinds
        config.fail(f"cannot read {where}: {' '.join(str(e).split())[:200]}; run the command again to go on")


def streamed(source: str | HubData, text_field: str, state: dict | None, size: int = 256) -> Batches:
    """Batches of one field of a data set, from the start or from an earlier state; rows without text are left out.

    Ends the script with one line if there is no such field, or if the data cannot be read on.
    """
    where = source.dataset if isinstance(source, HubData) else source
    with reading(where):
        stream = open_dataset(source)
        if state:
            stream.load_state_dict(state)
        batches = stream.iter(batch_size=size)
    while True:
        with reading(where):
            batch = next(batches, None)
        if batch is None:
            return
        if text_field not in batch:
            config.fail(f"{where} has no field {text_field!r} but {', '.join(batch)}; name one: --text_field.<domain>=")
        yield [text for text in batch[text_field] if isinstance(text, str)], stream.state_dict()


def prepare_pretrain(cfg: PrepareConfig):
    """Write data/pretrain from the paper's data sets, or from local files; can be killed and run again."""
    try:
        encoding = get_tokenizer("qwen3", cfg.vocab)
    except ValueError as e:
        config.fail(str(e))
    folder, fraction = Path(cfg.data_dir) / "pretrain", cfg.val_fraction or 0.001
    vocab_hash = hashlib.blake2b(b"".join(encoding.token_byte_values()), digest_size=8).hexdigest()

    def write(domain: str) -> dict:
        hub = PRETRAIN[domain]
        source = cfg.source.get(domain) or pinned(hub, folder / domain / "progress.json")
        text_field = cfg.text_field.get(domain, hub.text_field)
        if domain in cfg.source and source.endswith(".txt"):
            text_field = "text"
        max_tokens = cfg.max_tokens or hub.tokens
        local = [] if isinstance(source, HubData) else sorted(glob.glob(source, recursive=True))
        made_of = {
            "source": source, "files": [(path, os.path.getsize(path)) for path in local], "text_field": text_field,
            "val_fraction": fraction, "max_tokens": max_tokens, "vocab": vocab_hash,
        }  # fmt: skip
        opened = functools.partial(streamed, source, text_field)
        counts = write_domain(folder / domain, opened, encoding, fraction, made_of, max_tokens, cfg.commit_seconds)
        return {"source": f"{hub.dataset} at {source.revision}" if isinstance(source, HubData) else source, **counts}

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in PRETRAIN})


CORPORA: dict[str, Callable[[PrepareConfig], None]] = {"tiny": prepare_tiny, "pretrain": prepare_pretrain}


def main():
    names = " | ".join(CORPORA)
    if len(sys.argv) < 2 or sys.argv[1] not in (*CORPORA, "--help", "-h"):
        given = f"not {sys.argv[1]!r}" if len(sys.argv) > 1 else "none was named"
        config.fail(f"which corpus? python prepare_data.py {names} ({given})")
    cfg = config.load(PrepareConfig, sys.argv[1:] if sys.argv[1] not in CORPORA else sys.argv[2:])
    try:
        CORPORA[sys.argv[1]](cfg)
    except KeyboardInterrupt:
        config.fail("stopped; run the command again to go on")
    except OSError as e:
        config.fail(f"cannot write the corpus: {e}; mend that and run the command again to go on")


if __name__ == "__main__":
    config.run(main)
