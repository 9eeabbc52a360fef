"""The Hub: a finished checkpoint is uploaded, whole, as one commit."""

from pathlib import Path

from ..common.errors import ExportError


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
