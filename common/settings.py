"""Settings and one-line errors, for every script.

Settings are a dataclass of defaults, overridden by files and --name=value flags in the order of the command line: later
ones win. An override file holds lines of `name = value`. The values are literals: nothing in the file is executed.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import itertools
import os
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is imported. By default, an OpenMP thread that waits for the others spins for milliseconds, even if
# another process needs its core: a training step can take many times as long. This costs 4% (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would print that it starts and stops

SYNONYMS = {  # what other projects call a setting
    "learning_rate": ["lr"],
    "max_iters": ["max_steps"],
    "lr_decay_iters": ["max_steps"],
    "num_iterations": ["max_steps"],
    "warmup_iters": ["warmup_steps"],
    "eval_iters": ["eval_tokens"],
    "gradient_accumulation_steps": ["batch_size", "micro_batch_size"],
    "device_batch_size": ["micro_batch_size"],
    "gradient_checkpointing": ["recompute"],
    "n_ctx": ["block_size"],
    "max_seq_len": ["block_size"],
    "dataset": ["data_dir"],
    "always_save_checkpoint": ["keep_best"],
    "decay_lr": ["min_lr"],
    "backend": ["device"],
    "dropout": [],  # there is none
    "bias": [],
    "wandb_log": ["wandb"],
    "wandb_project": ["wandb"],
    "model": ["init_from"],
    "checkpoint": ["init_from"],
    "out_dir": ["init_from"],
    "start": ["prompt"],
    "input": ["source"],
}


USERS_OS_ERRORS = "EPIPE ENOSPC EDQUOT EIO EACCES EPERM EROFS EMFILE ENAMETOOLONG".split()  # not bugs of ours
SWITCH_VALUES = "true false none yes no on off 0 1".split()  # a word after a bool flag that is its value


class UserError(ValueError):
    """What the user did wrong, in one line: what was found, what was expected, and where it helps, the remedy."""


def reason(error: Exception) -> str:
    """The message of an error, which may have several lines or none, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def stop(number, frame):
    """Handle SIGTERM and SIGHUP, which would end a script without closing its files."""
    raise SystemExit(f"error: stopped by {signal.Signals(number).name}")


def stop_in_imports(kind, error, traceback):
    """Print Ctrl-C as one line even before run(): importing torch takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = stop_in_imports


def run(main: Callable[[], None]):
    """Run a script's main(). A UserError is printed as one line, exit status 1; a bug keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdin, sys.stdout):  # replace what cannot be decoded, or shown
        with contextlib.suppress(AttributeError):  # closed, or not a text file
            stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        main()
        sys.stdout.flush()
    except OSError as e:
        if errno.errorcode.get(e.errno) not in USERS_OS_ERRORS:
            raise
        if e.filename:
            raise SystemExit(f"error: cannot use {e.filename}: {e.strerror}") from None
        # What is printed reaches nobody: its reader went away, as `| head` does, or its file's disk is full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        raise SystemExit(1 if e.errno == errno.EPIPE else f"error: cannot print: {e.strerror}") from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would interrupt the exit
        raise SystemExit("error: stopped") from None
    except UserError as e:
        raise SystemExit(f"error: {e}") from None
    except (MemoryError, RuntimeError) as e:
        kinds = "out of memory|can't allocate memory|size calculation overflowed"
        is_memory = isinstance(e, MemoryError) or re.search(kinds, str(e))
        if not is_memory:
            raise
        found = re.search(r"[Tt](ried to allocate [\d.]+ \w+)", str(e))  # in CUDA's words, Tried
        size = f" (t{found[1]})" if found else ""
        raise SystemExit(f"error: out of memory{size}; use smaller batches or a smaller model") from None


