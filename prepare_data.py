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
import dataclasses
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
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from common.run import locked, write_json
from common.settings import check_range, load, run
from common.tokenizer import encode, encode_chat, get_tokenizer


@dataclass
class PrepareConfig:  # every corpus
    data_dir: str = "data"  # parent folder; each corpus is a folder in it
    val_fraction: float = 0.001  # fraction of the documents held out in val
    commit_seconds: float = 2.0  # seconds between commits; a killed preparation resumes from the last one

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")
        for name, low, high in (("math_mb", 1e-6, 1e6), ("max_length", 16, 2**30), ("max_tokens", 1, 2**50)):
            if getattr(self, name, None) is not None:
                check_range(self, low, high, name)


@dataclass
class TextConfig(PrepareConfig):  # text
    val_fraction: float = 0.1  # fraction of each domain's distinct documents held out in val
    source: dict[str, str] | str = field(default_factory=dict)  # a.txt, '*.md' or both; by domain: --source.poems=
    domain: str = "text"  # name of the domain that --source= makes
    tokenizer: str = "bytes"  # bytes, gpt2 or qwen3
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    encoding: str | None = None  # encoding of .txt and .md files that are not UTF-8, for example latin-1
    text_field: str = "text"  # name of the text field in .jsonl and .parquet files
    max_length: int = 16_384  # maximum characters of a document; a longer text is cut into several, at blank lines


@dataclass
class TinyConfig(PrepareConfig):  # tiny and tiny_sft
    val_fraction: float = 0.05  # fraction of the documents held out in val
    seed: int = 0  # random seed of the generated text
    math_mb: float = 3.0  # megabytes of generated math
    max_length: int = 256  # tiny_sft: maximum tokens per conversation; longer ones are cut


@dataclass
class PretrainConfig(PrepareConfig):  # pretrain
    max_tokens: int | None = None  # train tokens of each domain; None: the paper's, 7e9 math, 2.5e9 stem, 5e8 code
    tokenizer: str = "qwen3"  # or gpt2, or bytes
    source: dict[str, str] = field(default_factory=dict)  # local files by domain: --source.math='dumps/*.parquet'
    text_field: dict[str, str] = field(default_factory=dict)  # name of the text field by domain: --text_field.math=name
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached


@dataclass
class SFTDataConfig(PrepareConfig):  # sft
    max_tokens: int | None = None  # train tokens; None: the whole data set
    source: str | None = None  # local files with a messages field, 'dumps/*.jsonl' or .parquet; None: the paper's
    messages_field: str = "messages"  # name of the field that lists the messages, {"role": ..., "content": ...}
    max_length: int = 4096  # maximum tokens per conversation; longer ones are cut
    tokenizer: str = "qwen3"  # or gpt2, or bytes; that of the model to fine-tune
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached


# ------------------------------------------------------------------------------------------------------ tokens on disk

Batches = Iterator[tuple[list, object]]  # documents, and the JSON state from which to resume after them


class Document(NamedTuple):  # encoded; one without tokens is skipped
    tokens: np.ndarray  # [n] uint32, <|endoftext|> last
    text: str  # of a conversation, its first question; a hash of Source.split_key(text) selects the split
    loss_mask: np.ndarray | None = None  # [n] uint8, 1 where loss is taken; None: everywhere
    note: str | None = None  # counted, and printed at the end


def encode_document(encoding: tiktoken.Encoding, text: str) -> Document:
    return Document(np.append(encode(encoding, text), np.uint32(encoding.eot_token)), text)


def encode_conversation(encoding: tiktoken.Encoding, max_length: int, messages: list[dict]) -> Document:
    """A conversation, cut to max_length tokens. Without an answer to learn it is skipped; the note says why.

    The user's first message selects the split: data sets hold many solutions of one problem.
    """
    try:
        if not isinstance(messages, list):
            raise ValueError("messages that are not a list")
        tokens, loss_mask = encode_chat(encoding, messages)
        if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
            raise ValueError("an assistant message without text")
        if not loss_mask.any():
            raise ValueError("no assistant message")
        questions = [m["content"].strip() for m in messages if m["role"] == "user"]
        question, note = questions[0] if questions else messages[0]["content"], None
        if len(tokens) > max_length:
            tokens, loss_mask, note = tokens[:max_length], loss_mask[:max_length], f"cut to {max_length} tokens"
            tokens[-1], loss_mask[-1] = encoding.eot_token, 0
        if not loss_mask.any():
            raise ValueError(f"no answer within {max_length} tokens")
        return Document(tokens, question, loss_mask, note)
    except ValueError as e:
        return Document(np.empty(0, np.uint32), "", np.empty(0, np.uint8), f"left out: {str(e)[:60]}")


