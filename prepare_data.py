"""Text to tokens on disk.

python prepare_data.py tiny    the embedded corpus, no network: generated math with worked steps, docstring prose of the
                               installed numpy and torch (stem), the source of Python's standard library (code)

A corpus is data/<corpus>/meta.json and data/<corpus>/<domain>/{train,val}.bin: flat token ids, <|endoftext|> after
every document. A document goes to val by a hash of its text, so that a duplicate never straddles the split.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import config

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass
class PrepareConfig:
    """Settings of every corpus."""

    data_dir: str = "data"  # where the corpora live; each in a folder of its name
    seed: int = 0  # of the generated text
    val_fraction: float = 0.05  # share of the documents that goes to val, from 0 to 1
    math_mb: float = 6.0  # tiny: megabytes of generated math

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")
        if self.math_mb <= 0:
            raise ValueError(f"math_mb is {self.math_mb}; it must be above 0")


# ----------------------------------------------------------------------------------------------------------- tokenizers


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name. "bytes": the 256 bytes, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258.

    Raises ValueError for an unknown name.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"[^\n]+|\n+",  # only cuts the text into short pieces: no two bytes ever merge
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={special: 256 + i for i, special in enumerate(SPECIALS)},
        )
    raise ValueError(f"unknown tokenizer {name!r}; there is: bytes")


# ------------------------------------------------------------------------------------------------------- tokens on disk


def is_held_out(text: str, fraction: float) -> bool:
    """Whether this document belongs to val: a hash of its text, uniform on [0, 1), lies below fraction."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def write_domain(folder: Path, documents: Iterable[str], encoding: tiktoken.Encoding, val_fraction: float) -> dict:
    """Tokenize documents into folder/{train,val}.bin; a file appears under its name only when it is whole and on disk.

    Returns the counts for meta.json: train_tokens, val_tokens, val_bytes (of the text, without <|endoftext|>).
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(encoding.n_vocab)
    counts = {"train_tokens": 0, "val_tokens": 0, "val_bytes": 0}
    partial = {split: folder / f"{split}.bin.partial" for split in ("train", "val")}
    files = {split: open(path, "wb") for split, path in partial.items()}
    for text in documents:
        split = "val" if is_held_out(text, val_fraction) else "train"
        ids = np.array(encoding.encode_ordinary(text) + [encoding.eot_token], dtype=dtype)
        files[split].write(ids.tobytes())
        counts[f"{split}_tokens"] += len(ids)
        if split == "val":
            counts["val_bytes"] += len(text.encode("utf-8", "replace"))
    for split, file in files.items():
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(partial[split], folder / f"{split}.bin")
    return counts


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_meta(folder: Path, encoding: tiktoken.Encoding, domains: dict[str, dict]):
    """Write meta.json, the last file of a corpus: without it the corpus does not count as prepared."""
    meta = {
        "tokenizer": encoding.name,
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding.eot_token,
        "dtype": token_dtype(encoding.n_vocab).name,
        "domains": domains,
    }
    partial = folder / "meta.json.partial"
    partial.write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(partial, folder / "meta.json")


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


def count_bytes(documents: Iterable[str], bar: tqdm) -> Iterator[str]:
    """The same documents, with the bar moving as they pass."""
    for text in documents:
        bar.update(len(text))
        yield text


def prepare_tiny(cfg: PrepareConfig):
    """Write data/tiny; deterministic for the seed and the installed versions."""
    folder = Path(cfg.data_dir) / "tiny"
    encoding = get_tokenizer("bytes")
    sources = {
        "math": (math_documents(cfg.seed, cfg.math_mb * 1e6), f"generated, seed {cfg.seed}"),
        "stem": (stem_documents(), f"docstrings of numpy {version('numpy')} and torch {version('torch')}"),
        "code": (code_documents(), f"standard library of Python {sys.version.split()[0]}"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # not prepared until it is whole again
    domains = {}
    with tqdm(unit="B", unit_scale=True, mininterval=0.5) as bar:
        for domain, (documents, source) in sources.items():
            bar.set_description_str(domain)
            counted = count_bytes(documents, bar)
            domains[domain] = {"source": source, **write_domain(folder / domain, counted, encoding, cfg.val_fraction)}
    write_meta(folder, encoding, domains)
    for domain, counts in domains.items():
        print(
            f"{domain}: {counts['train_tokens']:,} train and {counts['val_tokens']:,} val tokens ({counts['source']})"
        )
    print(f"wrote {folder}; next: python train.py config/tiny.py")


CORPORA: dict[str, Callable[[PrepareConfig], None]] = {"tiny": prepare_tiny}


def main():
    names = " | ".join(CORPORA)
    if len(sys.argv) < 2 or sys.argv[1] not in (*CORPORA, "--help", "-h"):
        given = f"not {sys.argv[1]!r}" if len(sys.argv) > 1 else "none was named"
        config.fail(f"which corpus? python prepare_data.py {names} ({given})")
    cfg = config.load(PrepareConfig, sys.argv[1:] if sys.argv[1] not in CORPORA else sys.argv[2:])
    try:
        CORPORA[sys.argv[1]](cfg)
    except OSError as e:
        config.fail(f"cannot write the corpus: {e}")


if __name__ == "__main__":
    main()
