"""Layers below the lowest trained one run once per example; later passes start from what they gave.

    with PrefixCache(trainer.model).installed() as stats:
        trainer.train()

Head adapters mostly sit in upper layers. Everything below the lowest trained layer L is a fixed function of a row's
tokens and positions. What it gives, `h[L] = layer[L-1](... layer[0](embed(tokens)))`, `[tokens, d_model]`, is kept
under a digest of both, and a later pass over that row, in whatever batch, puts it in front of layer L. Losses and
gradients stay the same to rounding. Embeddings, masks and rotary tables are still the model's own, so no family is
special. Padding is 0 there: a loss must not look at it (the position before a left-padded row's first token).

While installed, layers 0..L-1 have a `forward` of their own on the instance (as accelerate's device hooks do), which
passes hidden states through. Modules, parameter names and state dicts stay what they are, so checkpoints written in the
meantime are whole. A pass that the cache cannot serve runs the real layers, and its reason is counted:

    pass over [batch, seq]     all rows known            -> layers 0..L-1 skipped, rows put together, padding 0
                               some unknown              -> those alone run through the real layers first, without grad
                               a key-value cache, other inputs than tokens, packed rows, ...   -> as without the cache

On a CPU, once no unknown row has come for a while, the memory of the skipped layers' weights is given back: they are
read from the checkpoint's file again when they are needed (see `release_pages`).

The cache checks itself: on the 1st, 2nd, 4th, 8th, ... pass made of known rows alone, one row is computed again and
compared, so weights that move, noise on embeddings or anything else that makes keeping wrong ends the run.

Each process keeps what it sees; nothing is sent around.
"""

from .cache import CacheStats, PrefixCache
from .eligibility import lowest_trained, refusal

__all__ = ["CacheStats", "PrefixCache", "lowest_trained", "refusal"]
