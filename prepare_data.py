"""Text to tokens on disk.

python prepare_data.py text --source=input.txt
                                 your own text: .txt, .md, .jsonl, .parquet; also --source='*.txt' or a.txt,b.md
python prepare_data.py tiny      the embedded corpus, no network needed: generated math with worked steps (math),
                                 docstrings of the installed numpy and torch (stem), Python's standard library (code)
python prepare_data.py tiny_sft  math questions and answers as conversations
python prepare_data.py pretrain  the paper's three data sets, streamed from the hub, in Qwen3's tokens
python prepare_data.py pretrain --source.math='dumps/*.parquet' --max_tokens=1e8
                                 math from local files instead, and at most 1e8 train tokens of each domain
python prepare_data.py sft       the paper's conversations; with --source='dumps/*.jsonl', local ones

A corpus is data/<corpus>/meta.json and data/<corpus>/<domain>/{train,val}.bin: flat token ids, <|endoftext|> after
every document. Conversations also have {train,val}.mask: one byte per token, 1 where loss is taken. A hash of the text
(a conversation's first question, a generated problem's numbers) selects the split, so duplicates never straddle it.
To resume a killed preparation, run the same command again.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from common.run import locked, write_json
from common.settings import UserError, check_range, load, run
from common.tokenizer import encode, encode_chat, get_tokenizer, is_held_out, text_hash


@dataclass
class PrepareConfig:  # every corpus
    data_dir: str = "data"  # parent folder; each corpus is a folder in it
    val_fraction: float = 0.001  # fraction of the documents held out in val
    commit_seconds: float = 2.0  # seconds between commits; a killed preparation resumes from the last one

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")


@dataclass
class TinyConfig(PrepareConfig):  # tiny and tiny_sft
    val_fraction: float = 0.05  # fraction of the documents held out in val
    seed: int = 0  # random seed of the generated text
    math_mb: float = 3.0  # megabytes of generated math
    max_length: int = 256  # tiny_sft: maximum tokens per conversation; longer ones are cut
    tokenizer: ClassVar = "bytes"
    vocab: ClassVar = None


@dataclass
class FilesConfig(PrepareConfig):  # text, pretrain and sft
    tokenizer: str = "qwen3"  # qwen3, gpt2 or bytes; for sft, that of the model to fine-tune
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    encoding: str | None = None  # encoding of .txt and .md files that are not UTF-8, for example latin-1


@dataclass
class TextConfig(FilesConfig):  # text
    val_fraction: float = 0.1  # fraction of each domain's distinct documents held out in val
    tokenizer: str = "bytes"  # bytes, gpt2 or qwen3
    source: dict[str, str] | str = field(default_factory=dict)  # a.txt, '*.md' or both; by domain: --source.poems=
    domain: str = "text"  # name of the domain that --source= makes
    text_field: str = "text"  # name of the text field in .jsonl and .parquet files
    max_length: int = 16_384  # maximum characters of a document; a longer text is cut into several, at blank lines


@dataclass
class PretrainConfig(FilesConfig):  # pretrain
    max_tokens: int | None = None  # train tokens of each domain; None: the paper's, 7e9 math, 2.5e9 stem, 5e8 code
    source: dict[str, str] = field(default_factory=dict)  # local files by domain: --source.math='dumps/*.parquet'
    text_field: dict[str, str] = field(default_factory=dict)  # name of the text field by domain: --text_field.math=name


@dataclass
class SFTDataConfig(FilesConfig):  # sft
    max_tokens: int | None = None  # train tokens; None: the whole data set
    source: str | None = None  # local files with a messages field, 'dumps/*.jsonl' or .parquet; None: the paper's
    messages_field: str = "messages"  # name of the field that lists the messages, {"role": ..., "content": ...}
    max_length: int = 4096  # maximum tokens per conversation; longer ones are cut


# -------------------------------------------------------------------------------------------------- documents to tokens


class Document(NamedTuple):
    tokens: np.ndarray = np.empty(0, np.uint32)  # [n] uint32, <|endoftext|> last; none: the document is left out
    text: str = ""  # of a conversation, its first question; a hash of Source.split_key(text) selects the split
    loss_mask: np.ndarray | None = None  # [n] uint8, 1 where loss is taken; None: everywhere
    note: str | None = None  # counted, and printed at the end


def encode_document(encoding: tiktoken.Encoding, text: str | None) -> Document:
    if not isinstance(text, str):  # a row without text
        return Document()
    return Document(np.append(encode(encoding, text), np.uint32(encoding.eot_token)), text)


def encode_conversation(encoding: tiktoken.Encoding, max_length: int, messages: list[dict]) -> Document:
    """A conversation, cut to max_length tokens. Without an answer to learn it is left out; the note says why.

    The user's first message selects the split: data sets hold many solutions of one problem.
    """
    try:
        if not isinstance(messages, list):
            raise UserError("messages that are not a list")
        tokens, loss_mask = encode_chat(encoding, messages)
        if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
            raise UserError("an assistant message without text")
        if not loss_mask.any():
            raise UserError("no assistant message")
        if not loss_mask[: max_length - 1].any():
            raise UserError(f"no answer within {max_length} tokens")
    except UserError as e:
        return Document(note=f"left out: {str(e)[:60]}")
    questions = [m["content"].strip() for m in messages if m["role"] == "user"]
    question = questions[0] if questions else messages[0]["content"]
    if len(tokens) <= max_length:
        return Document(tokens, question, loss_mask)
    kept = np.r_[: max_length - 1, -1]  # the last one is <|endoftext|>
    return Document(tokens[kept], question, loss_mask[kept], f"cut to {max_length} tokens")


# ------------------------------------------------------------------------------------------------------ tokens on disk

Batches = Iterator[tuple[list, object]]  # texts or conversations, and the JSON state from which to resume after them


class Source(NamedTuple):  # of a domain's documents
    name: str  # in meta.json and messages
    open_batches: Callable[[object], Batches]  # the documents from a state on; None is the start
    fingerprint: dict  # differs where the documents may differ
    val_fraction: float
    split_key: Callable[[str], str] = str  # documents whose text has the same key are all in train or all in val
    max_tokens: int | None = None  # of train; None: no limit
    max_length: int | None = None  # tokens of a conversation; None: the documents are texts
    describe: Callable[[Path, dict], dict] = lambda folder, counts: counts  # the domain's entry in meta.json


def in_batches(open_documents: Callable[[], Iterable], state: int | None, size: int = 256) -> Batches:
    """Batches of documents that can be read again from the start; the state is the number already taken."""
    taken = state or 0
    documents = itertools.islice(open_documents(), taken, None)
    while batch := list(itertools.islice(documents, size)):
        taken += len(batch)
        yield batch, taken


def read_progress(folder: Path, fingerprint: dict, names: list[str]) -> dict:
    """progress.json if it describes documents with this fingerprint and the files hold what it says, else a start."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no progress, or a file is missing
        progress = json.loads((folder / "progress.json").read_text())
        suffix = "" if progress["entry"] else ".partial"
        excess = [os.path.getsize(folder / (name + suffix)) - size for name, size in progress["sizes"].items()]
        is_on_disk = not any(excess) if progress["entry"] else min(excess) >= 0
        if is_on_disk and progress["fingerprint"] == fingerprint:
            return progress
    return {"fingerprint": fingerprint, "state": None, "sizes": dict.fromkeys(names, 0), "notes": {}, "entry": {}}


