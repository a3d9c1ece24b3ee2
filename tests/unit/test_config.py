"""The configuration file: what it means, and that each mistake is told by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import config
from qmpsnap.errors import ConfigError, UsageError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QMPSNAP_CONFIG", raising=False)
    return tmp_path / "qmpsnap.toml"


def test_all_keys(file: Path) -> None:
    file.write_text(
        """
        local = "/srv/snap"
        store = "nas"
        allow_local_store = true
        store_timeout = "2m"
        ram_images = 3
        ram_images_in = "images"
        [vm.web]
        socket = "/run/web.sock"
        agent_socket = "~/agent.sock"
        ram_from = ["golden", "mail.example"]
        [vm."mail.example"]
        socket = "mail.sock"
        """
    )
    found = config.load(file)
    assert found.path == file
    assert found.local == Path("/srv/snap")
    assert found.store == file.parent / "nas"  # relative to the file
    assert found.allow_local_store
    assert found.store_timeout == 120
    assert (found.ram_images, found.ram_images_in) == (3, file.parent / "images")
    assert found.vms["web"].socket == Path("/run/web.sock")
    assert found.vms["web"].agent_socket == file.parent / "home/agent.sock"
    assert found.vms["web"].ram_from == ("golden", "mail.example")
    assert found.vms["mail.example"] == config.Vm(socket=file.parent / "mail.sock")


def test_the_first_file_there_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = file.parent / "system.toml"
    monkeypatch.setattr(config, "_SYSTEM", system)
    assert config.find() is None
    assert config.load() == config.Config()
    user = file.parent / "home/.config/qmpsnap.toml"
    user.parent.mkdir(parents=True)
    user.touch()
    assert config.find() == user
    system.touch()
    assert config.find() == system
    monkeypatch.setenv("QMPSNAP_CONFIG", str(file))
    assert config.find() == file  # though it is not there: it was asked for
    assert config.find(user) == user


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('local = "/srv"\nstore = \n', "line 2"),
        ("local = 3", "local: expected `str`, got `int`"),
        ('lokal = "/srv"', "unknown key `lokal`"),
        ('store_timeout = "soon"', "store_timeout: not a duration: 'soon'"),
        ('store_timeout = "0s"', "store_timeout: has to be more than 0"),
        ('lease = "1s"', "lease: has to be from 10s to 1d"),
        ("store_timeout = 30", "store_timeout: expected `str"),
        ('allow_local_store = "yes"', "allow_local_store: expected `bool`, got `str`"),
        ("vm = 3", "vm: expected `object`, got `int`"),
        ("[vm]\nweb = 3", "vm.web: expected `object`, got `int`"),
        ("[vm.web]\n", "vm.web.socket: is missing"),
        ("[vm.web]\nsocket = true", "vm.web.socket: expected `str`, got `bool`"),
        ('[vm.web]\nsoket = "x"', "unknown key `vm.web.soket`"),
        ('[vm."../up"]\nsocket = "x"', "vm.../up: not a name for a VM"),
        ('[vm.web]\nsocket = "x"\nram_from = "y"', "ram_from: expected `array`, got `str`"),
        ('[vm.web]\nsocket = "x"\nram_from = ["../up"]', "not a name for a VM: '../up'"),
    ],
)
def test_mistakes_name_file_and_key(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert told in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_an_unknown_key_that_is_nearly_known(file: Path) -> None:
    file.write_text('[vm.web]\nsocet = "x"')
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert caught.value.hint == "did you mean `socket`?"


def test_files_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(file)
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(file.parent)
    file.write_bytes(b'local = "\xff"')
    with pytest.raises(ConfigError, match="is not UTF-8"):
        config.load(file)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("200ms", 0.2), ("3s", 3), ("2m", 120), ("1h", 3600), ("1.5s", 1.5), ("5 min", 300)],
)
def test_durations(text: str, seconds: float) -> None:
    assert config.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "3", "s", "-3s", "3 weeks", "1e3s", "3s ago", "٣s3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        config.duration(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("512K", 512 << 10), ("20M", 20 << 20), ("1.5G", 3 << 29), ("2TiB", 2 << 40)],
)
def test_sizes(text: str, count: int) -> None:
    assert config.size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "20X", "1e9", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        config.size(text)


def test_a_figure_without_end_is_none() -> None:
    for read in (config.duration, config.size):
        with pytest.raises(UsageError, match="not a "):
            read("9" * 400 + ("s" if read is config.duration else ""))


@pytest.mark.parametrize(
    "text", ['local = "a\\u0000"', "local = " + "[" * 3000, "ram_images = " + "9" * 5000]
)
def test_what_no_reader_of_toml_takes(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=file.name):
        config.load(file)
