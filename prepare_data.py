"""Text to tokens on disk.

python prepare_data.py text      your own text: --source=input.txt, '*.md' or a.txt,b.jsonl,c.parquet
python prepare_data.py tiny      the embedded corpus, offline: generated math with worked steps (math),
                                 docstrings of the installed numpy and torch (stem), Python's standard library (code)
python prepare_data.py tiny_sft  math questions and answers as conversations
python prepare_data.py pretrain  the paper's three data sets, streamed from the hub, in Qwen3's tokens. --max_tokens=1e8
                                 takes less of each; --source.math='dumps/*.parquet' reads local files instead
python prepare_data.py sft       the paper's conversations, or your own: --source='dumps/*.jsonl'

A corpus is data/<corpus>/meta.json and data/<corpus>/<domain>/{train,val}.bin: flat token ids, <|endoftext|> after
every document. Conversations also have {train,val}.mask: one byte per token, 1 if it counts in the loss. A hash of the
text (a conversation's first question, a generated problem's numbers) selects the split, so that neither duplicates nor
two answers to one question straddle it. The hash ignores white space and Unicode form (NFC, NFD). Documents without
text are left out. To resume a stopped preparation, or to repair a damaged corpus, run the same command again.
"""

import contextlib
import functools
import glob
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

# before torch: it sets environment variables that torch reads, and makes Ctrl-C during the imports one line
from common.settings import UserError, check_range, load, reason, run  # isort: skip

import numpy as np
import tiktoken
from tqdm import tqdm

from common.run import locked, write_json
from common.tokenizer import canonical, encode, encode_chat, get_tokenizer, is_held_out, text_hash

HOW_TO_RESUME = "fix that and run the command again to resume"
save_json = functools.partial(write_json, hint=f"; {HOW_TO_RESUME}")


@dataclass
class PrepareConfig:  # every corpus
    data_dir: str = "data"  # parent folder; each corpus is a folder in it
    val_fraction: float = 0.001  # fraction of the documents held out in val
    max_length: int = 4096  # sft and tiny_sft: maximum tokens per conversation; longer ones are cut
    commit_seconds: float = 2.0  # seconds between commits; a killed preparation resumes from the last one

    def __post_init__(self):
        check_range(self, 0, 1, "val_fraction")
        if self.val_fraction in (0, 1):
            raise UserError(f"val_fraction is {self.val_fraction:g}; it must lie between 0 and 1, both excluded")
        check_range(self, 16, 2**30, "max_length")


@dataclass
class TinyConfig(PrepareConfig):  # tiny and tiny_sft
    val_fraction: float = 0.05
    max_length: int = 256
    seed: int = 0  # random seed of the generated text
    math_mb: float = 3.0  # megabytes of generated math
    tokenizer: ClassVar = "bytes"
    vocab: ClassVar = None

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 1e-3, 1e6, "math_mb")


@dataclass
class FilesConfig(PrepareConfig):  # text, pretrain and sft
    source: dict[str, str] | str = field(default_factory=dict)  # a.txt, '*.md' or both; by domain: --source.math=
    tokenizer: str = "qwen3"  # qwen3, gpt2 or bytes; for sft, that of the model to fine-tune
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    encoding: str | None = None  # encoding of .txt and .md files that are not UTF-8, for example latin-1


@dataclass
class TextConfig(FilesConfig):  # text
    val_fraction: float = 0.1  # fraction of each domain's distinct documents held out in val
    tokenizer: str = "bytes"  # bytes, gpt2 or qwen3
    domain: str = "text"  # name of the domain that --source= makes
    text_field: str = "text"  # name of the text field in .jsonl and .parquet files
    max_length: int = 16_384  # maximum characters of a document; longer texts are cut, small sources into smaller parts


@dataclass
class PaperConfig(FilesConfig):  # pretrain and sft
    max_tokens: int | None = None  # train tokens of a domain; None: 7e9 math, 2.5e9 stem and 5e8 code, or all of sft
    text_field: dict[str, str] = field(default_factory=dict)  # pretrain: name of the text field: --text_field.math=name
    messages_field: str = "messages"  # sft: name of the field that lists the messages, {"role": ..., "content": ...}

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 1, 2**50, "max_tokens")


