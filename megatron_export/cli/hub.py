"""The Hub: a finished checkpoint is uploaded, whole, as one commit."""

import re
from pathlib import Path

from ..common.errors import ExportError
from ..common.safe_files import reason_of

_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)


def check(repository: str) -> None:
    """`ExportError` for what is no name of a repository, and where nobody is logged in who could upload: before any work."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except Exception as error:  # the hub's client and its HTTP client each raise their own
        raise ExportError(
            f"--push-to-hub {repository}: nothing could be uploaded there ({type(error).__name__}: {reason_of(error)}). Log in "
            "with `hf auth login`, or leave the flag out and upload later"
        ) from error


def check_name(repository: str) -> None:
    """`ValueError` unless it can be the name of a repository."""
    if not _NAME.fullmatch(repository):
        raise ValueError(f"--push-to-hub {repository!r}: give the name of a repository of the hub, like org/name")


def push(folder: Path, repository: str) -> str:
    """Upload a checkpoint to a repository, which is made, private, if there is none; returns where it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Quantized checkpoint from megatron_export"
        )
    except Exception as error:  # the hub's client, its HTTP client and the file system each raise their own
        raise ExportError(
            f"{folder} is complete but was not uploaded to {repository} ({type(error).__name__}: {error}). Try again with "
            f"python -m megatron_export verify {folder} --push-to-hub {repository}"
        ) from error
    return str(commit.commit_url)
