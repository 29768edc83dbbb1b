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
from meteora.study.profiles import REPOSITORY, load_profile

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


def test_adapters_of_the_hub_are_listed_and_those_in_directories_are_not(monkeypatch, tmp_path):
    for task in LLAMA.tasks[1:]:
        (tmp_path / f"my-{task}").mkdir()
    adapters = replace(LLAMA.adapters, source=f"{tmp_path}/my-{{task}}")
    profile = replace(LLAMA, adapters=adapters, lora_b=replace(LLAMA.lora_b, source="me/lora-b"))
    found = [d.hub[1] for d in downloads(profile) if d.what.startswith("adapter")]
    assert found == ["me/lora-b"]
    assert told(monkeypatch, tmp_path, profile) == [
        f"adapters.source: there is no directory {tmp_path}/my-{LLAMA.tasks[0]}; name what exists, or a hub id with "
        "{task} in it."
    ]


def told(monkeypatch, tmp_path, profile):
    """What a dry run says of directories, and nothing of them is a download."""
    monkeypatch.setattr(plan, "_estimates", lambda workspace, total: [])  # takes seconds
    monkeypatch.setattr(plan, "hub_answers", lambda: False)
    lines = describe(Workspace(profile, root=tmp_path), []).splitlines()
    assert not [line for line in lines if "nonexistent" in line and "missing" in line]
    return [line.strip() for line in lines if "there is no directory" in line]


@pytest.mark.parametrize("source", ["/nonexistent/llama", "./nonexistent", "../nonexistent", "~/nonexistent", "a/b/c"])
def test_a_model_that_is_no_hub_id_is_a_directory_that_does_not_exist(monkeypatch, tmp_path, source):
    profile = replace(LLAMA, model=replace(LLAMA.model, source=source))
    assert told(monkeypatch, tmp_path, profile) == [
        f"model.source: there is no directory {source}; name what exists, or a hub id."
    ]
    assert not any("base model" in download.what for download in downloads(profile))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("/nonexistent/folder", "/nonexistent/folder"),
        ("me/one-lora", f"{REPOSITORY}/me/one-lora"),  # which would be a hub id, if it had {task} in it
        ("/nonexistent/{task}", f"/nonexistent/{LLAMA.tasks[0]}, nor 27 more like it"),
        ("~/nonexistent-{task}", f"~/nonexistent-{LLAMA.tasks[0]}, nor 27 more like it"),
    ],
)
def test_adapters_that_do_not_exist_are_told(monkeypatch, tmp_path, source, named):
    profile = replace(LLAMA, adapters=replace(LLAMA.adapters, source=source))
    assert told(monkeypatch, tmp_path, profile) == [
        f"adapters.source: there is no directory {named}; name what exists, or a hub id with {{task}} in it."
    ]


def test_a_folder_that_lacks_an_adapter_is_told(monkeypatch, tmp_path):
    for task in LLAMA.tasks[2:]:
        (tmp_path / "mine" / task).mkdir(parents=True)
    profile = replace(LLAMA, adapters=replace(LLAMA.adapters, source=f"{tmp_path}/mine"))
    (sentence,) = told(monkeypatch, tmp_path, profile)
    assert f"no directory {tmp_path}/mine/{LLAMA.tasks[0]}, nor 1 more like it;" in sentence


def test_an_adapter_for_every_task_that_does_not_exist_is_told(monkeypatch, tmp_path):
    profile = replace(LLAMA, lora_b=replace(LLAMA.lora_b, source="/nonexistent/lb"))
    assert told(monkeypatch, tmp_path, profile) == [
        "lora_b.source: there is no directory /nonexistent/lb; name what exists, or a hub id."
    ]


def test_adapters_in_the_home_directory_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for task in LLAMA.tasks:
        (tmp_path / f"my-{task}").mkdir()
    profile = replace(LLAMA, adapters=replace(LLAMA.adapters, source="~/my-{task}"))
    assert not told(monkeypatch, tmp_path, profile)
    assert not [download for download in downloads(profile) if download.what.startswith("adapter")]
