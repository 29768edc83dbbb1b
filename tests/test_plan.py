"""The dry run: what it lists, and what stands between this machine and what it lacks, without a network."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from data_prep import base_models, hub
from data_prep.errors import DownloadError
from meteora.study import plan
from meteora.study.artifacts import Workspace
from meteora.study.plan import describe, downloads
from meteora.study.profiles import load_profile

LLAMA = load_profile("llama3-8b")


def refused(kind):
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/api/models/x"))
    return kind("no access", response=response)


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_a_silent_hub_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "hub_answers", lambda: False)
    text = describe(Workspace(LLAMA, root=tmp_path), [])
    assert "16,061 MB" in text and "4 of unknown size" in text
    assert text.count("The Hugging Face hub does not answer: check the network") == 1
    assert "training adapters" in text and "goes on where it stopped" in text


@pytest.mark.parametrize(
    ("kind", "mend"),
    [(GatedRepoError, "is gated: accept the terms on its page on the hub"),
     (RepositoryNotFoundError, "The hub has no meta-llama/Meta-Llama-3-8B")],
)  # fmt: skip
def test_a_refusal_names_the_mend(monkeypatch, tmp_path, kind, mend):
    def auth_check(self, repository, *, repo_type):
        if repo_type == "model":
            raise refused(kind)

    monkeypatch.setattr(plan, "hub_answers", lambda: True)
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "auth_check", auth_check)
    text = describe(Workspace(LLAMA, root=tmp_path), [])
    sentences = [line for line in text.splitlines() if "hf auth login" in line]
    assert len(sentences) == 1 and mend in sentences[0]


def test_nobody_is_asked_where_nothing_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "hub_answers", lambda: pytest.fail("asked the network"))
    describe(Workspace("smoke", root=tmp_path), [])


def test_a_download_that_was_broken_off_is_still_to_be_made(tmp_path):
    folder = tmp_path / "models--meta-llama--Meta-Llama-3-8B"

    def cached():
        return next(download for download in downloads(LLAMA) if download.hub[0] == "model").cached

    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    assert not cached()
    weights = folder / "snapshots" / "abc" / "model.safetensors"
    weights.touch()
    assert cached()
    (folder / "blobs" / "def.incomplete").touch()
    assert not cached()


def test_loading_a_gated_model_says_the_same(monkeypatch):
    def from_pretrained(*arguments, **options):
        raise OSError("You are trying to access a gated repo.") from refused(GatedRepoError)

    monkeypatch.setattr(base_models, "hub_answers", lambda: True)
    monkeypatch.setattr(base_models.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(DownloadError, match="meta-llama/x is gated: accept the terms .* `hf auth login`") as caught:
        base_models.load_base_model("meta-llama/x")
    assert "\n" not in str(caught.value)


def test_the_authors_data_are_one_download():
    profile = replace(LLAMA, data=replace(LLAMA.data, source="authors"))
    assert [d.hub for d in downloads(profile)] == [
        ("model", "meta-llama/Meta-Llama-3-8B"), ("dataset", "NJUDeepEngine/meteora_dataset"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="source has no choice 'theirs'; known are auto, authors"):
        replace(LLAMA.data, source="theirs")


def test_adapters_of_the_hub_are_listed_and_those_in_directories_are_not(tmp_path):
    for task in LLAMA.tasks[1:]:
        (tmp_path / f"my-{task}").mkdir()
    adapters = replace(LLAMA.adapters, source=f"{tmp_path}/my-{{task}}")
    profile = replace(LLAMA, adapters=adapters, lora_b=replace(LLAMA.lora_b, source="me/lora-b"))
    found = [d.hub[1] for d in downloads(profile) if d.what.startswith("adapter")]
    assert found == [f"{tmp_path}/my-{LLAMA.tasks[0]}", "me/lora-b"]
