"""The documents of the embedded corpora: generated arithmetic, docstrings and Python's standard library."""

import ast
import functools
import importlib.util
import inspect
import itertools
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from common.tokenizer import is_held_out

# A family generates one problem: the question, the steps that a person would write, and the answer they lead to.

NAMES = "Ada Ben Chloe David Emma Farid Grace Hugo Iris Jonas Kira Liam Mia Noah".split()
SYSTEMS = ("You are a careful calculator.", "Answer step by step.", "Work it out, then give the answer.")
THINGS = "apples books coins pencils stamps shells marbles cards stickers oranges tickets".split()


def number_facts(rng: random.Random) -> tuple[str, list[str], str]:
    """Sums, differences, products and quotients of single digits."""
    facts = []
    for sign in rng.choices("+-*/", k=6):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        left, result = {"+": (a, a + b), "-": (a + b, a), "*": (a, a * b), "/": (a * b, a)}[sign]
        facts.append((f"{left} {sign} {b}", result))
    steps = [f"{expression} = {result}" for expression, result in facts]
    return f"Work out {', '.join(e for e, _ in facts)}.", steps, ", ".join(str(result) for _, result in facts)


def column_steps(a: int, sign: str, b: int) -> list[str]:
    """a + b or a - b, digit by digit; both below 100. All families but the facts share these steps."""
    if sign == "+":
        result, carry, note = a + b, a % 10 + b % 10 > 9, ", carry 1"
        ones = f"{a % 10} + {b % 10} = {a % 10 + b % 10}"
    else:
        result, carry, note = a - b, a % 10 < b % 10, ", borrow 1"
        ones = f"{a % 10 + 10 * carry} - {b % 10} = {result % 10}"
    tens = f"{a // 10} {sign} {b // 10}{f' {sign} 1' * carry} = {result // 10}"
    return [f"{a} {sign} {b}:", ones + note * carry, tens, f"{a} {sign} {b} = {result}"]


def one_calculation(templates: Sequence[tuple[str, str]], rng: random.Random) -> tuple[str, list[str], str]:
    """A question from one of the templates, whose answer is the sum or difference of two two-digit numbers."""
    sign, template = rng.choice(templates)
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    name, other = rng.sample(NAMES, 2)
    question = template.format(a=a, b=b, name=name, other=other, things=rng.choice(THINGS))
    return question, column_steps(a, sign, b), str(a + b if sign == "+" else a - b)


def sequences(rng: random.Random) -> tuple[str, list[str], str]:
    step, sign = rng.randint(2, 30), rng.choice("+-")
    low = rng.randint(max(10, step), 99 - 2 * step)
    terms = [low, low + step, low + 2 * step][:: 1 if sign == "+" else -1]
    steps = column_steps(max(terms[:2]), "-", min(terms[:2])) + column_steps(terms[2], sign, step)
    return f"What comes next: {', '.join(map(str, terms))}, ...?", steps, steps[-1].split(" = ")[1]


TEMPLATES = {  # family: sign of the calculation, question
    "addition": [("+", "What is {a} + {b}?")],
    "subtraction": [("-", "What is {a} - {b}?")],
    "equations": [
        ("-", "Solve x + {b} = {a} for x."),
        ("+", "Solve x - {b} = {a} for x."),
        ("-", "Solve {a} - x = {b} for x."),
    ],
    "word problems": [
        ("+", "{name} has {a} {things}. {other} gives {name} {b} more. How many does {name} have now?"),
        ("+", "{name} has {a} {things} and {other} has {b}. How many do they have together?"),
        ("-", "{name} has {a} {things} and loses {b}. How many are left?"),
        ("-", "{name} has {a} {things} and {other} has {b}. How many more does {name} have?"),
    ],
}
FAMILIES: dict[str, Callable[[random.Random], tuple]] = {"number facts": number_facts, "sequences": sequences}
FAMILIES |= {family: functools.partial(one_calculation, templates) for family, templates in TEMPLATES.items()}


def question_numbers(text: str) -> str:
    """The sorted numbers of a problem's first line, the same for 46 - 12, x + 12 = 46 and a story of 46 and 12."""
    return " ".join(sorted(re.findall(r"\d+", text.partition("\n")[0])))


def is_reserved(question: str) -> bool:
    """Whether a question is kept out of all training data and val, for eval.py: by its numbers, whatever the words."""
    return is_held_out(f"reserved {question_numbers(question)}", 0.1)  # a different hash from the split's