def text_hash(text: str) -> int:
    """Uniform in 0 .. 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether documents with this key go to val: its hash, as a fraction of the largest, is below this one."""
    return text_hash(key) < fraction * 2**64


class DomainWriter:
    """Writes a domain's documents to {train,val}.bin and, for chat, their loss masks to {train,val}.mask.

    append() writes to *.partial. commit() flushes to disk, then records the file sizes, counts and source state in
    progress.json, where a new writer with the same fingerprint resumes. An earlier corpus stays until publish().
    """

    def __init__(self, folder: Path, encoding: tiktoken.Encoding, fingerprint: dict, chat: bool):
        self.encoding, self.dtype, self.files = encoding, np.min_scalar_type(encoding.max_token_value), {}
        names, counts = ["train.bin", "val.bin"], {"train_tokens": 0, "val_tokens": 0, "val_bytes": 0}
        if chat:
            names, counts = [*names, "train.mask", "val.mask"], {**counts, "val_targets": 0, "notes": {}}
        self.paths = {name: (folder / f"{name}.partial", folder / name) for name in names}
        self.progress_path, sizes = folder / "progress.json", dict.fromkeys(names, 0)
        self.progress = dict(fingerprint=fingerprint, state=None, is_complete=False, counts=counts, sizes=sizes)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no progress, or a file is missing
            saved = json.loads(self.progress_path.read_text())
            if saved["fingerprint"] == fingerprint and self.is_on_disk(saved):
                self.progress = saved

    def is_on_disk(self, progress: dict) -> bool:
        """Whether the files hold what was committed; complete ones, nothing more."""
        is_complete = progress["is_complete"]
        paths = [final if is_complete and not partial.exists() else partial for partial, final in self.paths.values()]
        excess = [path.stat().st_size - size for path, size in zip(paths, progress["sizes"].values())]
        return not any(excess) if is_complete else min(excess) >= 0

    @contextlib.contextmanager
    def open_files(self) -> Iterator[None]:
        """Open the partial files, cut back to the last commit."""
        self.progress_path.parent.mkdir(parents=True, exist_ok=True)
        if self.progress["state"] is None:
            self.progress_path.unlink(missing_ok=True)  # first: it describes other tokens
        with contextlib.ExitStack() as stack:
            for name, (partial, _) in self.paths.items():
                self.files[name] = stack.enter_context(open(partial, "ab"))
                self.files[name].truncate(self.progress["sizes"][name])
            yield

    def append(self, split: str, document: Document):
        (tokens, _, loss_mask, note), counts = document, self.progress["counts"]
        self.write(f"{split}.bin", tokens.astype(self.dtype))
        if loss_mask is not None:
            self.write(f"{split}.mask", loss_mask)
        if note:
            counts["notes"][note] = counts["notes"].get(note, 0) + 1
        counts[f"{split}_tokens"] += len(tokens)
        if split == "val":
            targets = tokens if loss_mask is None else tokens[loss_mask == 1]
            text_tokens = targets[targets < self.encoding.eot_token]  # special tokens have the highest ids
            counts["val_bytes"] += len(self.encoding.decode_bytes(text_tokens.tolist()))
            if "val_targets" in counts:
                counts["val_targets"] += len(targets)

    def write(self, name: str, array: np.ndarray):
        self.files[name].write(array.tobytes())
        self.progress["sizes"][name] += array.nbytes

    def commit(self, state, is_complete: bool = False):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.progress.update(state=state, is_complete=is_complete)
        write_json(self.progress_path, self.progress)

    def publish(self, meta_path: Path):
        for partial, final in self.paths.values():
            if partial.exists():
                meta_path.unlink(missing_ok=True)  # it describes the earlier files
                os.replace(partial, final)


class Source(NamedTuple):  # of a domain's documents
    name: str  # in meta.json and messages
    open_batches: Callable[[object], Batches]  # the documents from a state on; None is the start
    fingerprint: dict  # differs where the documents may differ
    split_key: Callable[[str], str] = str  # documents whose text has the same key are all in train or all in val