# -------------------------------------------------------------------------------------------------- documents to tokens


class Document(NamedTuple):
    tokens: np.ndarray = np.empty(0, np.uint32)  # [n] uint32, <|endoftext|> last; none: the document is left out
    text: str = ""  # of a conversation, its first question; a hash of Source.split_key(text) selects the split
    loss_mask: np.ndarray | None = None  # [n] uint8, 1 if it counts in the loss; None: all do
    note: str | None = None  # why it is left out or cut; counted, and printed at the end


def encode_document(encoding: tiktoken.Encoding, max_length: int | None, row) -> Document:
    """Encode a text or, with max_length, a conversation: cut to that many tokens, left out without an answer to learn.

    A row may be anything that a file holds. A reader that leaves a row out passes a Document that says why.
    """
    if isinstance(row, Document):
        return row
    if max_length:
        return encode_conversation(encoding, max_length, row)
    if not isinstance(row, str | None):
        return Document(note="left out: not text")
    if row is None or not row.strip():
        return Document(note="left out: no text")
    return Document(np.append(encode(encoding, row), np.uint32(encoding.eot_token)), row)


def encode_conversation(encoding: tiktoken.Encoding, max_length: int, row) -> Document:
    """Messages, or a string that holds them as JSON. Content may be a list of text parts."""
    if isinstance(row, str):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(row)
    if isinstance(row, list):
        row = [{**m, "content": join_parts(m.get("content"))} if isinstance(m, dict) else m for m in row]
    try:
        tokens, loss_mask = encode_chat(encoding, row)
        answers = [m["content"].strip() for m in row if m["role"] == "assistant"]
        if not answers or not all(answers):
            raise UserError("no assistant message, or one without text")
        if not loss_mask[: max_length - 1].any():
            raise UserError(f"no answer within {max_length} tokens")
    except UserError as e:
        return Document(note=f"left out: {str(e)[:60]}")
    question = next((m["content"].strip() for m in row if m["role"] == "user"), row[0]["content"])
    note = f"cut to {max_length} tokens" if len(tokens) > max_length else None
    kept = np.r_[: min(len(tokens), max_length) - 1, -1]  # the last one is <|endoftext|>
    return Document(tokens[kept], question, loss_mask[kept], note)


def join_parts(content):
    """The text of [{"type": "text", "text": ...}, ...]; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


# ------------------------------------------------------------------------------------------------------ tokens on disk

Documents = Iterator[tuple[object, object]]  # texts or conversations, with the JSON state from which to resume


class Source(NamedTuple):  # of a domain's documents
    name: str  # in meta.json and messages
    open_documents: Callable[[object], Documents]  # from a state on; None is the start
    fingerprint: object  # JSON; differs where the documents may differ
    val_fraction: float
    max_tokens: int | None = None  # of train; None: no limit
    max_length: int | None = None  # of conversations: maximum tokens; None: the documents are texts
    split_key: Callable[[str], str] = canonical  # documents whose text has the same key are all in train or all in val
    describe: Callable[[Path, dict], dict] = lambda folder, counts: counts  # makes meta.json's entry of the domain


def numbered(open_all: Callable[[], Iterable], taken: int | None) -> Documents:
    """Documents that can be read again from the start; the state is the number already taken."""
    return zip(itertools.islice(open_all(), taken, None), itertools.count((taken or 0) + 1))


def token_dtype(encoding: tiktoken.Encoding) -> np.dtype:
    """The smallest dtype that holds every token id: uint16 or uint32."""
    return np.min_scalar_type(encoding.max_token_value)


def checksum(path: Path, size: float = math.inf) -> int:
    """CRC-32 of the first `size` bytes of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(min(2**20, size)):
            crc = zlib.crc32(chunk, crc)
            size -= len(chunk)
    return crc