def load(cls: type, argv: list[str] | None = None):
    """An instance of the dataclass `cls`, overridden by argv (default: the command line); prints the overrides.

    argv: paths of override files (ending in .py); --name=value or --name value; --name alone for a bool;
    --name.key=value for an entry of a dict; --help. Any other word is the value of init_from, for a class that has one.
    The result's attribute `overridden` is the set of names that argv set. A UserError names the file or flag at fault.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("--help", "-h")]
    wants_help = len(words) < len(argv)
    hints = {f.name: f.type for f in dataclasses.fields(cls)}
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    kinds = {name: typing.get_args(t) if isinstance(t, types.UnionType) else (t,) for name, t in hints.items()}
    values, models, summary = {}, [], {}
    while words:
        word = words.pop(0)
        if not word.strip():
            raise UserError("an argument is empty; a variable of the shell may be unset")
        if word.startswith("-"):
            overrides = [read_flag(word, words, values, kinds)]
        elif word.endswith(".py"):
            overrides = read_overrides(Path(word))
        elif fault := fault_of(word, kinds, values, models):
            raise UserError(fault)
        else:
            models.append(word)
            overrides = [(word, "init_from", word)]
        for where, name, value in overrides:
            if name not in kinds:
                guesses = SYNONYMS.get(name, difflib.get_close_matches(name, kinds, n=1))
                suggestions = [ours for ours in guesses if ours in kinds]
                hint = f"did you mean {' and '.join(map(repr, suggestions))}?" if suggestions else "--help lists them"
                raise UserError(f"{where}: there is no setting {name!r}; {hint}")
            label = where if where == f"--{name}" else f"{where}: {name}"
            values[name] = convert(value, kinds[name], label)
            entries = values[name] if isinstance(values[name], dict) else {"": values[name]}
            if empty := [key for key, entry in entries.items() if entry == "" and defaults[name] != ""]:
                label += f".{empty[0]}" if empty[0] else ""
                raise UserError(f"{label} is empty; give it a value, or leave it out")
            summary |= {word: word} if word.endswith(".py") else {name: f"{name}={values[name]!r}"}
    if summary and not wants_help:
        print("override:", ", ".join(summary.values()), file=sys.stderr)
    try:
        settings = cls(**values)
    except ValueError as e:  # model.py, which imports nothing from common/, raises no UserError
        raise UserError(str(e)) from None
    if wants_help:
        print(describe(settings))
        raise SystemExit(0)
    settings.overridden = frozenset(values)
    return settings


def fault_of(word: str, kinds: dict, values: dict, models: list[str]) -> str | None:
    """Why a word is neither a flag nor a file; None if it can be the value of init_from."""
    if files := [path for path in (f"{word}.py", f"config/{word}.py") if os.path.isfile(path)]:
        return f"{word!r} is not a file of settings; did you mean {files[0]}?"
    if "=" in word and word.partition("=")[0] in kinds:
        return f"{word!r} is not a flag; did you mean --{word}?"
    if models:
        return f"{models[0]!r} and {word!r} are two models; name one, and put a text with spaces in quotes"
    if "init_from" in kinds:
        return None
    hint = "; name several files by a pattern in quotes: --source='*.txt'" if "source" in values else ""
    if "source" in kinds and "source" not in values and os.path.exists(word):
        hint = f"; did you mean --source={word}?"
    return f"{word!r} is neither a .py file of settings nor a --name=value flag{hint}"


def read_flag(flag: str, words: list[str], values: dict, kinds: dict) -> tuple[str, str, object]:
    """(flag, name, value) of --name=value, --name or --name.key=value. A value without = is taken from `words`."""
    flag, equals, text = flag.partition("=")
    name, _, key = flag.lstrip("-").partition(".")
    if not flag.startswith("--"):
        hint = f"a flag starts with two dashes, --{name}" if name in kinds else "no such flag; --help lists them"
        raise UserError(f"{flag}: {hint}")
    if not equals:
        is_switch = bool in kinds.get(name, [bool])  # load() refuses an unknown name
        if words and (words[0].lower() in SWITCH_VALUES if is_switch else not words[0].startswith("--")):
            text = words.pop(0)
        elif is_switch:
            text = "True"
        else:
            raise UserError(f"{flag} needs a value")
    if not key:
        return flag, name, text
    entries = values.get(name) or {}
    if not isinstance(entries, dict):
        raise UserError(f"{flag}= and --{name}= cannot be combined")
    return f"--{name}", name, {**entries, key: text}


def read_overrides(path: Path) -> Iterator[tuple[str, str, object]]:
    """The assignments of an override file: (file:line, name, value). Values are Python literals."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), filename=str(path))
    except OSError as e:
        suggestions = difflib.get_close_matches(str(path), map(str, Path("config").rglob("*.py")), n=1)
        hint = f"; did you mean {suggestions[0]}?" if suggestions else ""
        raise UserError(f"cannot read {path}: {e.strerror}{hint}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f"{path}: not lines of `name = value` ({str(e) or type(e).__name__})") from None
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}:{node.lineno}"
        try:
            (target,) = node.targets
            yield where, target.id, ast.literal_eval(node.value)
        except (AttributeError, SyntaxError, TypeError, ValueError):
            line = ast.unparse(node).splitlines()[0][:60]
            raise UserError(f"{where}: expected `name = value` with a literal value, found `{line}`") from None