def write_documents(folder: Path, encoding: tiktoken.Encoding, source: Source, progress: dict, commit_seconds: float):
    """Append the documents after progress["state"] to *.partial files.

    A commit flushes them to disk, then records their sizes and the source's state in progress.json.
    """
    dtype = np.min_scalar_type(encoding.max_token_value)
    encode_one = functools.partial(encode_document, encoding)
    if source.max_length:
        encode_one = functools.partial(encode_conversation, encoding, source.max_length)
    limit = math.inf if source.max_tokens is None else source.max_tokens
    files, notes, state = {}, progress["notes"], progress["state"]

    def commit(state):
        for name, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            progress["sizes"][name] = file.tell()
        progress["state"] = state
        write_json(folder / "progress.json", progress)

    batches = source.open_batches(state)
    first = list(itertools.islice(batches, 1))  # a source that cannot be read fails before anything is removed
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, size in progress["sizes"].items():
            files[name] = stack.enter_context(open(folder / f"{name}.partial", "ab"))
            files[name].seek(size)
            files[name].truncate()
        commit(state)  # before the first write: an earlier progress.json describes other documents
        committed = time.monotonic()
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        bar = stack.enter_context(tqdm(desc=folder.name, total=source.max_tokens, unit="tok", unit_scale=True))
        for documents, state in itertools.chain(first, batches):
            for document in pool.map(encode_one, documents):
                if files["train.bin"].tell() < limit * dtype.itemsize:
                    split = "val" if is_held_out(source.split_key(document.text), source.val_fraction) else "train"
                    files[f"{split}.bin"].write(document.tokens.astype(dtype).tobytes())
                    if document.loss_mask is not None:
                        files[f"{split}.mask"].write(document.loss_mask.tobytes())
                    if document.note:
                        notes[document.note] = notes.get(document.note, 0) + 1
            n_tokens = files["train.bin"].tell() // dtype.itemsize
            bar.update(n_tokens - bar.n)
            if n_tokens >= limit:
                break
            if time.monotonic() - committed >= commit_seconds:
                commit(state)
                committed = time.monotonic()
        commit(state)