def write_domain(
    folder: Path, cfg: PrepareConfig, encoding: tiktoken.Encoding, source: Source, chat=False, max_tokens=None,
    min_tokens=1,
) -> dict:  # fmt: skip
    """Tokenize the documents of a source until train holds max_tokens, publish them, return their entry in meta.json.

    With fewer than min_tokens in train or val it raises ValueError, and the earlier corpus stays. Killed at any moment
    and called again with the same arguments, it resumes: the files equal those of one run.
    """
    vocab = hashlib.blake2b(b"".join(encoding.token_byte_values()), digest_size=8).hexdigest()
    fingerprint = {"source": source.name, **source.fingerprint, "vocab": vocab, "val_fraction": cfg.val_fraction}
    fingerprint |= {"max_tokens": max_tokens, "max_length": cfg.max_length if chat else None}
    encode_one = functools.partial(encode_document, encoding)
    if chat:
        fingerprint["split_by"] = "first question"  # before, by the whole conversation
        encode_one = functools.partial(encode_conversation, encoding, cfg.max_length)
    writer = DomainWriter(folder, encoding, fingerprint, chat)
    counts, state, limit = writer.progress["counts"], writer.progress["state"], max_tokens or math.inf
    if not writer.progress["is_complete"]:
        batches = source.open_batches(state)
        first = list(itertools.islice(batches, 1))  # a source that cannot be read fails before anything is removed
        bar = tqdm(desc=folder.name, initial=counts["train_tokens"], total=max_tokens, unit="tok", unit_scale=True)
        with writer.open_files(), bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            committed = time.monotonic()
            for documents, state in itertools.chain(first, batches):
                for document in pool.map(encode_one, documents):
                    if counts["train_tokens"] < limit:
                        in_val = is_held_out(source.split_key(document.text), cfg.val_fraction)
                        writer.append("val" if in_val else "train", document)
                bar.update(counts["train_tokens"] - bar.n)
                if counts["train_tokens"] >= limit:
                    break
                if time.monotonic() - committed >= cfg.commit_seconds:
                    writer.commit(state)
                    committed = time.monotonic()
            writer.commit(state, is_complete=True)
    n_tokens, split = min((counts[f"{split}_tokens"], split) for split in ("train", "val"))
    if 0 < n_tokens < min_tokens:
        raise ValueError(f"{source.name} gives {split} {n_tokens:,} tokens, fewer than {min_tokens}: add text")
    if not n_tokens:
        notes = "".join(f"; {n:,} {note}" for note, n in counts.get("notes", {}).items())
        split = "val: raise --val_fraction=, or add text" if counts["train_tokens"] else "training"
        raise ValueError(f"nothing of {source.name} is left for {split}{notes}")
    writer.publish(folder.parent / "meta.json")
    return {"source": source.name, **counts}


