"""One short question to the hub before a model is loaded from it.

Loading asks for every file, and repeats each question for half a minute: with a name that does not exist, and on a
machine without network for a model that lies whole in the cache.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from headtune.analysis.utils.errors import InputError

from . import builtin

log = logging.getLogger(__name__)
_SECONDS = 10


def local_only(name: str, revision: str | None) -> bool:
    """Whether a hub model is to be loaded from the local cache alone: it is there, and the hub cannot be reached.

    Raises:
        InputError: there is no such model, or the hub cannot be reached and the model is not in the local cache.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    expected = f"{builtin.EXPECTED}, a model folder, or a hub id (org/name)"
    cached = False
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        if constants.HF_HUB_OFFLINE:
            if cached:
                return True
            raise InputError(
                f"model {name!r} is neither a folder nor in the local hub cache (offline mode); {expected}"
            )
        HfApi().model_info(name, revision=revision, timeout=_SECONDS)
    except HFValidationError:
        raise InputError(f"model {name!r} is not a folder and not a valid hub id; {expected}") from None
    except InputError:
        raise
    except Exception as error:  # network, HTTP and repository errors come from several libraries
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if cached:
            log.warning("model %s: the hub does not answer (%s); loaded from the local cache", name, reason)
            return True
        raise InputError(
            f"model {name!r} is neither a folder nor reachable on the hub ({reason}); {expected}"
        ) from None
    return False


@contextlib.contextmanager
def offline(switched: bool) -> Iterator[None]:
    """Keep the libraries from asking the hub, as HF_HUB_OFFLINE=1 does; `local_files_only` does not reach them all."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or switched
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