def count(folder: Path, encoding: tiktoken.Encoding, progress: dict) -> dict:
    """The counts of a domain in meta.json, from its partial files."""
    dtype, sizes = np.min_scalar_type(encoding.max_token_value), progress["sizes"]
    counts = {f"{split}_tokens": sizes[f"{split}.bin"] // dtype.itemsize for split in ("train", "val")}
    targets = np.fromfile(folder / "val.bin.partial", dtype)
    if "val.mask" in sizes:
        targets = targets[np.fromfile(folder / "val.mask.partial", np.uint8) == 1]
    text_tokens = targets[targets < encoding.eot_token]  # special tokens have the highest ids
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)])
    counts["val_bytes"] = int(lengths[text_tokens].sum())
    return {**counts, "val_targets": len(targets), "notes": progress["notes"]} if "val.mask" in sizes else counts


def write_domain(folder: Path, encoding: tiktoken.Encoding, source: Source, commit_seconds: float = 2.0) -> dict:
    """Tokenize the documents of a source until train holds max_tokens, publish them, return their entry in meta.json.

    Killed at any moment and called again with the same arguments, it resumes: the files equal those of one run. An
    earlier corpus stays until all is written, also if nothing is left for train or val, which is an error.
    """
    vocab = hashlib.blake2b(b"".join(encoding.token_byte_values()), digest_size=8).hexdigest()
    fingerprint = {"source": source.name, **source.fingerprint, "vocab": vocab, "val_fraction": source.val_fraction}
    fingerprint |= {"max_tokens": source.max_tokens, "max_length": source.max_length}
    names = ["train.bin", "val.bin"] + ["train.mask", "val.mask"] * bool(source.max_length)
    progress = read_progress(folder, fingerprint, names)
    if not progress["entry"]:
        write_documents(folder, encoding, source, progress, commit_seconds)
        entry = {"source": source.name, **count(folder, encoding, progress)}
        for split in ("train", "val"):
            if not entry[f"{split}_tokens"]:
                notes = "".join(f"; {n:,} {note}" for note, n in progress["notes"].items())
                left = f"nothing of {source.name} is left for {split}{notes}"
                raise UserError(f"{left}: add text, or raise --val_fraction=")
        (folder.parent / "meta.json").unlink(missing_ok=True)  # it describes the earlier files
        for name in progress["sizes"]:
            os.replace(folder / f"{name}.partial", folder / name)  # killed in between: all is written again
        progress["entry"] = entry
        write_json(folder / "progress.json", progress)
    return progress["entry"]


