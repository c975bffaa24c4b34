"""Generation: token ids to token ids, and their text."""

import codecs
import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from common.data import Corpus
from common.settings import UserError
from model import KVCache, ModelConfig, PolychromaticLM, compute_dtype, sum_dtype

DECODING_OPTIONS = {"cpp.min_chunk_size": 2**13}  # of compile(): threads cost more than they save on one token


@torch.no_grad()
def generate(
    model: PolychromaticLM, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, stop_ids: Collection[int] = (),
    end_of_text: int = -1, generator: torch.Generator | None = None, vocab_size: int | None = None,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Continue prompts, one token of every row at a time: yields [B] int64, -1 in rows that have ended.

    tokens: prompts of any lengths, [B, T] or lists of ids. temperature 0 takes the likeliest token; top_k keeps the
    k likeliest, top_p the fewest whose probabilities reach p. A row ends after a token in stop_ids. After the token
    end_of_text (-1: none) a new document starts, as in training. Ids from vocab_size on (None: none) are never drawn.
    A row longer than block_size continues from its last block_size / 2 tokens. cache: holds the first tokens of all
    prompts, which are not read again. UserError for bad values, an empty prompt, several lengths with a "sequence"
    router, and a model whose output is not finite.
    """
    config, device = model.config, model.device
    rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in tokens]  # all tokens so far
    check_prompts(rows, config)
    check_sampling(temperature, top_k, top_p)
    is_active = [True] * len(rows)
    step_graph = None
    was_training = model.training
    model.eval()
    try:
        for n_left in range(max_new_tokens, 0, -1):
            if cache is None or cache.length == cache.max_length:  # start from the rows, or from the recent half
                # a row that has ended keeps one token, so as not to lengthen the batch
                rows = [row if active else row[-1:] for row, active in zip(rows, is_active)]
                n_recent = max(1, config.block_size // 2)
                rows = [row if len(row) <= config.block_size else row[-n_recent:] for row in rows]
                room = min(config.block_size, max(map(len, rows)) + n_left)
                if not config.sees_future:  # a "sequence" router has no cache: it reads the rows at every step
                    cache = KVCache(config, len(rows), room, device, compute_dtype(model.embedding.weight))
                step_graph = None
            unread, doc_ids = next_inputs(rows, cache.length if cache else 0, end_of_text, device)
            is_step = cache and cache.length > 0 and unread.size(1) == 1 and doc_ids is None
            if is_step and step_graph:
                logits = step_graph(unread)
            else:
                logits = model(unread, doc_ids=doc_ids, cache=cache)
                if is_step and cache.length < cache.max_length and StepGraph.fits(model):  # this step was its warm-up
                    step_graph = StepGraph(model, unread, cache)
            logits = logits[:, -1, :vocab_size]
            is_finite = logits.isfinite().all(-1)
            logits = logits.where(is_finite[:, None], 0)  # which can be sampled from
            token = sample_token(logits, temperature, top_k, top_p, generator)
            ids = token.where(is_finite, -1).tolist()
            if -1 in ids:
                raise UserError("the model's output is not finite: a weight is NaN or too large; use an earlier model")
            for row, new in zip(rows, ids):
                row.append(new)
            yield torch.tensor([new if active else -1 for new, active in zip(ids, is_active)], device=device)
            is_active = [active and new not in stop_ids for new, active in zip(ids, is_active)]
            if not any(is_active):
                return
    finally:
        model.train(was_training)


def check_prompts(rows: list[list[int]], config: ModelConfig):
    """Raise UserError unless these prompts can be continued together."""
    if not rows or not all(rows):
        raise UserError("an empty prompt, or none; start from [[<|endoftext|>]] to write freely")
    if any(min(row) < 0 or max(row) >= config.vocab_size for row in rows):
        raise UserError(f"a token id outside 0..{config.vocab_size - 1}")
    if config.sees_future and len(set(map(len, rows))) > 1:
        raise UserError('router_context="sequence" would read the padding too; give prompts of one length')


def next_inputs(
    rows: list[list[int]], n_read: int, end_of_text: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Tokens and doc_ids of the rows after the n_read that a cache holds, [B, n] int64; padded on the left.

    Each token of the padding counts as a document. doc_ids are None without padding and without a document's end.
    """
    longest = max(map(len, rows))
    n = longest - n_read
    tokens = [([0] * (longest - len(row)) + row[-n:])[-n:] for row in rows]
    has_padding = n_read == 0 and any(len(row) < longest for row in rows)
    doc_ids = None
    if has_padding or any(end_of_text in row[max(0, len(row) - n - 1) : -1] for row in rows):
        padded = torch.tensor([[-1] * (longest - len(row)) + row for row in rows], device=device)
        doc_ids = document_ids((padded == -1) | (padded == end_of_text))[:, -n:]
    return torch.tensor(tokens, device=device), doc_ids


def prepare_weights(model: PolychromaticLM, dtype: torch.dtype):
    """Store the matrices in the dtype and the layout that decoding reads fastest.

    The cast replaces autocast's, whose copies fill memory and cannot stay in a CUDA graph. The embedding is cast too,
    so in bfloat16 the residual stream is less exact than in training. In float32 on a CPU, where memory bandwidth is
    the limit, the longer side of each matrix is contiguous.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.to(dtype).weight
            if weight.device.type == "cpu" and dtype == torch.float32 and weight.size(0) > weight.size(1):
                weight.data = weight.t().contiguous().t()


class StepGraph:
    """A decoding step as a CUDA graph: a replay launches all of its kernels at once."""

    def __init__(self, model: PolychromaticLM, tokens: Tensor, cache: KVCache):
        self.tokens = tokens.clone()
        self.cache = cache
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records the step without running it
            self.logits = model(self.tokens, cache=cache)
        cache.length -= 1

    @staticmethod
    def fits(model: PolychromaticLM) -> bool:
        """Whether the model is on a GPU, with weights in autocast's dtype: a graph must not hold autocast's copies."""
        weight = model.embedding.weight
        return weight.is_cuda and weight.dtype == compute_dtype(weight)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [B, 1, vocab_size] of model(tokens, cache=cache)."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.cache.length += 1
        return self.logits


def check_sampling(temperature: float, top_k: int | None, top_p: float | None):
    """Raise UserError, naming the setting at fault, unless all of them are valid."""
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
    """The token after which generate() starts a new document; -1 for a model that was trained across documents."""
    return encoding.eot_token if model.isolates_documents else -1


def sample_token(logits: Tensor, temperature: float, top_k=None, top_p=None, generator=None) -> Tensor:
    """One token of every row of logits [B, V] -> [B] int64; arguments as generate()'s."""
    if temperature < torch.finfo(torch.float32).tiny:  # 0, or too small to divide by in float32
        return logits.argmax(-1)
    rounding, logits = torch.finfo(logits.dtype).eps, logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest stays at 0 at any temperature
    p, order = (x[:, :top_k] for x in logits.softmax(-1).sort(dim=-1, descending=True))  # [B, top_k]; None: all V
    if top_p is not None:  # keep the likeliest tokens until they reach top_p, up to the rounding of the logits
        total = p.to(sum_dtype(p)).cumsum(-1)
        p = p.where(total - p < top_p * (1 - rounding) * total[:, -1:], 0)
    return torch.multinomial(torch.zeros_like(logits).scatter(1, order, p), 1, generator=generator)[:, 0]


def text_deltas(
    model: PolychromaticLM, encoding, prompts: list[list[int]], max_new_tokens: int, stop_ids: Collection[int],
    stop_texts: Sequence[str] = (), temperature: float = 0.0, top_k=None, top_p=None, generator=None,
    new_ids: list[list[int]] | None = None, cache: KVCache | None = None,
) -> Iterator[list[str]]:  # fmt: skip
    """Continue prompts (token ids), each up to a stop token or stop text; yields the new text of each, step by step.

    new_ids: a list for each prompt, which collects its new tokens, without the stop token. cache: see generate(). On
    an interrupt, such as Ctrl-C, yields the text that was held back because it may begin a stop text.
    """
    longest = max(map(len, stop_texts), default=1)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]  # keep unfinished characters
    held = dict.fromkeys(range(len(prompts)), "")  # by row that has not ended: text that may begin a stop text
    steps = generate(
        model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, document_end(model, encoding), generator,
        encoding.n_vocab, cache,
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
    """A token's text; empty if it is special. Qwen3's <think> and <tool_call> are not."""
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
        print(f"no samples: {str(e).partition(';')[0]}")  # the advice after it is for other scripts


def print_sample(heading: str, model: PolychromaticLM, corpus: Corpus, length: int, seed: int):
    """Print the corpus's prompt and what the model writes after it, in one line; leaves the global RNG alone."""
    if encoding := open_tokenizer(corpus.tokenizer, corpus.vocab):
        generator = torch.Generator(model.device).manual_seed(seed)
        prompt, stops = corpus.prompt(), set(filter(encoding.is_special_token, range(encoding.n_vocab)))
        with torch.compiler.set_stance("force_eager"):  # compiling the blocks for one token would take half a minute
            (new,) = generate_texts(model, encoding, [prompt], length, stops, temperature=0.8, generator=generator)
        text = visible_text(encoding, prompt) + new
        print(heading, "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), flush=True)
