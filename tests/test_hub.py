import pathlib
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from rl_jax import hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What snapshot_download is asked; it answers with a folder."""
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(("name", "repository", "revision"), [
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None), ("a/b.c_d@v1.0", "a/b.c_d", "v1.0"),
    ("a/b@refs/pr/3", "a/b", "refs/pr/3")])
def test_an_id_is_fetched_without_other_formats_of_the_weights(asked, tmp_path, name, repository, revision):
    assert hub.folder(name) == tmp_path
    assert asked == [(repository, {"revision": revision, "allow_patterns": [
        "*.safetensors", "*.json", "*.jinja", "tokenizer.model"]})]


def test_a_folder_is_itself_and_needs_nothing(asked, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    inner = tmp_path / "owner" / "name"
    inner.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.folder(str(inner)) == inner and hub.folder("owner/name") == pathlib.Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.folder("~/owner") == tmp_path / "owner"
    assert not asked


@pytest.mark.parametrize("name", ["", "name", "/no/where", "a/b/c", "./a/b", "a/", "a/b@", "a b/c", "-a/b"])
def test_neither_a_folder_nor_an_id(asked, name):
    with pytest.raises(ValueError, match="neither a folder that exists nor a repository"):
        hub.folder(name)
    assert not asked


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install rl_jax\[hf\], or give the path"):
        hub.folder("owner/name")


def without_response(error):
    """An error of the hub as it is raised, but for the response that it came from."""
    return error.__new__(error, "said the hub")


@pytest.mark.parametrize(("error", "named"), [
    (without_response(errors.GatedRepoError), "gated: accept its terms.*hf auth login"),
    (without_response(errors.RevisionNotFoundError), "owner/name has no revision 'v1'"),
    (without_response(errors.RepositoryNotFoundError), "no such folder, and the hub knows no such.*HF_TOKEN"),
    (without_response(errors.HfHubHTTPError), "cannot be fetched"), (ConnectionError("no route"), "no route"),
    (errors.LocalEntryNotFoundError("outgoing traffic"), "not in the cache.*outgoing traffic.*hf download owner/name`"),
    (errors.HFValidationError("at most 96"), "no such names: at most 96")])
def test_what_cannot_be_fetched_says_what_to_do(monkeypatch, error, named):
    def snapshot_download(repository, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=f"(?s)'owner/name@v1': .*{named}"):
        hub.folder("owner/name@v1")


def test_the_library_without_a_network(monkeypatch, tmp_path):
    """Its own error, not a stand-in's: the names that are caught exist."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="(?s)not in the cache and cannot be fetched.*has been disabled"):
        hub.folder("owner/name")
