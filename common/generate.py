"""Generation: token ids to token ids, and their text."""

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.data import Corpus
from common.settings import UserError
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
    block_size / 2 tokens. Raises UserError for an empty prompt, and for a "sequence" router with prompts of different
    lengths.
    """
    rows = [list(map(int, row)) for row in tokens]
    check_generation(model.config, rows, temperature, top_k, top_p)
    block_size = model.config.block_size
    stop = torch.tensor(sorted(stop_ids), device=model.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    cache = None
    was_training = model.training
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
            for row, new in zip(rows, token.tolist()):
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
    unpadded = [torch.tensor(row, device=device) for row in rows]
    tokens = pad_sequence(unpadded, batch_first=True, padding_value=-1, padding_side="left")
    starts = (tokens == -1) | (tokens == end_of_text)  # at the next token
    return tokens.clamp_min(0), F.pad(starts[:, :-1].cumsum(1), (1, 0))


def check_generation(config: ModelConfig, rows: list[list[int]], temperature: float, top_k, top_p):
    """Raise UserError for prompts or settings that generate() cannot use."""
    if not rows or not all(rows):
        raise UserError("an empty prompt; start from <|endoftext|> to write freely")
    if not all(0 <= token < config.vocab_size for row in rows for token in row):
        raise UserError(f"a token that is not in 0..{config.vocab_size - 1}")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: need >= 0, >= 1 and in (0, 1]")
    if config.sees_future and len(set(map(len, rows))) > 1:
        raise UserError('router_context="sequence" would read the padding too; give prompts of one length')


def text_deltas(
    model: PolychromaticLM, encoding, prompts: list[list[int]], max_new_tokens: int, stop_ids: Collection[int],
    stop_texts: Sequence[str] = (), temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[str]]:  # fmt: skip
    """Continue prompts (token ids), each up to a stop token or a stop text; yields the new text of each, step by step.

    The bytes of an unfinished character and text that may be the beginning of a stop text are held back until they are
    decided. Special tokens have no text.
    """
    stops = [stop for stop in stop_texts if stop]
    longest = max(map(len, stops), default=1)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    held = [""] * len(prompts)
    ended = [False] * len(prompts)
    settings = temperature, top_k, top_p, stop_ids, encoding.eot_token, generator
    for step, tokens in enumerate(generate(model, prompts, max_new_tokens, *settings), start=1):
        deltas = [""] * len(prompts)
        for i, token in enumerate(tokens.tolist()):
            if ended[i]:
                continue
            is_last = token in stop_ids or step == max_new_tokens
            new_bytes = encoding.decode_single_token_bytes(token) if token < encoding.eot_token else b""
            text = held[i] + decoders[i].decode(new_bytes, final=is_last)
            stop = min((text.index(stop) for stop in stops if stop in text), default=None)
            ended[i] = is_last or stop is not None
            end = stop if ended[i] else max(0, len(text) - longest + 1)
            deltas[i], held[i] = text[:end], text[end:]
        yield deltas
        if all(ended):
            return


def generate_texts(*arguments, **settings) -> list[str]:
    """The whole text of each prompt's continuation; arguments as text_deltas()'s."""
    return ["".join(deltas) for deltas in zip(*text_deltas(*arguments, **settings))]


def sample_writer(corpus: Corpus, length: int, seed: int) -> Callable[[PolychromaticLM], str] | None:
    """A function that continues the corpus's prompt, for training to show; None, and why, without its tokenizer."""
    try:
        from common.tokenizer import get_tokenizer, stop_tokens

        encoding = get_tokenizer(corpus.tokenizer, corpus.vocab)
    except (ImportError, UserError) as e:
        print(f"without samples: {str(e).partition(';')[0]}")  # the advice after it is for other scripts
        return None

    def write_sample(model: PolychromaticLM) -> str:
        """The prompt and what the model writes after it, in one line. Leaves the global random state alone."""
        generator, prompt = torch.Generator(model.device).manual_seed(seed), corpus.prompt()
        settings = {"stop_ids": stop_tokens(encoding), "temperature": 0.8, "generator": generator}
        with torch.compiler.set_stance("force_eager"):  # compiling the blocks for one token would take half a minute
            (answer,) = generate_texts(model, encoding, [prompt], length, **settings)
        text = encoding.decode([token for token in prompt if token < encoding.eot_token]) + answer
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    return write_sample