def prepare(
    folder: Path, encoding: tiktoken.Encoding, domains: dict[str, Callable[[], dict]], vocab: str | None = None
):
    """Write every domain, then meta.json, which marks the corpus as complete. vocab: the tokenizer's file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            verb = "replaced" if (folder / "meta.json").exists() else "wrote"
            counts = {name: write() for name, write in domains.items()}
            meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
            meta["dtype"] = np.min_scalar_type(encoding.max_token_value).name
            meta |= {"vocab": os.path.abspath(vocab)} if vocab else {}
            path = folder / "meta.json"
            earlier = path.read_bytes() if path.exists() else None  # publish() has removed it if a domain changed
            write_json(path, {**meta, "domains": counts})
            outcome = f"{folder} is unchanged" if path.read_bytes() == earlier else f"{verb} {folder}"
    except KeyboardInterrupt:
        raise ValueError("stopped; run the command again to resume") from None
    except OSError as e:
        raise OSError(f"cannot write the corpus: {e}; fix that and run the command again to resume") from None
    for name, count in counts.items():
        print(f"{name}: {count['train_tokens']:,} train and {count['val_tokens']:,} val tokens ({count['source']})")
        for note, n in count.get("notes", {}).items():
            print(f"{name}: {n:,} {note}")
        if "val_runs_in_train" in count:
            print(f"{name}: {count['val_runs_in_train']:.1%} of held-out 13-word runs occur in train")
    script = "sft.py" if folder.name.endswith("sft") else "train.py"
    pretrain = "small" if encoding.name == "gpt2" else "pretrain"
    settings = {"text": "tiny", "pretrain": pretrain}.get(folder.name, folder.name)
    is_default = folder.parent == Path("data") and folder.name != "text"
    flags = "" if is_default else f" --data_dir={shlex.quote(str(folder))}"
    flags += " --out_dir=out/text" if folder.name == "text" else ""
    if encoding.name != {"tiny": "bytes", "small": "gpt2", "pretrain": "qwen3"}.get(settings, encoding.name):
        flags += f" --tokenizer={encoding.name} --vocab_size={encoding.n_vocab}"
    print(f"{outcome}; next: python {script} config/{settings}.py{flags}")


# --------------------------------------------------------------------------------------------- tiny, tiny_sft: embedded


def in_batches(documents: Iterable, state: int | None, size: int = 256) -> Batches:
    """Batches of documents that can be generated again from the start; the state is the number already taken."""
    taken = state or 0
    documents = itertools.islice(documents, taken, None)
    while batch := list(itertools.islice(documents, size)):
        taken += len(batch)
        yield batch, taken


def prepare_embedded(cfg: TinyConfig, corpus: str):
    """Write data/tiny or data/tiny_sft; deterministic for a seed and the installed versions."""
    from extras import embedded

    folder, encoding, chat = Path(cfg.data_dir) / corpus, get_tokenizer("bytes"), corpus == "tiny_sft"
    seed, size, fraction = cfg.seed + chat, cfg.math_mb * 1e6, cfg.val_fraction  # tiny_sft has other problems than tiny
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
    sources = b"".join(Path(path).read_bytes() for path in (__file__, embedded.__file__))  # either may change
    fingerprint = {"code": hashlib.blake2b(sources, digest_size=8).hexdigest()}

    def write(domain: str) -> dict:
        share, name, documents, split_key = domains[domain]
        source = Source(name, lambda state: in_batches(documents(), state), fingerprint, split_key)
        counts = write_domain(folder / domain, cfg, encoding, source, chat)
        return {"share": share, **counts, "val_runs_in_train": embedded.repeated_share(folder / domain)}

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in domains})


# ----------------------------------------------------------------------------------------- pretrain, sft: hub and files
# corpus: domain: data set on the hub, subset, split, field, train tokens in the paper (None: all)
DATASETS = {
    "pretrain": {
        "math": ("nvidia/Nemotron-CC-Math-v1", "4plus", "train", "text", 7_000_000_000),
        "stem": ("openbmb/Ultra-FineWeb", None, "en", "content", 2_500_000_000),
        "code": ("lumees/github-code-2025-language-split", "python", "train", "content", 500_000_000),
    },
    "sft": {"chat": ("nvidia/Nemotron-Math-v2", None, "high_part00", "messages", None)},
}
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text"}


def pinned_revision(dataset: str, progress_path: Path) -> str:
    """The commit of a hub data set to read: that of a preparation in progress, else the newest."""
    from huggingface_hub import HfApi, errors

    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        arguments = json.loads(progress_path.read_text())["fingerprint"]["load_dataset"]
        if arguments["path"] == dataset:
            return arguments["revision"]
    try:
        return HfApi().dataset_info(dataset).sha
    except errors.RepositoryNotFoundError as e:
        raise ValueError(f"cannot open {dataset}: {' '.join(str(e).split())[:300]}") from None
    except Exception:  # the hub's HTTP libraries have many types
        raise ValueError(f"the hub cannot be reached for {dataset}; for local files: --source, see --help") from None


def local_arguments(pattern: str) -> dict:
    """Arguments for load_dataset() that read the local files of this pattern."""
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise ValueError(f"no file matches {pattern}")
    reader, *others = {READERS.get(Path(file).suffix.lower()) for file in files}
    if others or not reader:
        raise ValueError(f"{pattern}: files of one kind are needed, {', '.join(READERS)}")
    by_document = {"sample_by": "document"} if reader == "text" else {}  # a .txt file is one document
    return {"path": reader, "data_files": files, "split": "train", **by_document}


def read_rows(name: str, arguments: dict, state: dict | None) -> Iterator[tuple[dict[str, list], dict]]:
    """Batches of rows, {field: values}, each with the state from which to resume after it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if "data_files" in arguments:  # names, but load_dataset() takes patterns
        arguments = {**arguments, "data_files": [*map(glob.escape, arguments["data_files"])]}
    try:
        rows = datasets.load_dataset(**arguments, streaming=True)
        if state:
            rows.load_state_dict(state)
        for batch in rows.iter(batch_size=256):
            yield batch, rows.state_dict()
    except Exception as e:  # a lost connection or a damaged file; each library has its own types
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        hint = "" if "data_files" in arguments else "; if it was the network, run the command again to resume"
        if "is a gated dataset" in reason:
            hint = "; accept its terms on its page, then log in: hf auth login"
        raise ValueError(f"cannot read {name}: {reason}{hint}") from None


