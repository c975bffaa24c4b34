"""Text to token ids: tokenizers and the chat format."""

import functools
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken

from common.settings import UserError

ROLES = ("system", "user", "assistant")
CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_SPECIALS = (
    *CHAT_SPECIALS, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
QWEN3_TEXT = QWEN3_SPECIALS[14:]  # from <tool_call> on: Qwen3's own tokenizer decodes these as text
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN3_REVISION = "da87bfb608c14b7cf20ba1ce41287e8de496c0cd"  # commit of Qwen/Qwen3-0.6B-Base


@functools.cache
def get_tokenizer(name: str, vocab: str | None = None) -> tiktoken.Encoding:
    """The tokenizer of this name; use it through encode(). Raises UserError if it is unknown or cannot be read.

    "bytes": 256 bytes, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258.
    "gpt2", "qwen3": byte-level BPE from the file `vocab` (None: downloaded), then the same three, or Qwen3's 26, of
    which <think>, <tool_call> and the other QWEN3_TEXT decode as text.
    """
    if name == "bytes":
        ranks, specials, pattern = {bytes([i]): i for i in range(256)}, CHAT_SPECIALS, r"[^\n]+|\n+"
    elif name == "gpt2":
        ranks, specials, pattern = read_vocab(vocab) if vocab else download(name), CHAT_SPECIALS, GPT2_PATTERN
    elif name == "qwen3":
        ranks, specials, pattern = read_vocab(vocab) if vocab else download(name), QWEN3_SPECIALS, QWEN3_PATTERN
    else:
        raise UserError(f"unknown tokenizer {name!r}; there are bytes, gpt2, qwen3")
    special_ids = {special: len(ranks) + i for i, special in enumerate(specials)}
    # As ranks, these decode as text. encode() never yields one, because the pattern splits its name.
    ranks |= {special.encode(): special_ids.pop(special) for special in QWEN3_TEXT if special in special_ids}
    return tiktoken.Encoding(name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids)


def download(name: str) -> dict[bytes, int]:
    """The merge ranks of gpt2 or qwen3, downloaded on first use, then from the cache of tiktoken or of the hub."""
    from huggingface_hub import hf_hub_download, utils

    utils.logging.set_verbosity_error()  # no line for every retry
    try:
        if name == "gpt2":
            return tiktoken.get_encoding("gpt2")._mergeable_ranks
        return read_vocab(hf_hub_download("Qwen/Qwen3-0.6B-Base", "vocab.json", revision=QWEN3_REVISION))
    except (OSError, ValueError):  # no network, or another page in its place
        raise UserError(f"cannot fetch the {name} tokenizer; name a local vocab.json: --vocab=") from None


def read_vocab(path: str) -> dict[bytes, int]:
    """{bytes of a token: its merge rank, which is its id} from a vocab.json, in GPT-2's printable alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8"))
        ids.pop("<|endoftext|>", None)  # GPT-2's file lists it
        ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids.items()}
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("ids with gaps, or a byte without a token")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path} is not a vocab.json of a byte-level BPE tokenizer ({e!r})") from None
    return ranks


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of a text, [n] uint32. Text never becomes a special token. Qwen3 normalizes to NFC first."""
    if encoding.name == "qwen3":
        text = unicodedata.normalize("NFC", text)
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        return encode(encoding, replace_lone_surrogates(text))
    except ValueError:  # the pattern fails on a run of a million spaces: split the text in two
        return np.concatenate([encode(encoding, text[: len(text) // 2]), encode(encoding, text[len(text) // 2 :])])


def replace_lone_surrogates(text: str) -> str:
    """The text with U+FFFD in place of lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def canonical(text: str) -> str:
    """One string for all texts that differ only in Unicode form or white space, for any tokenizer."""
    return " ".join(unicodedata.normalize("NFC", replace_lone_surrogates(text)).split())


def encode_chat(encoding: tiktoken.Encoding, messages: list[dict], reply=False) -> tuple[np.ndarray, np.ndarray]:
    """A conversation in ChatML: token ids [n] uint32 and loss mask [n] uint8.

    messages: {"role": "system", "user" or "assistant", "content": text}, else UserError; a model's own answer may be
    the array of its token ids instead. The mask is 1 on what the assistant says, its <|im_end|> and newline.
    <|endoftext|> comes last, or with reply=True, the start of an answer.
    """
    eot, start, end = (np.array([encoding.encode_single_token(name)], dtype=np.uint32) for name in CHAT_SPECIALS)
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError("no messages")
    parts = []  # (token ids, whether they count in the loss)
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"the role {role!r}, not one of {', '.join(ROLES)}")
        ids = encode(encoding, content) if isinstance(content, str) else content
        if not isinstance(ids, np.ndarray):
            raise UserError("content that is not text")
        parts += [(start, False), (encode(encoding, f"{role}\n"), False)]
        parts += [(ids, role == "assistant") for ids in (ids, end, encode(encoding, "\n"))]
    parts += [(start, False), (encode(encoding, "assistant\n"), False)] if reply else [(eot, False)]
    loss_mask = np.concatenate([np.full(len(ids), has_loss, np.uint8) for ids, has_loss in parts])
    return np.concatenate([ids for ids, _ in parts]), loss_mask


def stop_tokens(encoding: tiktoken.Encoding) -> set[int]:
    """The tokens that end an answer."""
    return {encoding.encode_single_token(name) for name in ("<|endoftext|>", "<|im_end|>")}


def text_hash(text: str) -> int:
    """A hash, uniform in 0 .. 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether documents with this key go to val. A hash decides, so that this fraction of all keys does."""
    return text_hash(key) < fraction * 2**64
