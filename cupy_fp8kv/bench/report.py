"""What a run of the benchmark found: values that print, plot and save without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .suites import BASES, Shape

#: Relative L2 that rounding the result to q's type may cost, with as much again for everything else.
TOLERANCES = {"f16": 5e-4, "bf16": 4e-3}


@dataclass(frozen=True)
class PeerFigure:
    """Another system on the same shape: its times in microseconds, or ``reason`` why there are none.

    ``skipped``: it has no such case. Otherwise a reason is a failure.
    """

    us: float | None = None
    host_us: float | None = None
    error: float | None = None
    reason: str = ""
    skipped: bool = False


class _Figures:
    """What follows from the figures of a row, whatever was timed."""

    nbytes: Any
    limit_us: float
    us: float
    error: float
    tolerance: Any

    @property
    def fraction(self) -> float:
        return self.limit_us / self.us

    @property
    def gb_per_second(self) -> float:
        return float(self.nbytes / self.us / 1e3)

    @property
    def wrong(self) -> bool:
        return not self.error <= self.tolerance


@dataclass(frozen=True)
class Row(_Figures):
    """Times in microseconds; ``fraction`` is limit over ours. None where there is no such figure.

    ``plan_us`` and ``plan_host_us`` are those of a plan that is made once, and told its lengths once.
    """

    shape: Shape
    kv_bytes: int
    limit_us: float
    limit_by: str
    us: float
    us_low: float
    us_high: float
    host_us: float
    error: float
    fp16_us: float | None = None
    plan_us: float | None = None
    plan_host_us: float | None = None
    peers: Mapping[str, PeerFigure] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def nbytes(self) -> int:
        return self.kv_bytes

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.shape.q]

    @property
    def speedup(self) -> float | None:
        return None if self.fp16_us is None else self.fp16_us / self.us

    def peer_fraction(self, peer: str) -> float | None:
        """Of the limit; None where the peer has no time."""
        figure = self.peers.get(peer)
        return None if figure is None or figure.us is None else self.limit_us / figure.us

    def record(self) -> dict[str, Any]:
        values = {**asdict(self.shape), **asdict(self)}
        del values["shape"]
        values["peers"] = {name: asdict(figure) for name, figure in self.peers.items()}
        derived: dict[str, Any] = {
            "fraction": self.fraction, "gb_per_second": self.gb_per_second, "fp16_speedup": self.speedup,
        }  # fmt: skip
        if self.shape.page_size:
            derived |= {"shape": self.shape.unpaged_name, "of_limit": self.fraction}
        return {**values, **derived}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        shape = _known(Shape, record)
        if shape.get("kv_lens"):
            shape["kv_lens"] = tuple(shape["kv_lens"])
        peers = {name: PeerFigure(**_known(PeerFigure, figure)) for name, figure in record.get("peers", {}).items()}
        return cls(**{**_known(cls, record), "shape": Shape(**shape), "peers": peers})


@dataclass(frozen=True)
class CacheRow(_Figures):
    """An operation of suite cache: times in microseconds, and how long ``against`` takes in the same run.

    ``tolerance``: what ``error`` may be.
    """

    name: str
    what: str
    read_bytes: int
    written_bytes: int
    limit_us: float
    limit_by: str
    us: float
    us_low: float
    us_high: float
    host_us: float
    error: float
    tolerance: float
    against: str = ""
    against_us: float | None = None

    @property
    def nbytes(self) -> int:
        return self.read_bytes + self.written_bytes

    @property
    def times_faster(self) -> float | None:
        return None if self.against_us is None else self.against_us / self.us

    def record(self) -> dict[str, Any]:
        derived = {
            "nbytes": self.nbytes, "fraction": self.fraction, "gb_per_second": self.gb_per_second,
            "times_faster": self.times_faster,
        }  # fmt: skip
        return {**asdict(self), **derived}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> CacheRow:
        return cls(**_known(cls, record))


@dataclass(frozen=True)
class PeerInfo:
    """Who a peer is. Peers of one ``family`` are the ways of one project to do the same."""

    title: str
    family: str
    version: str


@dataclass(frozen=True)
class Report:
    """A suite's rows, and what they were measured with. ``machine`` has neither paths nor anything personal.

    ``rows``: of type :class:`CacheRow` in suite cache, otherwise :class:`Row`.
    """

    suite: str
    machine: Mapping[str, Any]
    sources: str
    method: str
    rows: tuple[Any, ...]
    peers: Mapping[str, PeerInfo] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return any(row.wrong for row in self.rows)

    @property
    def base(self) -> Row | None:
        """The row that the others are held against, in a suite that has one and a run that measured it."""
        return next((row for row in self.rows if row.name == BASES.get(self.suite)), None)

    @property
    def families(self) -> dict[str, list[str]]:
        """Peers that have a time, by their family."""
        found: dict[str, list[str]] = {}
        for name, peer in self.peers.items():
            if any(row.peer_fraction(name) for row in self.rows):
                found.setdefault(peer.family, []).append(name)
        return found

    def record(self) -> dict[str, Any]:
        return {
            "suite": self.suite, **self.machine, "sources": self.sources, "method": self.method,
            "tolerances": TOLERANCES, "peers": {name: asdict(peer) for name, peer in self.peers.items()},
            "rows": [row.record() for row in self.rows],
        }  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Report:
        """The report of a record. ValueError if it is not one."""
        try:
            kind = CacheRow if record["suite"] == "cache" else Row
            own = {"suite", "sources", "method", "tolerances", "peers", "rows"}
            return cls(
                record["suite"], {name: value for name, value in record.items() if name not in own},
                record["sources"], record["method"], tuple(kind.of(row) for row in record["rows"]),
                {name: PeerInfo(**_known(PeerInfo, peer)) for name, peer in record.get("peers", {}).items()},
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of the benchmark: {type(error).__name__}: {error}") from error


def _known(kind: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record has of a dataclass's fields: older records lack some, newer ones may have more."""
    return {one.name: record[one.name] for one in dataclasses.fields(kind) if one.name in record}