def prepare_datasets(cfg: PretrainConfig | SFTDataConfig, corpus: str):
    """Write data/pretrain or data/sft from the paper's data sets, or from local files."""
    folder, domains, chat = Path(cfg.data_dir) / corpus, DATASETS[corpus], corpus == "sft"
    local = {"chat": cfg.source} if chat else cfg.source
    fields = {"chat": cfg.messages_field} if chat else cfg.text_field
    for domain in (*local, *fields):
        if domain not in domains:
            raise ValueError(f"there is no domain {domain!r}; there are {', '.join(domains)}")
    encoding = get_tokenizer(cfg.tokenizer, cfg.vocab)

    def write(domain: str) -> dict:
        name, subset, split, column, max_tokens = domains[domain]
        if local.get(domain):
            name, arguments = local[domain], local_arguments(local[domain])
        else:
            revision = pinned_revision(name, folder / domain / "progress.json")
            arguments = {"path": name, "name": subset, "split": split, "revision": revision}
            name = f"{name} at {revision}"
        column = fields.get(domain, "text" if arguments["path"] == "text" else column)

        def open_batches(state: dict | None) -> Batches:
            for rows, next_state in read_rows(name, arguments, state):
                if column not in rows:
                    flag = "--messages_field=" if chat else f"--text_field.{domain}="
                    raise ValueError(f"{name} has no field {column!r} but {', '.join(rows)}; name one: {flag}")
                yield [value for value in rows[column] if chat or isinstance(value, str)], next_state

        sizes = [os.path.getsize(path) for path in arguments.get("data_files", [])]
        source = Source(name, open_batches, {"load_dataset": arguments, "sizes": sizes, "field": column})
        return write_domain(folder / domain, cfg, encoding, source, chat, cfg.max_tokens or max_tokens)

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in domains}, cfg.vocab)


# ------------------------------------------------------------------------------------------------- text: your own files


