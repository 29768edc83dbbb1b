"""Why the Hugging Face hub does not give a repository, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What its client raises without a network or an answer is of the HTTP library's types, which are its own error's bases.
HUB_ERRORS = HfHubHTTPError.__bases__

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_TOKENS = "https://huggingface.co/settings/tokens"


def refusal(repository: str, error: BaseException | None) -> str | None:
    """What to do about a repository that the hub refused, if ``error`` or what caused it says so; else ``None``.

    It is half a sentence, which begins with "the hub" and ends with a full stop.
    """
    answers = (cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError) and _is_about(repository, cause))
    return next((advice for answer in answers if (advice := _advice(repository, answer)) is not None), None)


def absence(source: str | Path, error: BaseException) -> str:
    """Why there is no ``source``: no such directory, and ``error`` when the hub was asked; half a sentence."""
    causes = list(_causes(error))
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return f"there is no directory {source}, and it is no hub id either."
    advice = refusal(str(source), error)
    if advice is None and isinstance(error, OSError) and error.strerror and not isinstance(error, HfHubHTTPError):
        return f"there is no directory {source}, and the download could not be kept: {error.strerror}."
    telling = next((cause for cause in causes if isinstance(cause, HUB_ERRORS[0])), causes[-1])
    status = f" {telling.response.status_code}" if isinstance(telling, HfHubHTTPError) else ""
    silence = f"the hub did not give it ({type(telling).__name__}{status}); check the path, the id or the network."
    return f"there is no directory {source}, and {advice or silence}"


def is_absence(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that the hub gave nothing, and not what is wrong with what it gave."""
    kinds = (HUB_ERRORS[0], HFValidationError, LocalEntryNotFoundError)
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_about(repository: str, answer: HfHubHTTPError) -> bool:
    """Not so of an answer that somebody was handling already when this repository was asked for."""
    return any(repository in str(asked.request.url) for asked in (answer.response, *answer.response.history))


def _advice(repository: str, answer: HfHubHTTPError) -> str | None:
    status, sent_token = answer.response.status_code, "authorization" in answer.response.request.headers
    if isinstance(answer, GatedRepoError):
        return f"the hub says that {repository} is gated: accept the terms on its page on the hub, then {_LOG_IN}."
    if isinstance(answer, DisabledRepoError):
        return f"the hub has disabled {repository}: choose another."
    # The client takes a token that has expired for a repository that does not exist.
    if status == 401 and sent_token:
        return (
            f"the hub did not accept the token that it was sent for {repository}: make a new one on {_TOKENS}, then "
            f"{_LOG_IN}, which counts before a login."
        )
    if status == 401 or isinstance(answer, RepositoryNotFoundError):
        return f"the hub has no {repository}, or shows it to its members alone: check the name, and {_LOG_IN}."
    if isinstance(answer, RevisionNotFoundError):
        return f"the hub has {repository}, but not the revision that was asked for: see on its page which there are."
    if status == 403 and sent_token:
        return (
            f"the hub does not let the token that it was sent read {repository}: if it is fine-grained, give it on "
            f"{_TOKENS} the permission to read public gated repositories, or this one if it is private."
        )
    return None