def write_corpus(
    folder: Path, encoding: tiktoken.Encoding, sources: dict[str, Source], vocab: str | None = None, commit_seconds=2.0
):
    """Write every domain, then meta.json, which marks the corpus as complete. vocab: the tokenizer's file."""
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
    meta["dtype"] = np.min_scalar_type(encoding.max_token_value).name
    meta |= {"vocab": os.path.abspath(vocab)} if vocab else {}
    meta["domains"] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for domain, source in sources.items():
                entry = write_domain(folder / domain, encoding, source, commit_seconds)
                n_train, n_val = entry["train_tokens"], entry["val_tokens"]
                print(f"{domain}: {n_train:,} train and {n_val:,} val tokens ({source.name})")
                for note, n in entry.get("notes", {}).items():
                    print(f"{domain}: {n:,} {note}")
                meta["domains"][domain] = source.describe(folder / domain, entry)
            write_json(folder / "meta.json", meta)
    except KeyboardInterrupt:
        raise UserError("stopped; run the command again to resume") from None
    except OSError as e:
        raise UserError(f"cannot write the corpus: {e}; fix that and run the command again to resume") from None


# --------------------------------------------------------------------------------------------- tiny, tiny_sft: embedded


def open_embedded(cfg: TinyConfig, corpus: str) -> dict[str, Source]:
    """The domains of tiny or tiny_sft; deterministic for a seed and the installed versions."""
    from extras import embedded

    check_range(cfg, 16, 2**30, "max_length")
    chat = corpus == "tiny_sft"
    seed = cfg.seed + chat  # tiny_sft has other problems than tiny
    size, fraction = cfg.math_mb * 1e6, cfg.val_fraction
    generated = f"generated, {cfg.math_mb} MB, seed {seed}"
    libraries = f"docstrings of numpy {version('numpy')} and torch {version('torch')}"
    python = f"standard library of Python {sys.version.split()[0]}"
    domains = {  # share of a training step, source, documents, split key
        "math": (0.5, generated, lambda: embedded.math_documents(seed, size), embedded.question_numbers),
        "stem": (0.25, libraries, lambda: embedded.without_repeats(embedded.stem_documents(), fraction), str),
        "code": (0.25, python, lambda: embedded.without_repeats(embedded.code_documents(), fraction), str),
    }
    if chat:
        conversations = functools.partial(embedded.math_conversations, seed, size, fraction)
        domains = {"chat": (1.0, generated, conversations, embedded.question_numbers)}
    code = b"".join(Path(path).read_bytes() for path in (__file__, embedded.__file__))  # either may change
    fingerprint = {"code": hashlib.blake2b(code, digest_size=8).hexdigest()}
    max_length = cfg.max_length if chat else None
    sources = {}
    for domain, (share, name, documents, split_key) in domains.items():
        open_batches = functools.partial(in_batches, documents)
        describe = functools.partial(embedded.describe, share)
        sources[domain] = Source(name, open_batches, fingerprint, fraction, split_key, None, max_length, describe)
    return sources


# --------------------------------------------------------------------------------------------------------- local files

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text"}


