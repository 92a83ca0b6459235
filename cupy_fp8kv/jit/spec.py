"""Specialisations: frozen values that say which kernel is meant, print themselves and render their own source."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import KV_FORMATS, kv_format
from ..layouts import LAYOUTS
from ..positions import POSITION_MODES
from . import sources

#: Policies of ``cuda_src/schedule/``, by the name of their header.
SCHEDULES = {"uniform": "UniformSchedule", "listed": "ListedSchedule", "even": "EvenSchedule"}


def _constants(**values: int | bool) -> list[str]:
    lines = []
    for name, value in values.items():
        kind, text = ("bool", str(value).lower()) if isinstance(value, bool) else ("int", str(value))
        lines.append(f"constexpr {kind} {name} = {text};")
    return lines


def _header(name: str) -> str:
    return f"kv_format/{name}.cuh"


@dataclass(frozen=True)
class DecodeSpec:
    """One compiled ``cuda_src/decode.cu``. Formats are names in ``formats.KV_FORMATS``."""

    q: str
    k: str
    v: str
    head_dim: int
    column_tiles: int
    subtiles: int
    warps: int  # that work on rows; a ring has one more, which fills it
    ctas_per_sm: int
    heads: int = 1  # neighbouring cache heads that a CTA works on
    stages: int = 0  # of a ring of boxes in shared memory, which the kernel is told; 0: rows go straight to registers
    schedule: str = "uniform"  # or another of SCHEDULES
    many_queries: bool = False  # whether several rows of q see the same rows of K and V
    soft_cap: bool = False
    position: str = "NONE"
    software_fp8: bool = False
    layout: str = "padded"

    entry = "decode"

    @property
    def query_terms(self) -> int:
        # query.cuh: fp16 is exact in two bf16 terms, everything else in one.
        return 2 if self.q == "f16" and self.k == "bf16" else 1

    @property
    def fragment_registers(self) -> tuple[int, int, int]:
        """Registers of a thread that hold fragments and softmax states, for each value of ``ahead``.

        Some 40 more hold everything else. decode.cu says what ``ahead`` is.
        """
        steps = self.head_dim // 16
        weights = 2 if self.v == "bf16" else 1
        always = 4 * self.column_tiles * (steps + self.subtiles + 1) + 2 * self.column_tiles * weights
        always += 8 * (self.column_tiles - 1)
        keys = self.subtiles * 2 * steps * KV_FORMATS[self.k].itemsize
        values = self.subtiles * 4 * -(-steps * KV_FORMATS[self.v].itemsize // 2)
        converted = self.subtiles * 4 * steps
        return always + max(keys, values), always + keys + values, always + converted + keys + values

    @property
    def ahead(self) -> int:
        """How early the next tile is asked for: the earliest that compiles without a spill, or -1 if none does."""
        if self.stages:
            return 0
        return next((i for i in (2, 1, 0) if self.fragment_registers[i] <= self._most_registers[i]), -1)

    @property
    def _most_registers(self) -> tuple[int, int, int]:
        # Measured with NVRTC 12.9 over sm_80 to sm_120. K of two bytes is not converted, so it stays in its registers
        # until the products are done: asking for more of it right after them spills early. Rows that are looked up take
        # a few registers more where K or V is wide, and so do the two terms of a weight where V is BF16.
        k_is_fp8, v_is_fp8 = (KV_FORMATS[name].is_fp8 for name in (self.k, self.v))
        if self.layout == "padded":
            return 175, 222 if k_is_fp8 else 0, 232
        if k_is_fp8:
            return (183, 216, 232) if v_is_fp8 else (180, 200, 200)
        return (160, 0, 216) if self.v == "bf16" else (172, 0, 216)

    @property
    def tile_rows(self) -> int:
        return 16 * self.subtiles

    @property
    def threads(self) -> int:
        return 32 * (self.warps + (self.stages > 0) + (3 if self.schedule == "even" else 0))  # who feeds, who merges

    @property
    def turn_rows(self) -> int:
        """Rows that the warps of a CTA take together."""
        return self.warps // self.heads * self.tile_rows

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage of a ring: a box of K or one of V, see attention/ring.cuh."""
        row_bytes = self.head_dim * max(KV_FORMATS[name].itemsize for name in (self.k, self.v))
        return -(-self.heads * self.turn_rows * row_bytes // 1024) * 1024

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of K and one of V."""
        return self.head_dim * sum(KV_FORMATS[name].itemsize for name in (self.k, self.v))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.stages * (self.stage_bytes + 2 * 8) + self._fixed_shared_bytes

    @property
    def _fixed_shared_bytes(self) -> int:
        """Shared memory beside a ring's; the kernel asserts that it comes to the same figure."""
        steps = self.head_dim // 16
        query = self.heads * self.column_tiles * (steps * self.query_terms * 32 * 8 + 8 * 4)
        states = self.warps * self.column_tiles * 8 * 8
        # combine.cuh: one tile of columns at a time where all do not fit.
        tile = self.warps * 8 * (20 * min(steps, 8) + 4) * 4
        most = 84_000 if self.ctas_per_sm == 1 else 64_000 // self.ctas_per_sm
        tiles = self.column_tiles if self.column_tiles * tile <= most else 1
        # attention/work_queue.cuh: works with their queries in 16 bits, and two that have parts.
        slots = 4 if self.column_tiles == 1 else 2
        queue = slots * (96 + self.heads * 8 * self.column_tiles * self.head_dim * 2) + 2 * 72
        return query + states + tiles * tile + (queue if self.schedule == "even" else 0)

    def source(self) -> str:
        position_header, position = POSITION_MODES[self.position]
        headers = [_header(name) for name in (self.q, self.k, self.v)]
        headers += ["scale/head.cuh", f"layout/{self.layout}.cuh", f"position/{position_header}.cuh"]
        headers += [f"schedule/{self.schedule}.cuh"]
        roles = (("QFormat", self.q), ("KFormat", self.k), ("VFormat", self.v))
        lines = [f"using {role} = {KV_FORMATS[name].policy};" for role, name in roles]
        lines += ["using Scale = HeadScale;", f"using Layout = {LAYOUTS[self.layout]};"]
        lines += [f"using Position = {position};", f"using Schedule = {SCHEDULES[self.schedule]};"]
        lines += _constants(
            kHeadDim=self.head_dim, kColumnTiles=self.column_tiles, kSubtiles=self.subtiles, kWarps=self.warps,
            kHeads=self.heads, kHasRing=self.stages > 0, kCtasPerSm=self.ctas_per_sm, kAhead=self.ahead,
            kSoftCap=self.soft_cap, kManyQueries=self.many_queries, kSharedBytes=self._fixed_shared_bytes,
        )  # fmt: skip
        return _software(self.software_fp8) + sources.render(self._title, headers, lines, "decode.cu")

    def __str__(self) -> str:
        return f"{self._title[:-1]} stages={self.stages}]" if self.stages else self._title

    @property
    def _title(self) -> str:
        """What the kernel is; how many stages a ring has is not part of it."""
        flags = "".join(f" {name}" for name in ("many_queries", "soft_cap", "software_fp8") if getattr(self, name))
        position = "" if self.position == "NONE" else f" {self.position}"
        layout = "" if self.layout == "padded" else f" {self.layout}"
        ring = f" ring heads={self.heads}" if self.stages else ""
        how = f"{ring}{layout}{_named(self.schedule)}{position}{flags}"
        return (
            f"decode[q={self.q} k={self.k} v={self.v} d={self.head_dim} columns={8 * self.column_tiles} "
            f"rows={self.tile_rows} warps={self.warps}x{self.ctas_per_sm}{how}]"
        )


@dataclass(frozen=True)
class MergeSpec:
    """One compiled ``cuda_src/merge.cu``, by the type of the result and the schedule of what it merges.

    An even schedule asks for lengths as ``layout`` has them.
    """

    q: str
    schedule: str = "uniform"
    layout: str = "padded"
    many_queries: bool = False

    entry = "merge"
    threads = 256
    shared_bytes = 0

    def source(self) -> str:
        lines = [f"using QFormat = {KV_FORMATS[self.q].policy};", f"using Schedule = {SCHEDULES[self.schedule]};"]
        lines += [f"using Layout = {LAYOUTS[self.layout]};", *_constants(kManyQueries=self.many_queries)]
        headers = [_header(self.q), f"layout/{self.layout}.cuh", f"schedule/{self.schedule}.cuh"]
        return sources.render(str(self), headers, lines, "merge.cu")

    def __str__(self) -> str:
        layout = "" if self.layout == "padded" else f" {self.layout}"
        queries = " many_queries" if self.many_queries else ""
        return f"merge[out={self.q}{layout}{_named(self.schedule)}{queries}]"

    @classmethod
    def behind(cls, spec: DecodeSpec) -> MergeSpec:
        """What merges the partial results of a decode kernel."""
        return cls(spec.q, spec.schedule, spec.layout if spec.schedule == "even" else "padded", spec.many_queries)


@dataclass(frozen=True)
class ScheduleSpec:
    """``cuda_src/schedule.cu`` on one CTA of ``threads`` threads; all numbers of threads share one source."""

    threads: int = 1024

    entry = "schedule"
    shared_bytes = 0

    @classmethod
    def of_batch(cls, batch: int) -> ScheduleSpec:
        """A thread a request, as far as a CTA goes: a power of two of warps."""
        return cls(min(1024, max(32, 1 << (batch - 1).bit_length())))

    def source(self) -> str:
        return sources.render("schedule", ["layout/padded.cuh"], ["using Layout = PaddedLayout;"], "schedule.cu")

    def __str__(self) -> str:
        return f"schedule[threads={self.threads}]"


@dataclass(frozen=True)
class QuantizeSpec:
    """One kernel of ``cuda_src/quantize.cu``: ``entry`` is ``amax``, ``scales``, ``quantize`` or ``dequantize``."""

    entry: str
    values: str
    codes: str
    software_fp8: bool = False

    threads = 256
    shared_bytes = 0

    def source(self) -> str:
        header, policy = _value_policy(self.values)
        lines = [f"using Values = {policy};", f"using Codes = {KV_FORMATS[self.codes].policy};"]
        title = f"quantize[values={self.values} codes={self.codes}]"
        text = sources.render(title, [header, _header(self.codes)], lines, "quantize.cu")
        return _software(self.software_fp8) + text

    def __str__(self) -> str:
        return f"{self.entry}[values={self.values} codes={self.codes}{' software_fp8' if self.software_fp8 else ''}]"


@dataclass(frozen=True)
class MergeStatesSpec:
    """One compiled ``cuda_src/merge_states.cu``, by the type of the values."""

    values: str

    entry = "merge_given"
    threads = 256
    shared_bytes = 0

    def source(self) -> str:
        header, policy = _value_policy(self.values)
        return sources.render(str(self), [header], [f"using Values = {policy};"], "merge_states.cu")

    def __str__(self) -> str:
        return f"merge_states[values={self.values}]"


@dataclass(frozen=True)
class AppendSpec:
    """One compiled ``cuda_src/append.cu``: dtype of what comes in and format of the cache.

    Without a dtype elements are copied as they are, and the format only says how large they are: :meth:`copying`.
    """

    values: str
    stored: str
    software_fp8: bool = False

    entry = "append"
    threads = 256
    shared_bytes = 0

    def source(self) -> str:
        fmt = KV_FORMATS[self.stored]
        headers = ["row_writer.cuh"]
        writer = f"CopyBytes<{fmt.itemsize}>"
        if self.values:
            header, policy = _value_policy(self.values)
            headers += [header, _header(fmt.name)]
            writer = f"Convert<{policy}, {fmt.policy}>"
        lines = [f"using Writer = {writer};", f"constexpr float kStoredMax = {fmt.max!r}f;"]
        lines += [f"constexpr float kLargestRounded = {fmt.largest_rounded!r}f;"]
        return _software(self.software_fp8) + sources.render(str(self), headers, lines, "append.cu")

    def __str__(self) -> str:
        if not self.values:
            return f"append[bytes={KV_FORMATS[self.stored].itemsize}]"
        return f"append[values={self.values} cache={self.stored}{' software_fp8' if self.software_fp8 else ''}]"

    @property
    def itemsize(self) -> int:
        """Bytes of an element that comes in."""
        return {"float32": 4, "": KV_FORMATS[self.stored].itemsize}.get(self.values, 2)

    @classmethod
    def copying(cls, itemsize: int) -> AppendSpec:
        return cls("", {1: "e4m3", 2: "f16"}[itemsize])


@dataclass(frozen=True)
class PagesSpec:
    """One kernel of ``cuda_src/pages.cu``: ``entry`` is ``copy_pages`` or ``gather``."""

    entry: str
    word_bytes: int

    threads = 128
    shared_bytes = 0

    def source(self) -> str:
        return sources.render(f"pages[word={self.word_bytes}]", [], _constants(kWordBytes=self.word_bytes), "pages.cu")

    def __str__(self) -> str:
        return f"{self.entry}[word={self.word_bytes}]"


@dataclass(frozen=True)
class CheckTablesSpec:
    """The compiled ``cuda_src/check_tables.cu``."""

    entry = "check_tables"
    threads = 128
    shared_bytes = 0

    def source(self) -> str:
        return sources.render(str(self), [], [], "check_tables.cu")

    def __str__(self) -> str:
        return "check_tables[]"


Spec = DecodeSpec | MergeSpec | ScheduleSpec | QuantizeSpec | MergeStatesSpec | AppendSpec | PagesSpec | CheckTablesSpec


def _named(schedule: str) -> str:
    return "" if schedule == "uniform" else f" {schedule}"


def _value_policy(dtype: str) -> tuple[str, str]:
    """Header and C++ type of floats that are read or written, by the name of their dtype."""
    if dtype == "float32":
        return "base/f32.cuh", "F32"
    fmt = kv_format(dtype)
    return _header(fmt.name), fmt.policy


def _software(on: bool) -> str:
    return "#define FP8_SOFTWARE 1\n" if on else ""
