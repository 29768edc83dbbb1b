"""What the hub answers, simulated over HTTP, is told in one sentence that names the repository and the mend."""

import importlib

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory

from meteora import AdapterError, MeteoraModel
from meteora.adapters import load_adapter
from meteora.checkpoint import find_checkpoint

# The client's own: httpx or httpx2.
http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

WAYS = {
    "an adapter": lambda folder: load_adapter("mine", "me/x"),
    "a checkpoint": lambda folder: find_checkpoint("me/x"),
    "a base model": lambda folder: MeteoraModel.from_adapters("me/x", folder),
}
GATED = "the hub says that me/x is gated: accept the terms on its page on the hub, then log in with `hf auth login`"
NO_SUCH = "the hub has no me/x, or shows it to its members alone: check the name, and log in with `hf auth login`"
BAD_TOKEN = "did not accept the token .* for me/x: make a new one on https://huggingface.co/settings/tokens, then log"
ANSWERS = {
    "no token": (401, {"X-Error-Code": "RepoNotFound"}, None, NO_SUCH),
    "no repository": (404, {"X-Error-Code": "RepoNotFound"}, "hf_x", NO_SUCH),
    "invalid token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "hf_x", BAD_TOKEN),
    "expired token": (401, {"X-Error-Message": "User Access Token is expired"}, "hf_x", BAD_TOKEN),
    "gated, no token": (401, {"X-Error-Code": "GatedRepo"}, None, GATED),
    "gated, not accepted": (403, {"X-Error-Code": "GatedRepo"}, "hf_x", GATED),
    "fine-grained token": (
        403, {"X-Error-Message": "Please enable access to public gated repositories in your token's settings"}, "hf_x",
        "does not let the token .* read me/x: if it is fine-grained, .* permission to read public gated repositories",
    ),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}, "hf_x", "has disabled me/x: choose"),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}, None, "the hub has me/x, but not the revision .* page"),
    "down": (500, {}, None, r"the hub did not give it \(HfHubHTTPError 500\); check the path, the id or the network"),
}  # fmt: skip


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """A function that lets the hub answer every request by a function of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def answer(handler):
        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(handler)))

    yield answer
    huggingface_hub.set_client_factory(default_client_factory)


def refused(way, folder, message):
    with pytest.raises(AdapterError, match=message) as error:
        way(folder)
    assert "there is no directory me/x" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("status", "headers", "token", "message"), ANSWERS.values(), ids=ANSWERS)
def test_a_refusal_names_the_mend(answering, monkeypatch, mixed_adapters, way, status, headers, token, message):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    answering(lambda request: http.Response(status, headers=headers))
    refused(way, {"one": mixed_adapters["one"]}, message)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_silent_hub_is_one_sentence(answering, mixed_adapters, way):
    def handler(request):
        raise http.ConnectError("no route to host")

    answering(handler)
    message = r"the hub did not give it \((ConnectError|LocalEntryNotFoundError)\); check .* the network"
    refused(way, {"one": mixed_adapters["one"]}, message)


def test_a_gated_repository_shows_its_files_but_does_not_give_them(answering):
    def handler(request):
        if "/api/" not in request.url.path:
            return http.Response(403, headers={"X-Error-Code": "GatedRepo"})
        if "/tree/" in request.url.path:
            file = {"type": "file", "path": "adapter_config.json", "size": 9, "oid": "a" * 40}
            return http.Response(200, json=[file])
        return http.Response(200, json={"id": "me/x", "sha": "a" * 40, "siblings": []})

    answering(handler)
    refused(WAYS["an adapter"], None, GATED)


def test_a_base_model_that_is_nowhere_and_one_that_is_broken(mixed_adapters, tmp_path):
    with pytest.raises(AdapterError, match="base model: there is no directory .*gone, and it is no hub id either"):
        MeteoraModel.from_adapters(tmp_path / "far" / "gone", {"one": mixed_adapters["one"]})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OSError, match="no file named model.safetensors"):  # as transformers says it
        MeteoraModel.from_adapters(tmp_path, {"one": mixed_adapters["one"]})


def test_what_the_hub_said_of_another_repository_is_not_told(answering, tmp_path):
    def handler(request):
        if "me/gated" in str(request.url):
            return http.Response(401, headers={"X-Error-Code": "GatedRepo"}, request=request)
        raise http.ConnectError("no route", request=request)

    answering(handler)
    try:
        load_adapter("first", "me/gated")
    except AdapterError as error:
        assert "is gated" in str(error)
        with pytest.raises(AdapterError, match=r"'second': .* did not give it \((ConnectError|LocalEntry\w+)\); check"):
            load_adapter("second", "me/other")


def test_a_full_disk_is_not_the_hubs_fault(monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meteora.adapters.snapshot_download", full)
    refused(WAYS["an adapter"], tmp_path, "no directory me/x, and the download could not be kept: No space left on device")


def test_a_base_model_may_lie_in_the_home_directory(monkeypatch, mixed_adapters, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises((OSError, ValueError), match=str(tmp_path / "model")):  # found, and told by transformers
        MeteoraModel.from_adapters("~/model", {"one": mixed_adapters["one"]})
