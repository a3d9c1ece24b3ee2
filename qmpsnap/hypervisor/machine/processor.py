"""The only place that takes down what the guest's CPUs are: model, features, topology, slots."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.cmdline import CommandLine

_KINDS: tuple[Literal["static", "full"], ...] = ("static", "full")
_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class CpuModel(msgspec.Struct, frozen=True, kw_only=True):
    """A CPU model, expanded by the QEMU that runs it (query-cpu-model-expansion).

    *name* is the model that was asked for, or the machine's own. *features* are on, *features_off*
    are known to this QEMU and off, both sorted; *unavailable* were asked for and are not there,
    since the accelerator has not got them (and so are in *features_off*). *values* are the
    properties that are no features, such as `vendor`, `family`, `model-id`. What depends on the
    machine, such as `ht`, is as the model alone has it.
    """

    name: str
    expansion: Literal["static", "full"]
    features: list[str]
    features_off: list[str]
    unavailable: list[str]
    values: dict[str, int | float | str]


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """`-smp`, with all that QEMU worked out; None is a level that this QEMU does not know."""

    cpus: int
    maxcpus: int
    sockets: int
    dies: int | None = None
    clusters: int | None = None
    modules: int | None = None
    cores: int
    threads: int


class CpuSlot(msgspec.Struct, frozen=True, kw_only=True):
    """A place for CPUs; *qom_path* is None where there is none yet. *props*: `socket-id` and kin,
    and the `node-id` of its NUMA node.
    """

    type: str
    vcpus_count: int
    props: dict[str, int | str]
    qom_path: str | None = None


class _Slot(msgspec.Struct, rename="kebab"):
    type: str
    vcpus_count: int
    props: dict[str, int | str]
    qom_path: str | None = None


class _Model(msgspec.Struct):
    name: str
    props: dict[str, Any] = {}


class _Expanded(msgspec.Struct):
    model: _Model


async def model(
    asking: Asking, line: CommandLine | None, cpu_type: str | None, first_cpu: str | None
) -> CpuModel | None:
    """The model of `-cpu`, or of *cpu_type*; *first_cpu* is the QOM path of one that runs.

    Neither question costs the guest more than 2 ms. To read all features off the running CPU would
    take a `qom-get` each, some 400.
    """
    name, props = _wanted(line, cpu_type)
    if name is None:
        asking.missing.append("the CPU model")
        return None
    lacking = await asking.value(first_cpu, "unavailable-features") if first_cpu else None
    for kind in _KINDS:
        wanted = {"name": name, "props": props}
        raw = await asking.quietly("query-cpu-model-expansion", type=kind, model=wanted)
        if raw is not None:
            found = msgspec.convert(raw, _Expanded).model.props
            return _expanded(name, kind, found, lacking if isinstance(lacking, list) else [])
    asking.missing.append("query-cpu-model-expansion")
    return None


async def topology(asking: Asking) -> Topology | None:
    raw = await asking.value("/machine", "smp")
    return None if raw is None else msgspec.convert(raw, Topology)


async def slots(asking: Asking) -> list[CpuSlot] | None:
    found = await asking.ask("query-hotpluggable-cpus", list[_Slot])
    if found is None:
        return None
    return [msgspec.convert(one, CpuSlot, from_attributes=True) for one in found]


def features(props: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of the properties of an expanded model: what is on, and what is off, without aliases."""
    names = {name.replace("_", "-"): value for name, value in props.items()}
    on = sorted(name for name, value in names.items() if value is True)
    return on, sorted(name for name, value in names.items() if value is False)


def _expanded(
    name: str, kind: Literal["static", "full"], props: dict[str, Any], lacking: list[Any]
) -> CpuModel:
    on, off = features(props)
    unavailable = sorted({str(one).replace("_", "-") for one in lacking} & set(on))
    values = {key: value for key, value in props.items() if not isinstance(value, bool)}
    return CpuModel(
        name=name,
        expansion=kind,
        features=[one for one in on if one not in unavailable],
        features_off=sorted([*off, *unavailable]),
        unavailable=unavailable,
        values={key: one for key, one in values.items() if isinstance(one, int | float | str)},
    )


def _wanted(line: CommandLine | None, cpu_type: str | None) -> tuple[str | None, dict[str, Any]]:
    given = [option.value or "" for option in line.all("cpu")] if line else []
    if not given:
        # a QOM type: Haswell-v4-x86_64-cpu
        kind = (cpu_type or "").removesuffix("-cpu")
        return kind.rpartition("-")[0] or None, {}
    name, *words = given[-1].split(",")
    # QEMU takes `+x` and `-x` last, whatever their order (target/i386/cpu.c)
    plain = [word for word in words if word and word[0] not in "+-"]
    props: dict[str, Any] = dict(map(_pair, plain))
    props |= {word[1:]: True for word in words if word.startswith("+")}
    props |= {word[1:]: False for word in words if word.startswith("-")}
    return name, {key.replace("_", "-"): value for key, value in props.items()}


def _pair(word: str) -> tuple[str, bool | int | str]:
    key, equals, value = word.partition("=")
    if not equals:
        return key, True
    if value in _WORDS:
        return key, _WORDS[value]
    try:
        return key, int(value, 0)
    except ValueError:
        return key, value
