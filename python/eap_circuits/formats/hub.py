"""Results on the Hugging Face Hub: one file of a repository, written to and read from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import expected, reason


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    filename: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Write a file into a repository, which is made if it is missing; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(filename).name)
        save(path)  # before the hub hears of it
        with _in_one_sentence(repo_id, "a repository that can be written to"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_file(
                path_or_fileobj=path,
                path_in_repo=filename,
                repo_id=repo_id,
                revision=revision,
                commit_message=f"Add {filename} by eap-kernels",
            )
    return str(commit.commit_url)


def found(name: str | os.PathLike[str], filename: str, revision: str | None = None, token: str | None = None) -> Path:
    """A file of a folder or, if there is no such folder, of a repository, downloaded into the hub's cache."""
    if os.path.isdir(name):
        return Path(name, filename)
    from huggingface_hub import hf_hub_download

    with _in_one_sentence(str(name), f"a folder, or a repository on the hub, with {filename}"):
        return Path(hf_hub_download(str(name), filename, revision=revision, token=token))


@contextmanager
def _in_one_sentence(name: str, wanted: str) -> Iterator[None]:
    """The client's errors are of the connection or of the name."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise expected(name, wanted, f"an error ({reason(error)})") from error
