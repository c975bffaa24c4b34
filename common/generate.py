"""Generation: token ids to token ids, and their text."""

import codecs
import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.data import Corpus
from common.settings import UserError
from model import KVCache, PolychromaticLM, compute_dtype, sum_dtype


@torch.no_grad()
def generate(
    model: PolychromaticLM, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, stop_ids: Collection[int] = (),
    end_of_text: int = -1, generator: torch.Generator | None = None, vocab_size: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Continue prompts, one token of every row at a time: yields [B] int64, -1 in rows that have ended.

    tokens: prompts of any lengths, [B, T] or lists of ids. temperature 0 takes the likeliest token; top_k keeps the
    k likeliest, top_p the fewest whose probabilities reach p. A row ends after a token in stop_ids. After the token
    end_of_text (-1: none) a new document starts, as in training. Ids from vocab_size on (None: none) are never drawn.
    A row longer than block_size continues from its last block_size / 2 tokens. UserError for bad values, an empty
    prompt, several lengths with a "sequence" router, and a model whose output is not finite.
    """
    config, device = model.config, model.device
    prompts = [torch.as_tensor(row, dtype=torch.int64, device=device) for row in tokens]
    if not prompts or any(prompt.dim() != 1 or not len(prompt) for prompt in prompts):
        raise UserError("an empty prompt, or none; start from [[<|endoftext|>]] to write freely")
    if any(prompt.min() < 0 or prompt.max() >= config.vocab_size for prompt in prompts):
        raise UserError(f"a token that is not in 0..{config.vocab_size - 1}")
    check_sampling(temperature, top_k, top_p)
    if config.sees_future and len(set(map(len, prompts))) > 1:
        raise UserError('router_context="sequence" would read the padding too; give prompts of one length')
    context = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")  # [B, T]; -1: padding
    ended = torch.zeros(len(context), dtype=torch.bool, device=device)
    stop = torch.tensor(list(stop_ids), device=device)
    cache = None
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            n_unread = 1
            if cache is None or cache.length == config.block_size:  # read the context
                lengths = (context >= 0).sum(1)
                lengths[lengths > config.block_size] = max(1, config.block_size // 2)  # the recent half of a long row
                lengths[ended] = 1
                n_unread = int(lengths.max())
                is_kept = torch.arange(n_unread, 0, -1, device=device) <= lengths[:, None]
                context = context[:, -n_unread:].where(is_kept, -1)
                if not config.sees_future:  # a "sequence" router has no cache: it reads the context at every step
                    room = min(config.block_size, n_unread + max_new_tokens - step)
                    cache = KVCache(config, len(context), room, device, compute_dtype(model.embedding.weight))
            is_end = (context < 0) | (context == end_of_text)  # each token of the padding is a document
            doc_ids = document_ids(is_end)[:, -n_unread:]
            unread = context[:, -n_unread:].clamp_min(0)
            logits = model(unread, doc_ids=doc_ids if doc_ids.any() else None, cache=cache)[:, -1, :vocab_size].float()
            if not logits.isfinite().all():
                raise UserError("the model's output is not finite: a weight is NaN or too large; use an earlier model")
            token = sample_token(logits, temperature, top_k, top_p, generator).where(~ended, -1)
            yield token
            context = torch.cat((context, token[:, None]), 1)
            ended |= torch.isin(token, stop)
            if ended.all():
                return
    finally:
        model.train(was_training)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None):
    """Raise UserError, naming the one at fault, unless these settings can be sampled with."""
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")


def document_ids(is_end: Tensor) -> Tensor:
    """doc_ids [B, T] of rows in which these tokens, is_end [B, T] bool, are the last of their documents."""
    return is_end.cumsum(1) - is_end.long()


def document_end(model: PolychromaticLM, encoding) -> int:
    """The token that ends a document, which the next one does not see; -1 if the model was trained to see it."""
    return encoding.eot_token if model.isolates_documents else -1


def sample_token(logits: Tensor, temperature: float, top_k=None, top_p=None, generator=None) -> Tensor:
    """One token of every row of logits [B, V] -> [B] int64; arguments as generate()'s."""
    if temperature < torch.finfo(torch.float32).tiny:  # 0, or too small to divide by in float32
        return logits.argmax(-1)
    rounding, logits = torch.finfo(logits.dtype).eps, logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest stays at 0 at any temperature
    p, order = (x[:, :top_k] for x in logits.softmax(-1).sort(dim=-1, descending=True))  # [B, top_k]; None: all V
    if top_p is not None:  # drop a token if the likelier ones reach top_p without it, up to the rounding of the logits
        total = p.to(sum_dtype(p)).cumsum(-1)
        p = p.where(total - p < top_p * (1 - rounding) * total[:, -1:], 0)
    return torch.multinomial(torch.zeros_like(logits).scatter(1, order, p), 1, generator=generator)[:, 0]


def text_deltas(
    model: PolychromaticLM, encoding, prompts: list[list[int]], max_new_tokens: int, stop_ids: Collection[int],
    stop_texts: Sequence[str] = (), temperature: float = 0.0, top_k=None, top_p=None, generator=None,
    new_ids: list[list[int]] | None = None,
) -> Iterator[list[str]]:  # fmt: skip
    """Continue prompts (token ids), each up to a stop token or stop text; yields the new text of each, step by step.

    new_ids: a list for each prompt, which collects its new tokens, without the stop token. An interrupt, such as
    Ctrl-C, first gets the text that was held back because it may begin a stop text.
    """
    longest = max(map(len, stop_texts), default=1)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]  # keep unfinished characters
    held = dict.fromkeys(range(len(prompts)), "")  # by row that has not ended: text that may begin a stop text
    steps = generate(
        model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, document_end(model, encoding), generator,
        encoding.n_vocab,
    )  # fmt: skip
    try:
        for step, tokens in enumerate(steps, start=1):
            deltas = [""] * len(prompts)
            for i, token in [(i, token) for i, token in enumerate(tokens.tolist()) if i in held]:
                if new_ids is not None and token not in stop_ids:
                    new_ids[i].append(token)
                is_last = token in stop_ids or step == max_new_tokens
                text = held[i] + decoders[i].decode(token_bytes(encoding, token), final=is_last)
                stops = [text.index(stop) for stop in filter(None, stop_texts) if stop in text]
                end = min(stops, default=len(text) if is_last else max(0, len(text) - longest + 1))
                deltas[i], held[i] = text[:end], text[end:]
                if is_last or stops:
                    del held[i]
            yield deltas
            if not held:
                return
    except (KeyboardInterrupt, SystemExit):
        yield [held.get(i, "") for i in range(len(prompts))]
        raise


