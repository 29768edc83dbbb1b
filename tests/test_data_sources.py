"""Downloads: pip's real route without a network (a local folder is the index), hashes, space, offline."""

import hashlib
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_prep import sources
from data_prep.errors import DownloadError
from data_prep.sources import cache_root, fetch_package_file, file_sha256

WHEEL = "tiny_pkg-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_pkg-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_pkg/weights.gguf", b"GGUF")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-pkg\nVersion: 1.0\nRequires-Dist: no\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _fetch(index, cache, sha256=None, **options):
    sha256 = sha256 or file_sha256(index / WHEEL)
    return fetch_package_file("tiny-pkg", "1.0", WHEEL, sha256, cache, **options)


def test_the_default_cache_is_outside_the_clone(tmp_path):
    assert cache_root() == Path.home() / ".cache" / "meteora"
    assert cache_root(str(tmp_path)) == tmp_path


def test_pip_downloads_once_and_leaves_nothing_else(index, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = _fetch(index, cache)
    assert path == cache / "downloads" / WHEEL and path.read_bytes() == (index / WHEEL).read_bytes()
    assert [file.name for file in path.parent.iterdir()] == [WHEEL]
    monkeypatch.setattr(sources, "_pip_download", lambda *_: pytest.fail("downloaded twice"))
    assert _fetch(index, cache) == path


def test_a_wrong_hash_names_both_and_removes_the_file(index, tmp_path):
    actual = file_sha256(index / WHEEL)
    with pytest.raises(DownloadError, match=rf"sha256 {actual} instead of {'0' * 64}.*run again"):
        _fetch(index, tmp_path / "cache", sha256="0" * 64)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_removed_and_then_fetched_anew(index, tmp_path):
    path = _fetch(index, tmp_path / "cache")
    expected = file_sha256(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DownloadError, match=expected):
        _fetch(index, tmp_path / "cache", sha256=expected)
    assert not path.exists()
    assert file_sha256(_fetch(index, tmp_path / "cache", sha256=expected)) == expected


def test_a_file_put_there_by_hand_is_taken(index, tmp_path):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    shutil.move(index / WHEEL, downloads / WHEEL)
    assert _fetch(index, tmp_path / "cache", sha256=file_sha256(downloads / WHEEL)) == downloads / WHEEL


def test_without_the_package_the_error_says_what_to_do(index, tmp_path):
    (index / WHEEL).unlink()
    with pytest.raises(DownloadError) as error:
        _fetch(index, tmp_path / "cache", sha256="0" * 64)
    message = str(error.value)
    assert "Could not download tiny-pkg 1.0 with pip (ERROR: " in message
    assert f"put {WHEEL} into {tmp_path / 'cache' / 'downloads'} by hand" in message and "\n" not in message
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_without_space_nothing_is_downloaded(index, tmp_path):
    with pytest.raises(DownloadError, match=rf"Downloading {WHEEL} needs .* MB in .* free some space"):
        _fetch(index, tmp_path / "cache", size=10**18)
    assert not (tmp_path / "cache").exists()


def test_a_source_archive_with_a_url_requirement_is_fetched_by_the_pinned_pip(index, tmp_path, monkeypatch):
    """BIG-bench's has one; the pip of the environment may refuse it."""
    name = "url_pkg-1.0.tar.gz"
    metadata = "Metadata-Version: 2.1\nName: url-pkg\nVersion: 1.0\n"
    backend = (
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    import os\n    os.mkdir(folder + '/url_pkg-1.0.dist-info')\n"
        f"    text = {metadata + 'Requires-Dist: x @ file:///x'!r}\n"
        "    open(folder + '/url_pkg-1.0.dist-info/METADATA', 'w').write(text)\n"
        "    return 'url_pkg-1.0.dist-info'\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    with tarfile.open(index / name, "w:gz") as tar:
        for file, text in {"PKG-INFO": metadata, "pyproject.toml": project, "backend.py": backend}.items():
            info = tarfile.TarInfo(f"url_pkg-1.0/{file}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    pinned = cache_root() / "downloads" / sources.PIP.filename
    if not pinned.exists():
        pytest.skip(f"{pinned} is not cached; a run of the study puts it there")
    cache = tmp_path / "cache"
    (cache / "downloads").mkdir(parents=True)
    shutil.copy(pinned, cache / "downloads")
    commands = []
    popen = sources.subprocess.Popen
    monkeypatch.setattr(
        sources.subprocess, "Popen", lambda command, **options: commands.append(command) or popen(command, **options)
    )
    digest = hashlib.sha256((index / name).read_bytes()).hexdigest()
    assert fetch_package_file("url-pkg", "1.0", name, digest, cache).name == name
    assert [Path(command[1]) for command in commands] == [cache / "downloads" / sources.PIP.filename / "pip"]
