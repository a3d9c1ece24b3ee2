"""The only place that puts page images of a snapshot in the place of a machine's memory."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Fields, Pair, Scalar
from qmpsnap.hypervisor.machine.options import Device, Machine, Object, fields_of, option_of
from qmpsnap.hypervisor.machine.sizes import in_bytes

_CANONICAL_ID = "x-use-canonical-path-for-ramblock-id"
# What a backend says of its memory, wherever that comes from.
_KEPT = ("merge", "dump", "policy", "host-nodes", "reserve", "align")
# Where a page comes from, or when: a mapped one comes from its image, when it is touched.
_WITHOUT_A_WORD = ("qom-type", "id", "size", "mem-path", "offset", "discard-data", "share", "seal",
                   "hugetlb", "hugetlbsize", "rom", "prealloc-threads", "prealloc-context",
                   _CANONICAL_ID)  # fmt: skip
_KINDS = frozenset({"ram", "file", "memfd", "shm"})
_BACKEND = "memory-backend-"
_CANONICAL = "/objects/"  # what the blocks of machines before 4.0 are called after
_PAGE = 4096
_IMAGE = re.compile(r"\d+\.pages")  # what a page image is called
_SEALS = (8, 2)  # the first QEMU with `rom`: private memory on a file that it cannot write to


@dataclass(frozen=True, slots=True)
class Mapped:
    """*cmdline* with page images as its memory, copy-on-write.

    *blocks*: the image of each RAM block that is mapped: none of its pages need be in the stream.
    *left*: each other block, and why its pages have to be. *notices*: what is not as it was.
    """

    cmdline: CommandLine
    blocks: dict[str, Path]
    left: dict[str, str]
    notices: tuple[str, ...] = ()


@dataclass(slots=True)
class _Plan:
    line: CommandLine
    version: tuple[int, ...]
    huge: Collection[str]
    made: dict[str, Fields] = field(default_factory=dict)
    default: str | None = None
    blocks: dict[str, Path] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def sealed(self) -> bool:
        return self.version >= _SEALS


def mapped(
    cmdline: CommandLine,
    images: Mapping[str, tuple[Path, int]],
    *,
    version: str,
    huge: Collection[str] = (),
) -> Mapped:
    """*cmdline*, as `relocate` gives it, with *images* as its memory.

    *images* has the page image of each RAM block, by the block's name in the stream, and the
    bytes of that block, which are the file's too. *version* is that of the QEMU that will run,
    such as "8.2.1". *huge*: ids of the backends that were seen to be on huge pages, where the
    command line does not say so. Nothing is opened, and the machine stays the same for its guest.

    No image is written to: from QEMU 8.2 on it is opened for reading only. Older ones open it
    for writing, and a device that gives memory back to the host would punch holes into it: with
    such a device nothing is mapped there. Not for an incoming postcopy, which discards all RAM.
    """
    numbers = tuple(int(word) for word in re.findall(r"\d+", version)[:2])
    plan = _Plan(cmdline, numbers, huge)
    backends = {view.id: view for view in map(Object.of, cmdline.all("object")) if view.id}
    hole = _gives_back(plan)
    for block, (path, size) in images.items():
        view = backends.get(block.removeprefix(_CANONICAL))
        if hole:
            plan.left[block] = hole
        elif view is not None and (view.qom_type or "").startswith(_BACKEND):
            _backend(plan, block, view, path, size)
        else:
            _default_ram(plan, block, path, size)
    new = _rewritten(plan)
    return Mapped(new, plan.blocks, plan.left, tuple(plan.notices))


def images(line: CommandLine) -> list[Path]:
    """The page images that the machine of *line* has in the place of its memory."""
    found = [Object.of(option).fields for option in line.all("object")]
    paths = [Path(fields.get("mem-path") or "") for fields in found if not fields.on("share")]
    return [path for path in paths if _IMAGE.fullmatch(path.name)]


def unmapped(line: CommandLine) -> CommandLine:
    """*line* with memory of QEMU's own in the place of page images.

    A machine that was restored with mapped memory has the images of its snapshot on its command
    line; whoever restores that machine in turn has others, or none.
    """

    def rule(_index: int, option: Option) -> list[Option]:
        fields = Object.of(option).fields if option.name == "object" else Fields()
        if fields.on("share") or not _IMAGE.fullmatch(Path(fields.get("mem-path") or "").name):
            return [option]
        kept = fields.keep(lambda key: key.split(".")[0] in ("id", "size", _CANONICAL_ID, *_KEPT))
        kept = kept.without("align")
        kind = ("qom-type", f"{_BACKEND}ram")
        return [option_of("object", replace(kept, pairs=(kind, *kept.pairs)))]

    return line.replace(rule)


def _backend(plan: _Plan, block: str, view: Object, path: Path, size: int) -> None:
    """Another backend with the id of *view*, which is made as that one was."""
    fields, ident = view.fields, view.id or ""
    if why := _trouble(plan, view) or _other_size(in_bytes(fields.get("size")), size):
        plan.left[block] = why
        return
    if fields.on("prealloc"):
        plan.notices.append(f"object {ident}: without prealloc, its pages come when they are used")
    if fields.on("pmem"):
        plan.notices.append(f"object {ident}: without pmem, it is a copy of the snapshot's")
    if fields.on("share"):
        plan.notices.append(f"object {ident}: its memory is private, no device shares it")
    known = (*_KEPT, *_WITHOUT_A_WORD, "prealloc", "pmem", "readonly")
    if strange := sorted({key for key, _ in fields if key.split(".")[0] not in known}):
        plan.left[block] = f"it is not known what {', '.join(strange)} means for it"
        return
    kept = fields.keep(lambda key: key.split(".")[0] in _KEPT)
    rom = fields.on("readonly") and fields.get("rom") != "off"
    plan.made[ident] = _file(plan, block, ident, path, size, kept, rom=rom)
    plan.blocks[block] = path


def _default_ram(plan: _Plan, block: str, path: Path, size: int) -> None:
    """A backend in the place of the one that QEMU makes by itself for -m."""
    if "/" in block or not f".{block}".endswith(".ram"):
        plan.left[block] = "it is a device's own, no backend makes it"
        return
    machine = _machine(plan.line)
    given = machine.get("memory-backend")
    memdevs = [fields for fields in map(fields_of, plan.line.all("numa")) if fields.has("memdev")]
    if given is not None or memdevs:
        plan.left[block] = "the machine's memory is made of other backends"
        return
    if block in plan.huge:
        plan.left[block] = "it is made of huge pages"
        return
    if why := _other_size(_memory_size(plan.line), size):
        plan.left[block] = why
        return
    if plan.line.has("mem-path"):
        plan.notices.append("-mem-path: the memory is in the snapshot's page image")
    plan.made[block] = _file(plan, block, block, path, size, Fields(), rom=False)
    plan.default = block
    plan.blocks[block] = path


def _file(
    plan: _Plan, block: str, ident: str, path: Path, size: int, kept: Fields, *, rom: bool
) -> Fields:
    def flag(on: bool) -> Scalar:
        return on if kept.json else "on" if on else "off"

    pairs: list[Pair] = [
        ("qom-type", "memory-backend-file"),
        ("id", ident),
        ("size", size if kept.json else str(size)),
        ("mem-path", str(path)),
        ("share", flag(False)),
    ]
    if plan.sealed:
        pairs += [("readonly", flag(True)), ("rom", "on" if rom else "off")]  # no boolean in JSON
    elif rom:
        pairs.append(("readonly", flag(True)))
    if plan.line.has("mem-prealloc"):
        pairs.append(("prealloc", flag(False)))  # else it would be on for each backend
    # the block is called as in the stream, whatever is usual for this type of machine
    canonical = (_CANONICAL_ID, flag(block.startswith(_CANONICAL)))
    return replace(kept, pairs=(*pairs, *kept.pairs, canonical))


def _rewritten(plan: _Plan) -> CommandLine:
    def rule(_index: int, option: Option) -> list[Option]:
        if option.name == "object" and (ident := Object.of(option).id) in plan.made:
            return [option_of("object", plan.made[ident])]
        if option.name == "mem-path" and plan.default is not None:
            return []
        if option.name == "mem-prealloc" and plan.blocks and not plan.left:
            plan.notices.append("-mem-prealloc: left out, pages come when they are used")
            return []
        return [option]

    new = plan.line.replace(rule)
    if plan.default is None:
        return new
    fields = _machine(new).set("memory-backend", plan.default)
    rest = new.without(("machine", "M"))
    return CommandLine(
        new.binary,
        (
            option_of("machine", fields),
            *rest.options,
            option_of("object", plan.made[plan.default]),
        ),
    )


def _trouble(plan: _Plan, view: Object) -> str:
    """Why the backend *view* cannot be a page image; empty if it can."""
    fields, kind = view.fields, (view.qom_type or "").removeprefix(_BACKEND)
    if kind not in _KINDS:
        return f"it is a {view.qom_type}"
    if fields.on("hugetlb") or fields.has("hugetlbsize") or view.id in plan.huge:
        return "it is made of huge pages"
    for device in map(Device.of, plan.line.all("device")):
        name = f"device {device.id or device.driver}"
        uses = view.id in (device.fields.get("memdev"), device.fields.get("hostmem"))
        if uses and (device.driver or "").startswith(("ivshmem", "virtio-mem")):
            return f"{name} shares it, or gives it back to the host"
        if device.driver and "vhost-user" in device.driver:
            return f"{name} has to share it with another process"
        if "virtio-gpu" in (device.driver or "") and device.fields.on("blob"):
            return f"{name} shows the host what is in it, which takes shared memory"
    if any(fields.get("type") == "vhost-user" for fields in _networks(plan.line)):
        return "a vhost-user network has to share it with another process"
    return ""


def _gives_back(plan: _Plan) -> str:
    """Why nothing may be mapped: a device that discards pages of RAM, and so of the image."""
    for device in map(Device.of, plan.line.all("device")):
        if "balloon" not in (device.driver or ""):
            continue
        name = f"device {device.id or device.driver}"
        if not plan.sealed:
            return f"{name} would give back the pages of the image: QEMU 8.2 protects it"
        if device.fields.on("free-page-reporting"):
            return f"{name} reports free pages all the time, and the image cannot give them back"
        plan.notices.append(f"{name}: what it gives back stays allocated on the host")
    return ""


def _networks(line: CommandLine) -> Iterator[Fields]:
    yield from map(fields_of, line.all("netdev", "nic", "net"))


def _machine(line: CommandLine) -> Fields:
    fields = Fields()
    for option in line.all("machine", "M"):
        fields = fields.merged(Machine.of(option).fields)
    return fields


def _memory_size(line: CommandLine) -> int | None:
    """What -m asks for, rounded as QEMU does; None where it does not say, or not clearly."""
    text = None
    for option in line.all("m"):
        text = fields_of(option).get("size") or text
    found = in_bytes(text, bare="m")
    return found and -(-found // 8192) * 8192


def _other_size(given: int | None, size: int) -> str:
    if given is None or -(-given // _PAGE) * _PAGE == size:
        return ""
    return f"it has {given} bytes, and its page image {size}"