def convert(value, kinds: tuple, label: str):
    """Convert a flag's text or a file's literal to one of these types. Raises UserError, starting with label."""
    literal = value
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{label} has a null character, {value!r:.60}")
    if isinstance(value, str) and type(None) in kinds and value.lower() in ("", "none"):  # --wandb= turns it off
        return None
    if isinstance(value, str) and {str, type(None)} >= set(kinds):  # text is not parsed, whatever it looks like
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, str):
        with contextlib.suppress(SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            literal = ast.literal_eval(value.title() if value.lower() in ("true", "false") else value)
    for kind in sorted(kinds, key=lambda kind: kind is str):  # any text is a str, so try that last
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is str and isinstance(value, str):
            return value
        if kind in (bool, type(None)) and type(literal) is kind:
            return literal
        if kind is float and type(literal) in (int, float) and abs(literal) <= sys.float_info.max:
            return float(literal)
        if kind is int and type(literal) in (int, float) and abs(literal) < 2**63 and literal == int(literal):  # or 1e6
            return int(literal)
        if origin is tuple:
            is_list = isinstance(literal, (tuple, list)) and all(isinstance(name, str) for name in literal)
            text = literal if isinstance(literal, str) else value  # numbers may be names: --domains=1,2
            names = text.split(",") if isinstance(text, str) and not is_list else literal
            if isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names):
                return tuple(filter(None, map(str.strip, names)))  # no text, no names
        if origin is dict and isinstance(literal, dict) and literal and all(isinstance(key, str) for key in literal):
            return {key: convert(entry, args[1:], f"{label}.{key}") for key, entry in literal.items()}
    names = {
        bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None",
        tuple: "comma-separated names", dict: "{'name': value, ...}",
    }  # fmt: skip
    expected = " or ".join(names[typing.get_origin(kind) or kind] for kind in kinds)
    raise UserError(f"{label} takes {expected}, not {repr(literal)[:60]}")


def check_range(settings, low: float, high: float, *names: str):
    """Raise UserError, naming the first, if one of these settings lies outside low..high (inclusive). None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must lie in {low:g}..{high:g}")


def describe(settings) -> str:
    """The --help text: every setting with its value and the comment beside it, under the headings in the source."""
    comments, headings = {}, {}
    for base in reversed(type(settings).__mro__[:-1]):
        heading = base.__name__.removesuffix("Config").lower()
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"(?:    |class .*:  )# (.*)", line):
                heading = match[1]
            elif (match := re.match(r"    (\w+): .*?  # (.*)", line)) and match[1] in vars(settings):
                comments[match[1]] = match[2]
                headings.setdefault(match[1], heading)
    text = inspect.cleandoc(sys.modules[type(settings).__module__].__doc__ or "")
    text += "\n\nSettings, as --name=value or as lines of an override file"
    for heading, names in itertools.groupby(headings, headings.get):
        text += f"\n\n{heading}:"
        for name in names:
            value = getattr(settings, name)
            flag = f"  --{name}={','.join(value) if isinstance(value, tuple) else value}"
            text += "\n" + textwrap.fill(f"{flag:<30}  {comments[name]}", 120, subsequent_indent=" " * 32)
    return text
