"""Scores on the Hugging Face Hub, against a stand-in of the client whose calls the real one must take."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import eap_circuits as eap

GRAPH = eap.Graph((2, 2), (1, 1), 4)
VALUES = torch.randn(GRAPH.edge_mask.shape, generator=torch.Generator().manual_seed(0)) * GRAPH.edge_mask
SCORES = eap.EdgeScores(GRAPH, VALUES, {"method": "eap"}, variance=VALUES**2)
REAL = {
    "create_repo": huggingface_hub.HfApi.create_repo,
    "upload_file": huggingface_hub.HfApi.upload_file,
    "hf_hub_download": huggingface_hub.hf_hub_download,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of repositories, each with its revisions."""
    root, made = tmp_path / "hub", set()

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token in (None, "secret")

        def create_repo(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(REAL["create_repo"]).bind(self, *args, **kwargs).arguments
            assert given["exist_ok"]
            made.add(given["repo_id"])

        def upload_file(self, **kwargs: Any) -> Any:
            given = inspect.signature(REAL["upload_file"]).bind(self, **kwargs).arguments
            assert given["repo_id"] in made
            place = root / given["repo_id"] / (given["revision"] or "main") / given["path_in_repo"]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(given["path_or_fileobj"], place)
            return SimpleNamespace(commit_url=f"https://hub/{given['repo_id']}/commit/1")

    def download(*args: Any, **kwargs: Any) -> str:
        given = inspect.signature(REAL["hf_hub_download"]).bind(*args, **kwargs).arguments
        place = root / given["repo_id"] / (given["revision"] or "main") / given["filename"]
        if not place.exists():
            raise LocalEntryNotFoundError("Cannot find the file.\nCheck your connection.")
        return str(place)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


@pytest.mark.parametrize("given", [{}, {"filename": "ioi/eap.json"}, {"revision": "tuned"}, {"token": "secret"}])
def test_scores_come_back_from_the_hub(hub: Path, given: dict[str, str]) -> None:
    assert SCORES.push_to_hub("me/scores", private=True, **given) == "https://hub/me/scores/commit/1"
    back = eap.EdgeScores.from_pretrained("me/scores", **given)
    assert torch.equal(back.values, SCORES.values) and back.graph == GRAPH and back.info["method"] == "eap"
    assert "filename" in given or back == SCORES


def test_scores_come_from_a_folder(tmp_path: Path) -> None:
    SCORES.save(tmp_path / "scores.safetensors")
    assert eap.EdgeScores.from_pretrained(tmp_path) == SCORES


def test_what_fails_is_one_sentence(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        eap.InputError, match=r"^me/none: expected a folder, or a repository on the hub, .*connection|file"
    ):
        eap.EdgeScores.from_pretrained("me/none")
    with pytest.raises(eap.InputError, match=r"scores\.safetensors"):
        eap.EdgeScores.from_pretrained(tmp_path)
    for name in ("me/scores", "a/b/c"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("401"))
        )
        with pytest.raises(eap.InputError, match=rf"^{name}: expected a repository that can be written to, .*401"):
            SCORES.push_to_hub(name)
    with pytest.raises(eap.InputError, match=r"\.txt"):
        SCORES.push_to_hub("me/scores", filename="scores.txt")
    assert not hub.exists()
