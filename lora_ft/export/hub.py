"""Publishing: one atomic commit to a private repository, tried again until it is there, and looked at afterwards.

The token comes from the environment or the Hub's own login, through huggingface_hub; it is never taken as an argument.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from httpx2 import TransportError

from lora_ft.errors import RunFailed, UserError
from lora_ft.export.adapter import CONFIG_NAME
from lora_ft.export.upload import Upload, collect_adapter, collect_merged, refuse_secrets
from lora_ft.export.verify import verify_folder
from lora_ft.fingerprint import hash_file

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 2.0
"""The wait after the first failure; it doubles each time."""
TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""HTTP states after which the same again may succeed; 409 and 412 say that somebody else has just committed."""
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")

Result = TypeVar("Result")


@dataclass(frozen=True)
class PushReport:
    """What was published."""

    url: str
    """The repository."""
    commit: str
    """The commit that holds it."""
    private: bool
    """Whether only its owner sees it."""
    num_files: int
    """Files in the repository that came from here."""
    left_out: tuple[str, ...]
    """Files of the folder that did not go."""
    already_there: bool
    """Whether the repository had all of it before."""


def push_folder(
    folder: Path,
    repository: str,
    *,
    merged: bool = False,
    public: bool = False,
    base_id: str | None = None,
    license: str | None = None,
    trust_remote_code: bool = False,
) -> PushReport:
    """An adapter, or a merged model, on the Hub: all of it in one commit, or nothing.

    Done again after a failure, it goes on; done again after a success, it changes nothing.

    Args:
        folder: a run, an adapter, or a merged model.
        repository: `ORG/NAME`.
        merged: of a run, the merged model and not the adapter.
        public: whether everyone may see it; private otherwise.
        base_id: Hub id of the base, where it was trained from a folder.
        license: licence for the card, as the Hub names it.

    Raises:
        UserError: the folder does not verify, holds a secret, or its base has no public id; no access to the Hub.
        RunFailed: the Hub could not be reached, or does not hold what was sent.
    """
    source = choose_source(folder, merged)
    refuse_unverified(source, trust_remote_code)
    is_adapter = (source / CONFIG_NAME).is_file()
    upload = (collect_adapter if is_adapter else collect_merged)(source, repository, base_id, license)
    refuse_secrets(upload)
    api = connect(repository)
    return with_retries(lambda: publish(api, repository, upload, public), repository)


def choose_source(folder: Path, merged: bool) -> Path:
    """The folder to publish: of a run its adapter, or its merged model if that is asked for.

    Raises:
        UserError: it is not there.
    """
    is_run = (folder / "adapter").is_dir()
    source = folder / ("merged" if merged else "adapter") if is_run else folder
    wanted = "config.json" if merged else CONFIG_NAME
    if not (source / wanted).is_file() and not (source / "config.json").is_file():
        rule = f"There is no {'merged model' if merged else 'adapter'} here."
        raise UserError(str(folder), None, rule, "Give a run, an adapter, or a merged folder.")
    return source


def refuse_unverified(source: Path, trust_remote_code: bool) -> None:
    """Nothing if the folder verifies, weights aside.

    Raises:
        UserError: it does not.
    """
    report = verify_folder(source, quick=True, trust_remote_code=trust_remote_code)
    faults = [f"{finding.name}: {finding.detail}" for finding in report.findings if not finding.ok]
    if faults:
        raise UserError(str(source), "; ".join(faults), "What is published must verify.", "Run lora-ft verify on it.")


