"""Generation: token ids to token ids, and their text."""

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, ModelConfig, PolychromaticLM, compute_dtype


@torch.no_grad()
def generate(
    model: PolychromaticLM, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, stop_ids: Collection[int] = (),
    end_of_text: int = -1, generator: torch.Generator | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Continue prompts, one token of every row at a time: yields [B] int64, -1 in rows that have ended.

    tokens: prompts of any lengths, [B, T] or lists of ids. temperature 0 takes the likeliest token; top_k keeps the
    k likeliest, top_p the fewest whose probabilities reach p. A row ends after a token in stop_ids. After the token
    end_of_text (-1: none) a new document starts, as in training. A row longer than block_size continues from its last
    block_size / 2 tokens. Raises ValueError for an empty prompt, and for a "sequence" router with prompts of different
    lengths.
    """
    rows, block_size = [list(map(int, row)) for row in tokens], model.config.block_size
    check_generation(model.config, rows, temperature, top_k, top_p)
    stop = torch.tensor(sorted(stop_ids), device=model.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    cache, was_training = None, model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            if cache is None or cache.length == block_size:
                # Read the prompts. When the cache is full, start a new one from the recent half of each row that no
                # longer fits; a row that has ended needs one token. A "sequence" router has no cache: it rereads all.
                half = max(1, block_size // 2)
                rows = [row[-half:] if len(row) > block_size else row for row in rows]
                rows = [row[-1:] if done else row for row, done in zip(rows, ended.tolist())]
                unread, doc_ids = pad_left(rows, end_of_text, model.device)
                if not model.config.sees_future:
                    room = min(block_size, unread.size(1) + max_new_tokens - step)
                    cache = KVCache(model.config, len(rows), room, model.device, compute_dtype(model.embedding.weight))
            logits = model(unread, doc_ids=doc_ids if doc_ids.any() else None, cache=cache)
            token = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            yield torch.where(ended, -1, token)
            for row, new, has_ended in zip(rows, token.tolist(), ended.tolist()):
                if not has_ended:
                    row.append(new)
            ended |= torch.isin(token, stop)
            if ended.all():
                return
            doc_ids = doc_ids[:, -1:] + (unread[:, -1:] == end_of_text)
            unread = token[:, None]
    finally:
        model.train(was_training)


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None = None
) -> Tensor:
    """One token of every row of logits [B, V] -> [B] int64; arguments as generate()'s."""
    if temperature < torch.finfo(torch.float32).tiny:  # 0, or too small to divide by in float32
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest stays at 0 at any temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True)
        outside = p.cumsum(-1) - p >= top_p  # True if the likelier tokens reach top_p without this one
        logits = logits.masked_fill(torch.empty_like(outside).scatter(1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def pad_left(rows: list[list[int]], end_of_text: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and doc_ids [B, T] of rows of any length. A document starts after end_of_text and after padding."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[-1] * (longest - len(row)) + row for row in rows], device=device)
    starts = (tokens == -1) | (tokens == end_of_text)  # at the next token
    return tokens.clamp_min(0), F.pad(starts[:, :-1].cumsum(1), (1, 0))


def check_generation(config: ModelConfig, rows: list[list[int]], temperature: float, top_k, top_p):
    """Raise ValueError for prompts or settings that generate() cannot use."""
    if not rows or not all(rows):
        raise ValueError("an empty prompt; start from <|endoftext|> to write freely")
    if not all(0 <= token < config.vocab_size for row in rows for token in row):
        raise ValueError(f"a token that is not in 0..{config.vocab_size - 1}")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: need >= 0, >= 1 and in (0, 1]")
    if config.sees_future and len(set(map(len, rows))) > 1:
        raise ValueError('router_context="sequence" would read the padding too; give prompts of one length')


def generate_texts(
    model: PolychromaticLM, encoding, prompts: list[list[int]], max_new_tokens: int,
    stop_ids: set[int], stop_texts: Sequence[str] = (), temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None,
) -> list[str]:  # fmt: skip
    """Continue a batch of prompts (token ids), each up to a stop token or to where a stop text begins."""
    stops = [text.encode() for text in stop_texts if text]
    texts, unfinished = [b""] * len(prompts), set(range(len(prompts)))
    for tokens in generate(model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, encoding.eot_token):
        tokens = tokens.tolist()
        for i in list(unfinished):
            if tokens[i] < encoding.eot_token:  # special tokens have no text
                texts[i] += encoding.decode_single_token_bytes(tokens[i])
            if tokens[i] in stop_ids or any(stop in texts[i] for stop in stops):
                unfinished.remove(i)
        if not unfinished:
            break
    ends = [min((text.index(stop) for stop in stops if stop in text), default=len(text)) for text in texts]
    return [text[:end].decode(errors="replace") for text, end in zip(texts, ends)]


def open_tokenizer(corpus):
    """The tiktoken.Encoding of a corpus, to print samples; without it, None, and the reason is printed."""
    try:
        from common.tokenizer import get_tokenizer

        return get_tokenizer(corpus.cfg.tokenizer, corpus.vocab)
    except (ImportError, ValueError) as e:
        print(f"without samples: {str(e).partition(';')[0]}")  # the advice after it is for other scripts
        return None


def write_sample(model: PolychromaticLM, corpus, encoding) -> str:
    """The corpus' prompt and what the model writes after it, in one line. Leaves the global random state alone."""
    from common.tokenizer import stop_tokens

    ids, length = corpus.prompt(), corpus.cfg.sample_tokens
    generator = torch.Generator(model.device).manual_seed(corpus.cfg.seed)
    with torch.compiler.set_stance("force_eager"):  # compiling the blocks for one token would take half a minute
        settings = 0.8, None, None, stop_tokens(encoding), encoding.eot_token, generator
        ids += [token.item() for token in generate(model, [ids], length, *settings)]
    text = encoding.decode_bytes([i for i in ids if i < encoding.eot_token]).decode(errors="replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
