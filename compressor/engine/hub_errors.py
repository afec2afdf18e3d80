"""What the many errors of the hub's client mean, in one line each."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from compressor.engine.hub_names import HUGGING_FACE, HubName
from compressor.errors import UserError


@contextmanager
def translated(model: HubName, endpoint: str | None = None, *, doing: str = "fetch") -> Iterator[None]:
    """Turn what huggingface_hub raises in the body into a `UserError` of one line.

    Args:
        endpoint: URL of the hub, where it is not the configured one.
        doing: ``fetch`` or ``push``: what a full disk or a refusal is about.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error, model, endpoint, doing=doing) from error


def hub_error(error: BaseException, model: HubName, endpoint: str | None = None, *, doing: str = "fetch") -> UserError:
    """Say in one line what an error of huggingface_hub means, and what mends it."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            what = f"{model} is no folder here, not in the cache" if doing == "fetch" else "nothing can be uploaded"
            return UserError(f"{what}, and HF_HUB_OFFLINE keeps compressor off the network", fix="unset HF_HUB_OFFLINE")
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause, model, hub, doing)
        if isinstance(cause, HFValidationError):
            return UserError(f"{model.id!r} is no name that a hub allows: {_first_line(cause)}", fix="namespace/name")
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"the disk is full: {model} does not fit {constants.HF_HUB_CACHE}",
                fix="free space there, or set HF_HOME to a folder on a larger disk; the same command goes on",
            )
        if isinstance(cause, httpx2.TimeoutException):
            return UserError(f"{hub} did not answer in time", fix="check the network; the same command goes on")
        if isinstance(cause, httpx2.ConnectError | httpx2.ProxyError):
            return UserError(
                f"cannot reach {hub} ({_first_line(cause)})",
                fix="check the network"
                + ("" if hub == HUGGING_FACE else " and the address")
                + (", or give a local folder" if doing == "fetch" else "; the same command goes on"),
            )
        if isinstance(cause, httpx2.TransportError) or "Consistency check failed" in str(cause):
            return UserError(f"the connection to {hub} broke off", fix="the same command goes on where it stopped")
    return UserError(
        f"the hub {hub} did something unexpected with {model}: {type(causes[-1]).__name__}: {_first_line(causes[-1])}",
        fix="check the address, or try again",
    )


def _answered(error: Any, model: HubName, hub: str, doing: str) -> UserError:
    """The same of an error status with which the hub has answered."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RevisionNotFoundError

    status, told = error.response.status_code, error.server_message
    told = f" ({' '.join(str(told).split())})" if told else ""
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{model.id} is gated: its authors want its terms accepted first",
            fix=f"accept them at {hub}/{model.id}, then set HF_TOKEN (or run `hf auth login`)",
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{model.id} has no revision {model.revision or 'main'!r}",
            fix=f"its branches and tags are at {hub}/{model.id}/tree/main",
        )
    if isinstance(error, DisabledRepoError):
        return UserError(f"{hub} has switched {model.id} off", fix="choose another model")
    if status == 401 and "credentials" in (str(error) + str(error.response.headers.get("X-Error-Message"))).lower():
        return UserError(
            f"{hub} does not accept the token", fix="make another and set HF_TOKEN (or run `hf auth login`)"
        )
    here = "; nor is there a folder of that name here" if doing == "fetch" else ""
    if status in (401, 404):  # a hub answers 401 for what does not exist, too: it does not tell the two apart
        return UserError(
            f"{hub} has no model {model.id!r}, or it is private{here}",
            fix="check the name; set HF_TOKEN (or run `hf auth login`) if it is private",
        )
    if status == 403:
        right = "write to" if doing == "push" else "read"
        return UserError(
            f"the token may not {right} {model.id}{told}", fix=f"make one that may, at {hub}/settings/tokens"
        )
    if status == 413:
        return UserError(f"{hub} takes no files of this size{told}", fix="free space there, or use another hub")
    if status == 429:
        return UserError(f"{hub} allows no more requests for now", fix=f"try again {_when(error.response.headers)}")
    if status >= 500:
        return UserError(f"{hub} has a problem of its own (status {status}{told})", fix="try the same command later")
    return UserError(f"{hub} refused with status {status}{told}", fix=f"see {hub}/{model.id}")


def _when(headers: Mapping[str, str]) -> str:
    """When a rate limit ends, in words."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    wait = headers.get("Retry-After") or (str(limit.reset_in_seconds) if limit else "")
    return f"in {wait} seconds" if wait.isdigit() else "later"


def _causes(error: BaseException) -> list[BaseException]:
    """An error, and what it was raised from, and what that was."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__
    return chain


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