def connect(repository: str) -> HfApi:
    """The Hub, with the token of the environment or of the Hub's own login.

    Raises:
        UserError: there is no token, or `repository` is no repository's name.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        named = repository.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UserError("repository", repository, "A repository is named ORG/NAME.", "Give both parts.")
    if get_token() is None:
        rule = "Publishing needs a token with write access."
        raise UserError("Hub token", None, rule, "Run `hf auth login`, or set HF_TOKEN in the environment.")
    return HfApi(library_name="lora-ft")


def publish(api: HfApi, repository: str, upload: Upload, public: bool) -> PushReport:
    """One try: what the repository lacks is uploaded and committed on top of what was there when we looked."""
    api.create_repo(repository, private=not public, exist_ok=True)
    before = api.model_info(repository, files_metadata=True)
    refuse_exposure(before, public)
    operations = missing_operations(upload, {file.rfilename: file for file in before.siblings or []})
    if operations:
        message = f"Upload with lora-ft: {len(operations)} changed files"
        api.create_commit(repository, operations, commit_message=message, parent_commit=before.sha)
    after = api.model_info(repository, files_metadata=True)
    refuse_difference(upload, after, repository)
    return PushReport(
        url=f"{api.endpoint}/{repository}",
        commit=after.sha or "",
        private=bool(after.private),
        num_files=len(upload.files),
        left_out=upload.left_out,
        already_there=not operations,
    )


def refuse_exposure(info: ModelInfo, public: bool) -> None:
    """Nothing if the repository is as hidden as the user expects.

    Raises:
        UserError: it is public, and that was not asked for.
    """
    if not info.private and not public:
        rule = "This repository is public already, and what is pushed would be too."
        raise UserError(info.id, "public", rule, "Say --public if that is meant, or choose another name.")


def missing_operations(
    upload: Upload, there: Mapping[str, RepoSibling]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What has to be done for the repository to hold the upload: files added, and weights of an earlier one removed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in upload.files.items()
        if name not in there or not is_same(content, there[name])
    ]
    stale = [name for name in there if name.endswith(WEIGHT_SUFFIXES) and name not in upload.files]
    return operations + [CommitOperationDelete(name) for name in stale]


def is_same(content: Path | bytes, file: RepoSibling) -> bool:
    """Whether a file of the repository has this content; the Hub tells the SHA-256 of large ones, git's of others."""
    if file.lfs is not None:
        digest = hash_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        return file.lfs.sha256 == digest
    data = content.read_bytes() if isinstance(content, Path) else content
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def refuse_difference(upload: Upload, info: ModelInfo, repository: str) -> None:
    """Nothing if the repository now holds the upload.

    Raises:
        RunFailed: it does not, for instance because a .gitignore there made the Hub drop files.
    """
    there = {file.rfilename: file for file in info.siblings or []}
    wrong = [name for name, content in upload.files.items() if name not in there or not is_same(content, there[name])]
    if wrong:
        rule = f"The commit was made, but the Hub does not hold {', '.join(wrong)} as sent."
        raise RunFailed(repository, None, rule, "Look for a .gitignore in the repository, then push again.")


def with_retries(attempt: Callable[[], Result], repository: str) -> Result:
    """What `attempt` returns, tried again with growing waits while the Hub may yet take it.

    Raises:
        UserError: the Hub refuses.
        RunFailed: it did not answer well in all attempts; the repository is as it was.
    """
    reason = ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (number - 1))
        try:
            return attempt()
        except (OSError, ValueError, RuntimeError, TransportError) as error:
            reason = reason_to_retry(error, repository)
    rule = f"The Hub did not take it in {ATTEMPTS} tries ({reason}). Nothing was published."
    raise RunFailed(repository, None, rule, "Run the same command again later; what was uploaded is not sent twice.")


def reason_to_retry(error: Exception, repository: str) -> str:
    """What went wrong, if it may go well another time; the client wraps what happened to an upload in a RuntimeError.

    Raises:
        UserError: it will not.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, OfflineModeIsEnabled):
        raise UserError(repository, None, "HF_HUB_OFFLINE is set.", "Unset it to publish.") from error
    if not isinstance(cause, HfHubHTTPError):
        return f"{type(cause).__name__}: {first_line(cause)}"
    if cause.response.status_code not in TRANSIENT:
        raise refusal(cause, repository) from None
    return f"it answered {cause.response.status_code}"


def refusal(error: Any, repository: str) -> UserError:
    """The error for a state that will not change by itself."""
    status = error.response.status_code
    advice = {
        401: ("The token is not valid.", "Run `hf auth login` again."),
        403: ("The token may not write there.", "Make one with write access to this organisation."),
        404: ("There is no such organisation, or the token may not see it.", "Check the name."),
    }
    rule, fix = advice.get(status, (f"The Hub refuses with {status}: {first_line(error)}", "Nothing was published."))
    return UserError(repository, f"HTTP {status}", rule, fix)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
