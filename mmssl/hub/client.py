"""What can go wrong between here and the Hub, each in one sentence with its way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from mmssl.errors import RunError

WAYS_OUT = {
    401: "the Hub does not know you; run `hf auth login` or set HF_TOKEN",
    403: "your token may not do this; make one with write access to that namespace at https://huggingface.co/settings/tokens",
    404: "there is no such repository, or it is private and your token does not open it",
    429: "the Hub is limiting your requests; wait a few minutes",
}


@contextmanager
def explain(what: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of its HTTP client into a RunError that begins with `what`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # HTTPError of the HTTP client, whose package changed its name between releases of huggingface_hub.
    unreachable = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        yield
    except (unreachable, OSError, ValueError, RuntimeError) as error:
        reason = _reason(error, unreachable, constants.ENDPOINT)
        raise RunError(f"{what}: {reason}") from error


def _reason(error: BaseException, unreachable: type[BaseException], endpoint: str) -> str:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    # The library wraps what happened in "not found in the cache" and "error while uploading".
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, RevisionNotFoundError):
            return "the repository has no such revision; name a branch, a tag or a commit after the @"
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            return WAYS_OUT.get(status, f"the Hub answered {status}: {link.server_message or _line(link)}")
        if isinstance(link, LocalTokenNotFoundError):
            return WAYS_OUT[401]
        if isinstance(link, HFValidationError):
            return "no repository can have such a name"
        if isinstance(link, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to use the network"
        if isinstance(link, unreachable):
            return f"cannot reach {endpoint} ({_line(link) or type(link).__name__}); check the network and HF_ENDPOINT"
    return _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