def find_files(source: str) -> list[str]:
    """The files that `source` names: paths and patterns, separated by commas."""
    files = []
    for pattern in [source] if os.path.exists(source) else source.split(","):
        path = os.path.expanduser(pattern.strip())
        found = [path] if os.path.exists(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            raise UserError(f"no file matches {path!r}; name your text: --source=input.txt or --source='*.txt'")
        files += found
    for file in files:
        if Path(file).suffix.lower() not in READERS:
            raise UserError(f"cannot read {file}: name files that end in {', '.join(READERS)}, such as '*.txt'")
    return list(dict.fromkeys(files))


def read_text(file: str, encoding: str | None) -> str:
    """A text file with \\n at line ends: UTF-8, else in this encoding."""
    for name in ("utf-8-sig", encoding or "utf-8-sig"):
        try:
            text = Path(file).read_text(name)
        except OSError as e:
            raise UserError(f"cannot read {file}: {e.strerror}") from None
        except (UnicodeError, LookupError):
            continue
        if "\0" not in text:  # UTF-16 has null bytes
            return text
    raise UserError(f"{file} is not text in {encoding or 'UTF-8'}; name its encoding: --encoding=latin-1, utf-16, ...")


def read_field(name: str, arguments: dict, field: str, state: dict | None = None) -> Batches:
    """Batches of one field of a data set, as load_dataset(**arguments) reads it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(**arguments, streaming=True)
        if state:
            rows.load_state_dict(state)
        for batch in rows.iter(batch_size=256):
            if field not in batch:
                flags = "--text_field= (sft: --messages_field=)"
                raise UserError(f"{name} has no field {field!r} but {', '.join(batch)}; name one: {flags}")
            yield batch[field], rows.state_dict()
    except UserError:
        raise
    except Exception as e:  # a lost connection or a damaged file; each library has its own types
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        hint = "" if "data_files" in arguments else "; run the command again to resume"
        if "is a gated dataset" in reason:
            hint = "; accept its terms on its page, then log in: hf auth login"
        raise UserError(f"cannot read {name}: {reason}{hint}") from None


def read_files(files: list[str], field: str, encoding: str | None) -> Iterator:
    """What these files hold: a .txt or .md file is one text; of each row of another file, this field."""
    for file in files:
        reader = READERS[Path(file).suffix.lower()]
        if reader == "text":
            yield read_text(file, encoding)
        else:
            arguments = {"path": reader, "data_files": [glob.escape(file)], "split": "train"}  # it takes patterns
            for values, _ in read_field(file, arguments, field):
                yield from values


# ------------------------------------------------------------------------------------------------------- text: your own


def cut(text: str, length: int) -> Iterator[str]:
    """The text in parts of length / 2 to length characters, cut at a blank line, else at a line, else at a word."""
    start = 0
    while len(text) - start > length:
        middle, end = start + length // 2, start + length
        ends = (text.rfind(mark, middle, end) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((found for found in ends if found > middle), end)
        yield text[start:end]
        start = end
    yield text[start:]


def open_text(domain: str, files: str, cfg: TextConfig) -> Source:
    """The documents in these files.

    Everything is read before, to check it, to hash its contents, and to hold out val_fraction of the documents exactly:
    of the few of one book, chance may hold out none.
    """
    paths = find_files(files)
    texts = functools.partial(read_files, paths, cfg.text_field, cfg.encoding)
    lengths = [len(text.strip()) if isinstance(text, str) else 0 for text in texts()]
    length = min(cfg.max_length, max(512, int(cfg.val_fraction / 4 * sum(lengths))))  # val has about four, at least

    def documents() -> Iterator[str]:
        for text in texts():
            if isinstance(text, str):
                yield from filter(str.strip, cut(text, length))

    hashes = [text_hash(document) for document in documents()]
    ordered = sorted(set(hashes))
    found = f"{sum(lengths):,} characters in {len(paths):,} files, {len(ordered):,} different documents"
    if len(ordered) < 2:
        raise UserError(f"{files} has too little text to train and evaluate on ({found}): add some")
    print(f"{domain}: {found}; {lengths.count(0):,} without text left out")
    n_val = min(math.ceil(cfg.val_fraction * len(ordered)), len(ordered) - 1)
    limit = (ordered[n_val - 1] + ordered[n_val]) / 2**65  # between the last one in val and the first in train
    contents = hashlib.blake2b(repr(hashes).encode(), digest_size=8).hexdigest()
    return Source(files, functools.partial(in_batches, documents), {"contents": contents}, val_fraction=limit)


def open_texts(cfg: TextConfig, corpus: str) -> dict[str, Source]:
    """The domains of your own text."""
    check_range(cfg, 16, 2**30, "max_length")
    named = {cfg.domain: cfg.source} if isinstance(cfg.source, str) else cfg.source or {cfg.domain: ""}
    for domain in named:
        if not re.fullmatch(r"[\w-]+", domain):
            raise UserError(f"the domain {domain!r} becomes a folder; use letters, digits, - and _")
    return {domain: open_text(domain, files, cfg) for domain, files in named.items()}


# ------------------------------------------------------------------------------------------- pretrain, sft: the paper's

# corpus: domain: data set on the hub, subset, split, field, train tokens in the paper (None: all)
DATASETS = {
    "pretrain": {
        "math": ("nvidia/Nemotron-CC-Math-v1", "4plus", "train", "text", 7_000_000_000),
        "stem": ("openbmb/Ultra-FineWeb", None, "en", "content", 2_500_000_000),
        "code": ("lumees/github-code-2025-language-split", "python", "train", "content", 500_000_000),
    },
    "sft": {"chat": ("nvidia/Nemotron-Math-v2", None, "high_part00", "messages", None)},
}


def pinned_revision(dataset: str, progress_path: Path) -> str:
    """The commit of a hub data set to read: that of a preparation in progress, else the newest."""
    from huggingface_hub import HfApi

    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        arguments = json.loads(progress_path.read_text())["fingerprint"]["load_dataset"]
        if arguments["path"] == dataset:
            return arguments["revision"]
    try:
        return HfApi().dataset_info(dataset).sha
    except Exception as e:  # the hub's HTTP libraries have many types
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"the hub cannot be reached for {dataset}: {reason}; name local files: --source=") from None


def open_domain(cfg: PretrainConfig | SFTDataConfig, corpus: str, domain: str) -> Source:
    """The documents of a domain: those of local files if cfg names some, else of the paper's data set."""
    name, subset, split, field, max_tokens = DATASETS[corpus][domain]
    if corpus == "sft":
        check_range(cfg, 16, 2**30, "max_length")
        files, field, max_length = cfg.source, cfg.messages_field, cfg.max_length
    else:
        files, field, max_length = cfg.source.get(domain), cfg.text_field.get(domain, field), None
    if files:
        name, paths = files, find_files(files)
        fingerprint = {"files": [[path, os.path.getsize(path)] for path in paths], "field": field}
        open_batches = functools.partial(in_batches, functools.partial(read_files, paths, field, cfg.encoding))
    else:
        revision = pinned_revision(name, Path(cfg.data_dir) / corpus / domain / "progress.json")
        arguments = {"path": name, "name": subset, "split": split, "revision": revision}
        name, fingerprint = f"{name} at {revision}", {"load_dataset": arguments, "field": field}
        open_batches = functools.partial(read_field, name, arguments, field)
    max_tokens = max_tokens if cfg.max_tokens is None else cfg.max_tokens
    return Source(name, open_batches, fingerprint, cfg.val_fraction, str, max_tokens, max_length)


def open_datasets(cfg: PretrainConfig | SFTDataConfig, corpus: str) -> dict[str, Source]:
    """The domains of pretrain or sft."""
    for domain in (*cfg.source, *cfg.text_field) if corpus == "pretrain" else ():
        if domain not in DATASETS[corpus]:
            raise UserError(f"there is no domain {domain!r}; there are {', '.join(DATASETS[corpus])}")
    return {domain: open_domain(cfg, corpus, domain) for domain in DATASETS[corpus]}


# ----------------------------------------------------------------------------------------------------------------- main

CORPORA = {  # settings, domains, and the command that trains on the corpus
    "text": (TextConfig, open_texts, "train.py config/tiny.py --out_dir=out/text"),
    "tiny": (TinyConfig, open_embedded, "train.py config/tiny.py"),
    "tiny_sft": (TinyConfig, open_embedded, "sft.py config/tiny_sft.py"),
    "pretrain": (PretrainConfig, open_datasets, "train.py config/pretrain.py"),
    "sft": (SFTDataConfig, open_datasets, "sft.py config/sft.py"),
}


def main():
    corpus = sys.argv[1] if len(sys.argv) > 1 else None
    if corpus in ("--help", "-h"):
        print(f"{__doc__}\nThe settings of one: python prepare_data.py tiny --help")
        return
    if corpus not in CORPORA:
        given = f"not {corpus!r}" if corpus else "none was named"
        raise UserError(f"which corpus? python prepare_data.py {' | '.join(CORPORA)} ({given})")
    settings, open_sources, command = CORPORA[corpus]
    cfg = load(settings, sys.argv[2:])
    encoding, folder = get_tokenizer(cfg.tokenizer, cfg.vocab), Path(cfg.data_dir) / corpus
    sources = open_sources(cfg, corpus)  # what cannot be read fails before anything is written
    write_corpus(folder, encoding, sources, cfg.vocab, cfg.commit_seconds)
    if corpus == "text" or folder != Path("data") / corpus:
        command += f" --data_dir={shlex.quote(str(folder))}"
    if "tokenizer" in cfg.overridden and corpus != "sft":  # sft.py takes over the model's
        command += f" --tokenizer={encoding.name} --vocab_size={encoding.n_vocab}"
    print(f"{folder} is complete; next: python {command}")


if __name__ == "__main__":
    run(main)
