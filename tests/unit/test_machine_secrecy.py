"""No secret of a command line is written down; a restore asks for it by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap.errors import Blocked, UsageError
from qmpsnap.hypervisor.machine import records
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.machine.secrecy import of_image, without
from tests.unit.machine_lines import CAPTURED
from tests.unit.test_machine_relocate import moved

S = "hunter2"
SECRET: list[tuple[str, str, str, str]] = [
    # the option, its value, what stays of it, and what is told
    ("object", f"secret,id=s,data={S}", "secret,id=s", "-object s data"),
    ("object", f"secret,id=s,format=base64,keyid=k,iv=x,data={S}",
     "secret,id=s,format=base64,keyid=k,iv=x", "-object s data"),
    ("object", f'{{"qom-type":"secret","id":"s","data":"{S}"}}',
     '{"qom-type":"secret","id":"s"}', "-object s data"),
    ("object", f"{{'qom-type':'secret','id':'s','data':'{S}'}}",
     '{"qom-type":"secret","id":"s"}', "-object s data"),
    ("set", f"object.s.data={S}", "object.s.data=", "-set object.s.data="),
    ("set", f"drive.a.file=https://me:{S}@h/x", "drive.a.file=https://me@h/x",
     "-set drive.a.file=https://me@h/x"),
    ("incoming", f"exec:curl -u me:{S} h", "exec:", "-incoming exec:"),
    ("blockdev", f"https,node-name=n,url=HTTPS://h/x,cookie={S}",
     "https,node-name=n,url=HTTPS://h/x", "-blockdev cookie"),
    ("drive", f"file=HTTPS://me:{S}@h/x,id=d", "file=HTTPS://me@h/x,id=d", "-drive d file"),
    ("drive", f"file=https://h/x?X-Amz-Date=1&X-Amz-Signature={S},id=d",
     "file=https://h/x?X-Amz-Date=1&X-Amz-Signature=,id=d", "-drive d file"),
    ("netdev", f"l2tpv3,id=n,src=a,txsession=1,txcookie={S}", "l2tpv3,id=n,src=a,txsession=1",
     "-netdev n txcookie"),
    ("spice", f"port=1,password={S}", "port=1", "-spice password"),
    ("spice", f"tls-port=1,x509-key-password={S}", "tls-port=1", "-spice x509-key-password"),
    ("iscsi", f"user=me,password={S}", "user=me", "-iscsi password"),
    ("vnc", f":0,password={S}", ":0", "-vnc password"),
    ("drive", f"file=https://me:{S}@host/x.img,if=none", "file=https://me@host/x.img,if=none",
     "-drive file"),
    ("drive", f"file=iscsi://me%{S}@host/iqn/0,id=d", "file=iscsi://me@host/iqn/0,id=d",
     "-drive d file"),
    ("drive", f"file=rbd:pool/image:id=admin:key={S}", "file=rbd:pool/image:id=admin",
     "-drive file"),
    ("blockdev", f'{{"driver":"raw","node-name":"n","file":{{"driver":"x","password":"{S}"}}}}',
     '{"driver":"raw","node-name":"n","file":{"driver":"x"}}', "-blockdev file.password"),
    ("cdrom", f"http://me:{S}@host/x.iso", "http://me@host/x.iso", "-cdrom http://me@host/x.iso"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "kept", "told"), SECRET)
def test_what_is_secret_is_left_out_and_named(name: str, value: str, kept: str, told: str) -> None:
    line, withheld = without(parse(["qemu", f"-{name}", value]))
    assert line == parse(["qemu", f"-{name}", kept])
    assert withheld == [told]
    assert S not in str(records.as_json(line))


PLAIN = [
    "-object secret,id=s,file=/etc/key -object tls-creds-x509,id=t,dir=/etc/pki,endpoint=server",
    "-vnc :0,password=on,tls-creds=t -vnc :1,password -spice port=1,password-secret=s",
    "-drive file=x.qcow2,encrypt.key-secret=s -blockdev driver=iscsi,password-secret=s",
    "-device virtio-blk-pci,serial=password -append data=1 -fw_cfg name=opt/a,string=x:y@z",
    "-drive file=nbd://host:10809/x,if=none -drive file=ssh://me@host:22/x -name password",
]


@pytest.mark.parametrize(
    "words", [*map(str.split, PLAIN), *(argv[1:] for argv in CAPTURED.values())]
)
def test_what_is_no_secret_stays_as_it_is(words: list[str]) -> None:
    line = parse(["qemu", *words])
    assert without(line) == (line, [])


def test_images_that_are_spelled_as_json() -> None:
    name = (
        f'json:{{"driver":"raw","file":{{"driver":"x","url":"http://a:{S}@b","password":"{S}"}}}}'
    )
    assert of_image(name) == 'json:{"driver":"raw","file":{"driver":"x","url":"http://a@b"}}'
    assert of_image(f'json:{{"password":"{S}"') == "json:"


def test_a_secret_that_is_in_no_file_is_asked_for_by_its_name() -> None:
    text = "-object secret,id=key0,format=base64"
    with pytest.raises(Blocked, match="object key0") as refused:
        moved(text)
    assert "--secret key0=FILE" in refused.value.hint
    given = moved(text, secrets={"key0": Path("/etc/key")})
    assert "secret,id=key0,format=base64,file=/etc/key" in given.cmdline.argv()
    assert given.reads == ("/etc/key",)
    both = moved("-object secret,id=key0,data=x", secrets={"key0": Path("/etc/key")})
    assert "secret,id=key0,file=/etc/key" in both.cmdline.argv()
    with pytest.raises(UsageError, match="key1"):
        moved(text, secrets={"key1": Path("/etc/key")})
