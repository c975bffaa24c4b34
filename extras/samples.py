"""Watch a model learn: the text that it writes at each evaluation of train.py."""

from typing import TYPE_CHECKING

import torch

from model import PolychromaticLM

if TYPE_CHECKING:  # train.py runs as __main__: importing it here would load it again
    from train import Corpus


def open_tokenizer(corpus: "Corpus"):
    """The tiktoken.Encoding of a corpus, to print samples; without it, None, and the reason is printed."""
    try:
        from prepare_data import get_tokenizer

        return get_tokenizer(corpus.cfg.tokenizer, corpus.vocab)
    except (ImportError, ValueError) as e:
        print(f"without samples: {str(e).partition(';')[0]}")  # the advice after it is for other scripts
        return None


def write_sample(model: PolychromaticLM, corpus: "Corpus", encoding) -> str:
    """The corpus' prompt and what the model writes after it, in one line. Leaves the global random state alone."""
    from prepare_data import stop_tokens
    from sample import generate

    ids, length = corpus.prompt(), corpus.cfg.sample_tokens
    generator = torch.Generator(model.device).manual_seed(corpus.cfg.seed)
    with torch.compiler.set_stance("force_eager"):  # compiling the blocks for one token would take half a minute
        settings = 0.8, None, None, stop_tokens(encoding), encoding.eot_token, generator
        ids += [token.item() for token in generate(model, [ids], length, *settings)]
    text = encoding.decode_bytes([i for i in ids if i < encoding.eot_token]).decode(errors="replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
