"""Asking the Hugging Face hub: whether a name is a hub id, whether the hub answers, and who a token belongs to.

Used wherever a model or a data set is loaded, and by the upload.
"""

import os
import re
import sys
import threading

from pipeline.errors import InputError, reason

PATIENCE = 8  # seconds to wait for an answer


def is_local(name):
    """Whether a --model_name, --dataset or --sem_model is a path on this machine, and not a hub id like user/name."""
    return os.path.exists(name) or not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", name)


def within_seconds(seconds, call):
    """call(), or TimeoutError after so many seconds. Raises what the call raises.

    The call runs in a thread, because no timeout of the hub's library limits the look-up of the host's name.
    """
    results, errors = [], []

    def run():
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError("no answer")
    return results[0]


def ask_hub_once(name, repo_type):
    """Make every library use only its cache if the hub does not answer a question about this repository.

    Otherwise each library asks again and again: over a minute without a network, and forever where a firewall drops
    the packets.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        within_seconds(PATIENCE, lambda: huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=PATIENCE))
        return
    except HfHubHTTPError as error:
        if error.response.status_code < 500:  # "no such repository" is an answer, "service unavailable" is not
            return
    except Exception:  # connection refused, no such host, time out, offline mode: each library has its own
        pass
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it copied the setting when it was imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def cannot_load(flag, name, what, error):
    """The InputError for a model or data set that a library could not load."""
    if is_local(name):
        return InputError(f"{flag} {name}: the {what} in this folder cannot be loaded ({reason(error)})")
    from huggingface_hub import constants

    why = reason(error)
    if constants.HF_HUB_OFFLINE:
        why = "the hub cannot be reached, or HF_HUB_OFFLINE is set, and it is not in the cache"
    return InputError(f"{flag} {name}: the {what} could not be downloaded; give {flag} a local folder ({why})")


def who_am_i():
    """What the hub says about the token. Raises what the hub's library raises, and TimeoutError without an answer."""
    from huggingface_hub import HfApi

    return within_seconds(PATIENCE, HfApi().whoami)