def find_files(source: str) -> list[str]:
    """The files that `source` names: paths and patterns, separated by commas."""
    files = []
    for pattern in [source] if os.path.exists(source) else source.split(","):
        path = os.path.expanduser(pattern.strip())
        found = [path] if os.path.exists(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            raise ValueError(f"no file matches {path!r}; name your text: --source=input.txt or --source='*.txt'")
        files += found
    for file in files:
        if os.path.isdir(file):
            raise ValueError(f"{file} is a folder; name its files: --source='{file}/*.txt'")
        if Path(file).suffix.lower() not in READERS:
            raise ValueError(f"cannot read {file}: it must end in {', '.join(READERS)}; rename plain text to .txt")
    return list(dict.fromkeys(files))


def read_text(file: str, encoding: str | None) -> str:
    """A text file with \\n at line ends: UTF-8, else in this encoding. Raises ValueError if it is neither."""
    try:
        content = Path(file).read_bytes()
        for name in filter(None, ("utf-8-sig", encoding)):
            with contextlib.suppress(UnicodeError):
                text = content.decode(name)
                if "\0" not in text:
                    return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as e:
        raise ValueError(f"cannot read {file}: {e.strerror}") from None
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; there are latin-1, cp1252, utf-16, ...") from None
    if b"\0" in content:
        raise ValueError(f"{file} has null bytes: it is not text, or in UTF-16 (--encoding=utf-16)")
    raise ValueError(f"{file} is not in {encoding or 'UTF-8'}; name its encoding, for example --encoding=latin-1")


def read_texts(files: list[str], cfg: TextConfig) -> Iterator[str]:
    """The texts in these files: a .txt or .md file is one, and so is each row of another; "" where it has none."""
    for file in files:
        reader = READERS[Path(file).suffix.lower()]
        if reader == "text":
            yield read_text(file, cfg.encoding)
            continue
        for rows, _ in read_rows(file, {"path": reader, "data_files": [file], "split": "train"}, None):
            if cfg.text_field not in rows:
                names = ", ".join(rows)
                raise ValueError(f"{file} has no field {cfg.text_field!r} but {names}; name one: --text_field=")
            yield from (text if isinstance(text, str) else "" for text in rows[cfg.text_field])


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


def open_text(domain: str, files: str, cfg: TextConfig) -> tuple[Source, float]:
    """The documents in these files, and the threshold: one is held out if its hash / 2**64 is below it.

    Everything is read before, to check it, to hash its contents, and to choose that fraction such that val_fraction of
    the documents are held out: of the few of one book, chance may hold out none.
    """
    paths = find_files(files)
    lengths = [len(text.strip()) for text in read_texts(paths, cfg)]
    length = min(cfg.max_length, max(512, int(cfg.val_fraction / 4 * sum(lengths))))  # val has about four, at least

    def documents() -> Iterator[str]:
        return (document for text in read_texts(paths, cfg) for document in cut(text, length) if document.strip())

    hashes = [text_hash(document) for document in documents()]
    ordered = sorted(set(hashes))
    if len(ordered) < 2:
        found = f"{sum(lengths):,} characters, different documents: {len(ordered)}"
        raise ValueError(f"{files} has too little text to train and evaluate on ({found}): add some")
    found = f"{sum(lengths):,} characters in {len(paths):,} file{'s' * (len(paths) > 1)}, {len(hashes):,} documents"
    print(f"{domain}: {found}" + (f"; {lengths.count(0):,} without text left out" if 0 in lengths else ""))
    n_val = min(math.ceil(cfg.val_fraction * len(ordered)), len(ordered) - 1)
    limit = (ordered[n_val - 1] + ordered[n_val]) / 2**65  # between the last one in val and the first in train
    contents = hashlib.blake2b(repr(hashes).encode(), digest_size=8).hexdigest()
    return Source(files, lambda state: in_batches(documents(), state), {"contents": contents}), limit


def prepare_text(cfg: TextConfig, corpus: str):
    """Write data/text from local files."""
    folder, encoding = Path(cfg.data_dir) / corpus, get_tokenizer(cfg.tokenizer, cfg.vocab)
    domains = {cfg.domain: cfg.source} if isinstance(cfg.source, str) else cfg.source or {cfg.domain: ""}
    for domain in domains:
        if not re.fullmatch(r"[\w-]+", domain):
            raise ValueError(f"the domain {domain!r} becomes a folder; use letters, digits, - and _")
    opened = {domain: open_text(domain, files, cfg) for domain, files in domains.items()}  # before anything is written

    def write(domain: str) -> dict:
        source, limit = opened[domain]
        settings = dataclasses.replace(cfg, val_fraction=limit)
        return write_domain(folder / domain, settings, encoding, source, min_tokens=257)  # a window of config/tiny.py

    prepare(folder, encoding, {domain: functools.partial(write, domain) for domain in domains}, cfg.vocab)


# ----------------------------------------------------------------------------------------------------------------- main

CORPORA = {
    "text": TextConfig, "tiny": TinyConfig, "tiny_sft": TinyConfig, "pretrain": PretrainConfig, "sft": SFTDataConfig,
}  # fmt: skip


def main():
    corpus = sys.argv[1] if len(sys.argv) > 1 else None
    if corpus in ("--help", "-h"):
        print(f"{__doc__}\nThe settings of one: python prepare_data.py tiny --help")
        return
    if corpus not in CORPORA:
        given = f"not {corpus!r}" if corpus else "none was named"
        raise ValueError(f"which corpus? python prepare_data.py {' | '.join(CORPORA)} ({given})")
    functions = {TextConfig: prepare_text, TinyConfig: prepare_embedded}
    prepare_corpus = functions.get(CORPORA[corpus], prepare_datasets)
    prepare_corpus(load(CORPORA[corpus], sys.argv[2:]), corpus)


if __name__ == "__main__":
    run(main)