def read_progress(folder: Path, asked: dict) -> dict:
    """progress.json if it records these documents and the files hold what it says, else a new start."""
    start = {"asked": asked, "state": None, "entry": {}, "suffix": ".partial", "notes": {}}
    start |= {"sizes": {}, "checksums": {}}  # by name of a file
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or a file is missing
        progress = json.loads((folder / "progress.json").read_text())
        if progress["asked"] == asked and progress.keys() == start.keys():
            paths = {name: folder / (name + progress["suffix"]) for name in progress["checksums"]}
            # Before the end, a file may hold more than was committed.
            sizes = dict.fromkeys(paths, math.inf) if progress["entry"] else progress["sizes"]
            if progress["checksums"] == {name: checksum(path, sizes[name]) for name, path in paths.items()}:
                return progress
    return start


def write_domain(folder: Path, encoding: tiktoken.Encoding, source: Source, commit_seconds: float) -> dict:
    """Tokenize the documents of a source into *.partial files until train holds max_tokens. Returns progress.json.

    A commit flushes the files to disk, then records their sizes and the source's state in progress.json. Killed at any
    moment and called again with the same arguments, it continues from there: the files equal those of one run.
    """
    asked = {name: value for name, value in source._asdict().items() if not callable(value)}
    asked["tokenizer"] = [encoding.name, text_hash(repr(encoding.token_byte_values()))]
    progress = read_progress(folder, asked)
    if progress["entry"]:
        return progress
    encode_one = functools.partial(encode_document, encoding, source.max_length)
    names = ["train.bin", "val.bin"] + ["train.mask", "val.mask"] * bool(source.max_length)
    dtype, notes = token_dtype(encoding), progress["notes"]
    limit = (source.max_tokens or math.inf) * dtype.itemsize
    checksums = progress["checksums"] = dict.fromkeys(names, 0) | progress["checksums"]

    def write(name: str, values: np.ndarray):
        data = values.tobytes()
        files[name].write(data)
        checksums[name] = zlib.crc32(data, checksums[name])

    def commit():
        for name, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            progress["sizes"][name] = file.tell()
        save_json(folder / "progress.json", progress)

    folder.mkdir(exist_ok=True)
    bar = tqdm(desc=folder.name, total=source.max_tokens, unit="tok", unit_scale=True)
    with contextlib.ExitStack() as stack, bar:
        pool = ThreadPoolExecutor(os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)  # when stopped, do not encode the rest of the batch
        files = {name: stack.enter_context(open(folder / f"{name}.partial", "ab")) for name in names}
        for name, file in files.items():
            file.seek(progress["sizes"].get(name, 0))
            file.truncate()
        committed = -math.inf
        documents = source.open_documents(progress["state"])
        while batch := list(itertools.islice(documents, 256)):
            if time.monotonic() - committed >= commit_seconds:
                commit()  # also before the first write: an earlier progress.json describes other documents
                committed = time.monotonic()
            for document in pool.map(encode_one, [document for document, _ in batch]):
                if files["train.bin"].tell() < limit:
                    split = "val" if is_held_out(source.split_key(document.text), source.val_fraction) else "train"
                    write(f"{split}.bin", document.tokens.astype(dtype))
                    if document.loss_mask is not None:
                        write(f"{split}.mask", document.loss_mask)
                    if note := document.note:
                        note = note if note in notes or len(notes) < 20 else "left out or cut for other reasons"
                        notes[note] = notes.get(note, 0) + 1
            progress["state"] = batch[-1][1]
            bar.update(files["train.bin"].tell() // dtype.itemsize - bar.n)
            if files["train.bin"].tell() >= limit:
                break
        commit()
    progress["entry"] = summarize_domain(folder, encoding, source, progress)
    save_json(folder / "progress.json", progress)
    return progress


def summarize_domain(folder: Path, encoding: tiktoken.Encoding, source: Source, progress: dict) -> dict:
    """Count and print what a domain's complete *.partial files hold, for meta.json. UserError for too little text."""
    dtype, state = token_dtype(encoding), progress["state"]
    on_hub = isinstance(state, dict) and "revision" in state
    entry = {"source": f"{source.name} at {state['revision']}" if on_hub else source.name}
    entry |= {f"{split}_tokens": progress["sizes"][f"{split}.bin"] // dtype.itemsize for split in ("train", "val")}
    targets = np.fromfile(folder / "val.bin.partial", dtype)
    if source.max_length:
        targets = targets[np.fromfile(folder / "val.mask.partial", np.uint8) == 1]
    text_tokens = targets[targets < encoding.eot_token]  # special tokens have the highest ids
    entry["val_bytes"] = len(encoding.decode_bytes(text_tokens.tolist()))
    found = f"{entry['train_tokens']:,} train and {entry['val_tokens']:,} val tokens ({entry['source']})"
    print(f"{folder.name}: {found}")
    notes = [f"{n:,} {note}" for note, n in progress["notes"].items()]
    for note in notes:
        print(f"{folder.name}: {note}")
    if min(entry["train_tokens"], entry["val_tokens"]) <= 256:  # block_size of config/tiny.py
        found = "; ".join([found, *notes[:3]])
        advice = ": add some, or change --val_fraction=" if entry["train_tokens"] + entry["val_tokens"] else ""
        raise UserError(f"too little text in {folder}, {found}{advice}")
    entry |= {"val_targets": len(targets)} if source.max_length else {}
    return entry | ({"notes": progress["notes"]} if notes else {})


def write_corpus(folder: Path, encoding: tiktoken.Encoding, sources: dict[str, Source], vocab=None, commit_seconds=2.0):
    """Write every domain, then replace the earlier corpus. meta.json marks it as complete, and names the vocab file."""
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
    meta["dtype"] = token_dtype(encoding).name
    meta |= {"vocab": os.path.abspath(vocab)} if vocab else {}
    meta["domains"] = {}
    with locked(folder):
        print_replaced(folder, sources)
        written = {d: write_domain(folder / d, encoding, source, commit_seconds) for d, source in sources.items()}
        (folder / "meta.json").unlink(missing_ok=True)  # it describes the earlier files
        for domain, progress in written.items():
            for name in progress["sizes"]:  # killed in between: the domain is written again
                os.replace(folder / domain / (name + progress["suffix"]), folder / domain / name)
            progress["suffix"] = ""
            save_json(folder / domain / "progress.json", progress)
            meta["domains"][domain] = sources[domain].describe(folder / domain, progress["entry"])
        save_json(folder / "meta.json", meta)


def print_replaced(folder: Path, sources: dict[str, Source]):
    """Say which texts of an earlier corpus in this folder are about to be replaced."""
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):  # none, or a damaged one
        earlier = {entry["source"] for entry in json.loads((folder / "meta.json").read_text())["domains"].values()}
        names = [source.name for source in sources.values()]
        if gone := [x for x in earlier if not any(x == name or x.startswith(f"{name} at ") for name in names)]:
            print(f"replacing the corpus in {folder}, which was made from {', '.join(sorted(gone))}")


# --------------------------------------------------------------------------------------------- tiny, tiny_sft: embedded


def open_embedded(cfg: TinyConfig, corpus: str) -> Iterator[tuple[str, Source]]:
    """The domains of tiny or tiny_sft; deterministic for a seed and the installed versions."""
    from extras import embedded

    chat = corpus == "tiny_sft"
    seed = cfg.seed + chat  # tiny_sft has different problems from tiny
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
    fingerprint = text_hash("".join(Path(path).read_text(encoding="utf-8") for path in (__file__, embedded.__file__)))
    max_length = cfg.max_length if chat else None
    for domain, (share, name, documents, split_key) in domains.items():
        open_documents, describe = functools.partial(numbered, documents), functools.partial(embedded.describe, share)
        options = {"max_length": max_length, "split_key": split_key, "describe": describe}
        yield domain, Source(name, open_documents, fingerprint, fraction, **options)


# ------------------------------------------------------------------------------------------- files; text: your own text


def find_files(source: str) -> list[str]:
    """The files that `source` names: paths and patterns, separated by commas."""
    files = []
    for pattern in [source] if os.path.exists(source) else source.split(","):
        path = os.path.expanduser(pattern.strip())
        found = [path] if os.path.exists(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            found = f"no file matches {path!r}; " if path else ""
            raise UserError(f"{found}name your text: --source=input.txt or --source='*.txt'")
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; name its files: --source='{path.rstrip('/')}/*.txt'")
        files += found
    return list(dict.fromkeys(files))


def open_file(file: str) -> BinaryIO:
    """A local file, or one on the hub (hf://...); unpacked if it is a .gz."""
    if file.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        raw = io.BufferedReader(HfFileSystem().open(file), 2**22)
    else:
        raw = open(file, "rb")
    return gzip.open(raw) if file.lower().endswith(".gz") else raw


def read_text(file: str, encoding: str | None) -> str:
    """A text file with \\n at line ends: UTF-8, else in this encoding."""
    with open_file(file) as opened:
        content = opened.read()
    fault = f"is not text in {encoding or 'UTF-8'}; name its encoding: --encoding=latin-1, utf-16, ..."
    for name in ("utf-8-sig", encoding or "utf-8-sig"):
        with contextlib.suppress(UnicodeError, LookupError):
            text = content.decode(name)
            if "\0" not in text:
                return text.replace("\r\n", "\n").replace("\r", "\n")
            fault = "has null characters; remove them, or if it is UTF-16, name it: --encoding=utf-16"
    raise UserError(f"{file} {fault}")


def read_json(file: str, skip: int) -> Iterator[tuple[int, object]]:
    """The rows of a file of JSON lines, or of one JSON array, after the first `skip`. Each with its number."""
    with open_file(file) as lines:
        if lines.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from itertools.islice(enumerate(decode_json(lines.read(), file), 1), skip, None)
        for n, line in enumerate(lines, 1):
            if n > skip and not line.isspace():
                yield n, decode_json(line, file, f" in row {n}")


def decode_json(content: bytes, file: str, where: str = ""):
    try:
        return json.loads(content, parse_int=float)  # an integer may have any number of digits
    except (ValueError, RecursionError) as e:
        raise UserError(f"cannot read {file}: JSON parse error{where}: {e}") from None


def read_parquet(file: str, field: str, skip: int) -> Iterator[tuple[int, dict]]:
    """The rows of a parquet file, as read_json(): this field alone or, if it is missing, the names of all."""
    import pyarrow.parquet  # comes with datasets

    with open_file(file) as opened:
        if not opened.peek(1):
            return  # an empty file
        table, n = pyarrow.parquet.ParquetFile(opened), 0
        names = dict.fromkeys(table.schema_arrow.names)
        for i in range(table.num_row_groups):
            size = table.metadata.row_group(i).num_rows
            if n + size <= skip:
                n += size
                continue
            for batch in table.iter_batches(64, row_groups=[i], columns=[field], use_threads=False):
                for row in batch.to_pylist():
                    n += 1
                    if n > skip:
                        yield n, row or names


def read_rows(file: str, field: str, encoding: str | None, skip: int) -> Iterator[tuple[int, object]]:
    """The rows of a file, as read_json(). A plain text is one row."""
    name = file.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return read_json(file, skip)
    if name.endswith(".parquet"):
        return read_parquet(file, field, skip)
    return iter([] if skip else [(1, {field: read_text(file, encoding)})])


MISSING = object()
HUB_HINT = "; run the command again to resume, or name local files: --source="


def look_up(row, field: str):
    """row["a.b"], else row["a"]["b"], else MISSING."""
    if not isinstance(row, dict):
        return MISSING
    if field in row:
        return row[field]
    name, _, rest = field.partition(".")
    return look_up(row.get(name), rest) if rest else MISSING


def read_files(files: list[str], field: str, encoding=None, state: dict | None = None) -> Documents:
    """This field of every row, whatever the other fields hold, with the state from which to resume after it."""
    state = {"file": 0, "row": 0, "found": False, **(state or {})}
    names = None  # of the fields in the first row without this one
    for i in range(state["file"], len(files)):
        on_hub, n = files[i].startswith("hf://"), 0
        hint = HUB_HINT if on_hub else ""
        try:
            for n, row in read_rows(files[i], field, encoding, state["row"]):
                value = look_up(row, field)
                state["found"] |= value is not MISSING
                if value is MISSING:
                    value = Document(note=f"left out: no field {field!r}")
                    names = names or (list(row) if isinstance(row, dict) else ["rows without names"])
                yield value, {**state, "file": i, "row": n}
        except UserError:
            raise
        except Exception as e:  # a damaged file or a lost connection; each library has its own types
            raise UserError(f"cannot read {files[i]}{f' after row {n}' * bool(n)}: {reason(e)}{hint}") from None
        state["row"] = 0
        if names and not state["found"] and (on_hub or i == len(files) - 1):  # the files of a data set are alike
            found = f"no field {field!r} but {', '.join(names)[:300]}"
            raise UserError(f"cannot read {files[i]}: {found}; name it: --text_field= (in a chat, --messages_field=)")


def read_hub(name: str, subset: str | None, split: str, field: str, state: dict | None = None) -> Documents:
    """One field of a data set on the hub, all of one commit."""
    import datasets
    from huggingface_hub import HfApi

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        revision = state["revision"] if state else HfApi().dataset_info(name).sha
        files = datasets.load_dataset_builder(name, subset, revision=revision).config.data_files[split]
    except Exception as e:  # no connection, or no such data set; each library has its own types
        raise UserError(f"cannot read {name}: {reason(e)}{HUB_HINT}") from None
    yield from read_files(files, field, state=state or {"revision": revision})


def read_parts(
    files: list[str], cfg: TextConfig, length: int, earlier: frozenset[int] = frozenset()
) -> Iterator[str | Document]:
    """Each text once, in parts of at most `length` characters, cut at a blank line, else a line, else a word.

    earlier: hashes of the texts and parts of the domains before, which are left out.
    """
    pauses = [rf".{{{length // 2},{length - len(pause)}}}{pause}" for pause in ("\n\n", "\n", " ")]
    part = re.compile("|".join([rf".{{1,{length}}}\Z", *pauses, f".{{{length}}}"]), re.DOTALL)
    seen = set(earlier)
    for text, _ in read_files(files, cfg.text_field, cfg.encoding):
        is_new = isinstance(text, str) and text_hash(canonical(text)) not in earlier
        for document in (is_new and part.findall(text)) or [text]:
            key = canonical(document) if isinstance(document, str) else ""
            repeats = key and text_hash(key) in seen
            seen.add(text_hash(key))
            yield Document(note="left out: repeats an earlier one") if repeats else document


def open_texts(cfg: TextConfig, corpus: str) -> Iterator[tuple[str, Source]]:
    """The domains of your own text. Exactly val_fraction is held out: of few documents, a hash might choose none.

    A text that several domains contain is kept in the first of them only, because another might not hold it out.
    """
    earlier, checksums = frozenset(), []  # of the domains so far
    named = {cfg.domain: cfg.source} if isinstance(cfg.source, str) else cfg.source or {cfg.domain: ""}
    for domain, source in named.items():
        if not re.fullmatch(r"[\w-]+", domain):
            raise UserError(f"the domain {domain!r} becomes a folder; use letters, digits, - and _")
        files = find_files(source)
        n_characters = 0
        text_hashes = set()  # of whole texts, which another domain may cut elsewhere
        for text, _ in read_files(files, cfg.text_field, cfg.encoding):
            if isinstance(text, str) and text.strip():
                n_characters += len(text.strip())
                text_hashes.add(text_hash(canonical(text)))
        # short enough for val to get about four documents
        length = min(cfg.max_length, max(512, int(cfg.val_fraction / 4 * n_characters)))
        documents = functools.partial(read_parts, files, cfg, length, earlier)
        keys = (canonical(document) for document in documents() if isinstance(document, str))
        ordered = sorted(text_hash(key) for key in keys if key)
        n_val = min(max(1, math.ceil(cfg.val_fraction * len(ordered))), len(ordered) - 1)
        # halfway between the hashes of the last one in val and the first in train, as a fraction of 2**64
        val_fraction = sum(ordered[n_val - 1 : n_val + 1]) / 2**65
        earlier = earlier.union(ordered, text_hashes)
        checksums = [*checksums, length, *map(checksum, files)]
        fingerprint = [cfg.text_field, cfg.encoding, *checksums]
        yield domain, Source(source, functools.partial(numbered, documents), fingerprint, val_fraction)


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


def open_datasets(cfg: PaperConfig, corpus: str) -> Iterator[tuple[str, Source]]:
    """The domains of pretrain or sft: from local files where cfg names some, else the paper's data sets."""
    domains = DATASETS[corpus]
    if isinstance(cfg.source, str) and len(domains) > 1:
        raise UserError(f"the source of which domain? {', '.join(f'--source.{domain}=' for domain in domains)}")
    local = {"chat": cfg.source} if isinstance(cfg.source, str) else cfg.source
    if unknown := [domain for domain in (*local, *cfg.text_field) if domain not in domains]:
        raise UserError(f"there is no domain {unknown[0]!r}; there are {', '.join(domains)}")
    max_length = cfg.max_length if corpus == "sft" else None
    for domain, (name, subset, split, column, limit) in domains.items():
        column = {"chat": cfg.messages_field, **cfg.text_field}.get(domain, column)
        fingerprint = [name, subset, split, column]
        open_documents = functools.partial(read_hub, *fingerprint)
        if domain in local:
            name, files = local[domain], find_files(local[domain])
            stats = [(file, os.stat(file)) for file in files]
            fingerprint = [column, cfg.encoding, *([file, stat.st_size, stat.st_mtime_ns] for file, stat in stats)]
            open_documents = functools.partial(read_files, files, column, cfg.encoding)
        yield domain, Source(name, open_documents, fingerprint, cfg.val_fraction, cfg.max_tokens or limit, max_length)


# ----------------------------------------------------------------------------------------------------------------- main

CORPORA = {  # settings, domains, and the command that trains on the corpus
    "text": (TextConfig, open_texts, "train.py config/tiny.py --out_dir=out/text"),
    "tiny": (TinyConfig, open_embedded, "train.py config/tiny.py"),
    "tiny_sft": (TinyConfig, open_embedded, "sft.py config/tiny_sft.py"),
    "pretrain": (PaperConfig, open_datasets, "train.py config/pretrain.py"),
    "sft": (PaperConfig, open_datasets, "sft.py config/sft.py"),
}


def main():
    corpus = sys.argv[1] if len(sys.argv) > 1 else None
    if corpus in ("--help", "-h"):
        print(f"{__doc__}\nThe settings of one: python prepare_data.py tiny --help")
        return
    if corpus not in CORPORA:
        found = f"there is no corpus {corpus!r}" if corpus else "name a corpus"
        raise UserError(f"{found}: python prepare_data.py {' | '.join(CORPORA)}")
    settings, open_sources, command = CORPORA[corpus]
    cfg = load(settings, sys.argv[2:])
    if (Path(cfg.data_dir) / "meta.json").exists():
        raise UserError(f"{cfg.data_dir} is a corpus; --data_dir= is the folder of all corpora, for example data")
    encoding, folder = get_tokenizer(cfg.tokenizer, cfg.vocab), Path(cfg.data_dir) / corpus
    try:
        sources = dict(open_sources(cfg, corpus))  # what cannot be read fails before anything is written
        write_corpus(folder, encoding, sources, cfg.vocab, cfg.commit_seconds)
    except OSError as e:
        raise UserError(f"cannot prepare {folder}: {e}; {HOW_TO_RESUME}") from None
    except (KeyboardInterrupt, SystemExit):  # or SIGTERM, SIGHUP
        raise UserError("stopped; run the same command again to resume") from None
    command += f" --data_dir={shlex.quote(str(folder))}"
    if "tokenizer" in cfg.overridden and corpus != "sft":  # sft.py takes over the model's
        command += f" --tokenizer={encoding.name} --vocab_size={encoding.n_vocab}"
    print(f"{folder} is complete; next: python {command}")


if __name__ == "__main__":
    run(main)