def problems(seed: int, reserved: bool, limit: int | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Distinct problems, the families in turn: (family, question, worked steps ending in the answer, answer).

    Either all questions are reserved, or none is and no step computes a reserved sum or difference. A family ends after
    `limit` problems, or when it finds no new one.
    """
    rng, seen, remaining = random.Random(seed), set(), dict.fromkeys(FAMILIES, limit or float("inf"))
    while any(remaining.values()):
        for family, generate in FAMILIES.items():
            for _ in range(2000 if remaining[family] else 0):
                question, steps, answer = generate(rng)
                calculations = [] if reserved else re.findall(r"\d\d [-+] \d\d =", "; ".join(steps))
                if question not in seen and all(is_reserved(x) == reserved for x in (question, *calculations)):
                    seen.add(question)
                    remaining[family] -= 1
                    yield family, question, "".join(f"{step}\n" for step in steps) + f"Answer: {answer}", answer
                    break
            else:
                remaining[family] = 0


def math_documents(seed: int, size: float) -> Iterator[str]:
    """Solved problems, `size` bytes of them."""
    total, source = 0, problems(seed, reserved=False)
    while total < size:
        _, question, worked, _ = next(source)
        text = f"Problem: {question}\n{worked}\n"
        yield text
        total += len(text)


def math_conversations(seed: int, size: float, val_fraction: float) -> Iterator[list[dict[str, str]]]:
    """Questions and worked answers, `size` bytes of them. One in eight has a system message; some have two turns."""
    rng, total, source = random.Random(seed), 0, problems(seed, reserved=False)
    while total < size:
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 1 / 8 else []
        splits = set()  # of the problems; both turns belong to one
        for _, question, worked, _ in itertools.islice(source, 1 + (rng.random() < 1 / 4)):
            turn = [{"role": "user", "content": question}, {"role": "assistant", "content": worked}]
            length = sum(len(message["content"]) for message in messages + turn)
            splits.add(is_held_out(question_numbers(question), val_fraction))
            if len(messages) < 2 or (length <= 180 and len(splits) == 1):  # 180: two fit the context of tiny_sft.py
                messages += turn
        yield messages
        total += sum(len(message["content"]) for message in messages)


def docstring_prose(path: Path) -> list[str]:
    """Docstrings of a Python file, and strings passed to add_docstr() and the like; without examples or short ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []  # written for a newer Python
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            texts.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and "doc" in getattr(node.func, "id", getattr(node.func, "attr", "")):
            constants = [inner for arg in node.args for inner in ast.walk(arg) if isinstance(inner, ast.Constant)]
            texts += [inspect.cleandoc(constant.value) for constant in constants if isinstance(constant.value, str)]
    prose = [re.sub(r"^ *>>>.*\n(?:.*\S.*\n?)*", "", text + "\n", flags=re.M).strip() for text in texts]
    return [text + "\n" for text in prose if len(text) >= 200]


def stem_documents() -> Iterator[str]:
    """Distinct docstrings of the installed numpy and torch, in the order of their files."""
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    paths = [path for root in roots for path in sorted(root.rglob("*.py"))]
    yield from dict.fromkeys(itertools.chain.from_iterable(map(docstring_prose, paths)))


def code_documents() -> Iterator[str]:
    """The files of Python's standard library, without tests, character tables and generated topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths = [path for path in sorted(root.rglob("*.py")) if not excluded.intersection(path.relative_to(root).parts)]
    return filter(str.strip, (path.read_text(encoding="utf-8", errors="replace") for path in paths))


def word_runs(text: bytes) -> set[int]:
    """Hashes of all runs of 13 words."""
    words = text.split()
    return {hash(tuple(words[i : i + 13])) for i in range(len(words) - 12)}


def without_repeats(documents: Iterable[str], val_fraction: float) -> Iterator[str]:
    """All of val, and what of train shares no run of 13 words with it. Docstrings often repeat each other."""
    documents = [(text, is_held_out(text, val_fraction)) for text in documents]
    held_out = {run for text, in_val in documents if in_val for run in word_runs(text.encode())}
    return (text for text, in_val in documents if in_val or held_out.isdisjoint(word_runs(text.encode())))


def describe(share: float, folder: Path, counts: dict) -> dict:
    """A domain's entry in meta.json: its share of a step, its counts, and the share of val's 13-word runs in train."""
    runs = {}
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"{split}.bin", np.uint16)  # bytes, and special tokens
        texts = np.where(tokens < 256, tokens, 0).astype(np.uint8).tobytes().split(b"\0")
        runs[split] = set().union(*map(word_runs, texts))
    repeated = len(runs["train"] & runs["val"]) / max(1, len(runs["val"]))
    print(f"{folder.name}: {repeated:.1%} of held-out 13-word runs occur in train")
    return {"share": share, **counts, "val_runs_in_train": repeated}