def token_bytes(encoding, token: int) -> bytes:
    """The text of a token; none of a special token, which Qwen3's <think> and <tool_call> are not."""
    return b"" if encoding.is_special_token(token) else encoding.decode_single_token_bytes(token)


def visible_text(encoding, ids: Sequence[int]) -> str:
    """The text of tokens, as text_deltas() gives it."""
    return b"".join(token_bytes(encoding, token) for token in ids).decode(errors="replace")


def generate_texts(*arguments, **settings) -> list[str]:
    """The whole text of each prompt's continuation; arguments as text_deltas()'s."""
    return ["".join(deltas) for deltas in zip(*text_deltas(*arguments, **settings))]


@functools.cache
def open_tokenizer(name: str, vocab: str | None):
    """The tokenizer of the samples in training; without it None, and the reason is printed once."""
    try:
        from common.tokenizer import get_tokenizer

        return get_tokenizer(name, vocab)
    except (ImportError, UserError) as e:
        print(f"without samples: {str(e).partition(';')[0]}")  # the advice after it is for other scripts


def print_sample(heading: str, model: PolychromaticLM, corpus: Corpus, length: int, seed: int):
    """Print the corpus's prompt and what the model writes after it, in one line; leaves the global RNG alone."""
    if encoding := open_tokenizer(corpus.tokenizer, corpus.vocab):
        generator = torch.Generator(model.device).manual_seed(seed)
        prompt, stops = corpus.prompt(), set(filter(encoding.is_special_token, range(encoding.n_vocab)))
        with torch.compiler.set_stance("force_eager"):  # compiling the blocks for one token would take half a minute
            (new,) = generate_texts(model, encoding, [prompt], length, stops, temperature=0.8, generator=generator)
        text = visible_text(encoding, prompt) + new
        print(heading, "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), flush=True)
