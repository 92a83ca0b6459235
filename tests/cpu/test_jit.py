"""The machinery between a specialisation and a kernel: sources, specs, argument blocks, compilation without a GPU."""

import ctypes
import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptx_functions import FUNCTIONS

import cupy_fp8kv
from cupy_fp8kv.backends import cuda, cuda_append, cuda_merging, cuda_pages
from cupy_fp8kv.formats import FP8_FORMATS, KV_FORMATS
from cupy_fp8kv.jit import compiler, params, sources
from cupy_fp8kv.jit.params import STRUCTS, TENSOR_MAP_BYTES, ParamBlock, divisors
from cupy_fp8kv.jit.spec import (
    SCHEDULES,
    AppendSpec,
    CheckTablesSpec,
    DecodeSpec,
    MergeSpec,
    MergeStatesSpec,
    PagesSpec,
    QuantizeSpec,
    ScheduleSpec,
)
from cupy_fp8kv.layouts import LAYOUTS
from cupy_fp8kv.plan import specs
from cupy_fp8kv.problem import DecodeProblem

ROOT = Path(cupy_fp8kv.__file__).parent.parent
SPEC = DecodeSpec("f16", "e4m3", "e5m2", 128, 1, 1, 16, 1)
QUANTIZE = QuantizeSpec("quantize", "float32", "e4m3")
SPECS = (
    SPEC, dataclasses.replace(SPEC, schedule="listed"), dataclasses.replace(SPEC, layout="paged"), MergeSpec("bf16"),
    MergeSpec("f16", "listed"), QUANTIZE, MergeStatesSpec("float16"), AppendSpec("float16", "e5m2"),
    PagesSpec("gather", 16), CheckTablesSpec(),
)  # fmt: skip
EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)


def text_of(name, kind):
    return (ROOT / "cuda_src" / name).read_text(encoding="utf-8") if kind == "file" else sources.FILES[name]


# Sources


def test_every_source_is_read_when_imported():
    on_disk = {path.relative_to(ROOT / "cuda_src").as_posix() for path in (ROOT / "cuda_src").rglob("*.cu*")}
    assert set(sources.FILES) == on_disk and {"decode.cu", "merge.cu", "quantize.cu", "params.cuh"} <= on_disk
    assert Path(sources.ROOT) == ROOT / "cuda_src"
    for name in on_disk:
        assert text_of(name, "file") == text_of(name, "read")


@EACH_SPEC
def test_each_header_is_inlined_once(spec):
    source = spec.source()
    opened = re.findall(r'^#line 1 "([^"]+)"$', source, re.M)
    assert len(opened) == len(set(opened)), f"twice: {[name for name in opened if opened.count(name) > 1]}"
    assert set(opened) - {"specialisation"} <= {f"cuda_src/{name}" for name in sources.FILES}
    assert "#include" not in source and "#pragma once" not in source
    # Whatever a file that came in includes came in too, before the line after the directive.
    for name in opened:
        if name != "specialisation":
            for include in re.findall(r'#include "([^"]+)"', sources.FILES[name.removeprefix("cuda_src/")]):
                assert f"cuda_src/{include}" in opened


@EACH_SPEC
def test_every_line_is_told_where_it_comes_from(spec):
    """Read the source as a compiler does: the file and number that #line gives each line must be right."""
    name, number, checked = None, 0, 0
    for line in spec.source().splitlines():
        directive = re.fullmatch(r'#line (\d+) "([^"]+)"', line)
        if directive:
            number, name = int(directive[1]), directive[2]
            continue
        if name and name.startswith("cuda_src/") and line:
            assert sources.FILES[name.removeprefix("cuda_src/")].splitlines()[number - 1] == line
            checked += 1
        number += 1
    assert checked > 40


@EACH_SPEC
def test_a_changed_header_is_another_source_and_another_digest(spec, monkeypatch):
    before, digest = spec.source(), sources.digest()
    assert spec.source() == before and sources.digest() == digest
    used = [name.removeprefix("cuda_src/") for name in re.findall(r'"(cuda_src/[^"]+)"', before)]
    for name in dict.fromkeys(used):
        with monkeypatch.context() as patch:
            patch.setitem(sources.FILES, name, sources.FILES[name] + "// changed\n")
            assert spec.source() != before and sources.digest() != digest, name
    unused = next(name for name in sources.FILES if name not in used)
    monkeypatch.setitem(sources.FILES, unused, "// changed")
    assert spec.source() == before and sources.digest() != digest


def test_a_missing_header_is_named(monkeypatch):
    monkeypatch.setitem(sources.FILES, "merge.cu", '#include "base/absent.cuh"\n')
    with pytest.raises(ValueError, match=r"cuda_src/base/absent\.cuh does not exist"):
        MergeSpec("f16").source()


# Specialisations


def every_spec():
    found = []
    for q, k, v, group, soft_cap, head_dim in itertools.product(
        ("f16", "bf16"), KV_FORMATS, KV_FORMATS, (1, 12), (False, True), (16, 64, 80, 128, 256)
    ):
        found += specs(DecodeProblem(1, 1, group, 1, head_dim, q, k, v, (0, 0), (0,) * 3, (0,) * 3, soft_cap), 90)
    found = list(dict.fromkeys(found))  # a group of 12 may be two blocks of 8 columns
    found += [dataclasses.replace(spec, software_fp8=True) for spec in found[:100]]
    found += [dataclasses.replace(spec, schedule="listed") for spec in found[:100]]
    found += [dataclasses.replace(spec, schedule="even") for spec in found[:100] if spec.stages]
    found += [dataclasses.replace(spec, layout="paged") for spec in found if not spec.stages or spec.schedule == "even"]
    found += [MergeSpec(q, schedule) for q in ("f16", "bf16") for schedule in SCHEDULES] + [ScheduleSpec()]
    found += [MergeSpec(q, "even", "paged") for q in ("f16", "bf16")]
    found += [MergeStatesSpec(dtype) for dtype in ("float16", "bfloat16", "float32")]
    found += [AppendSpec.copying(itemsize) for itemsize in (1, 2)]
    for values, stored, software in itertools.product(("float16", "float32"), KV_FORMATS, (False, True)):
        found.append(AppendSpec(values, stored, software))
    found += [PagesSpec(entry, word) for entry in ("copy_pages", "gather") for word in (4, 16)]
    found.append(CheckTablesSpec())
    for entry, values, codes, software in itertools.product(
        ("amax", "scales", "quantize", "dequantize"), ("float16", "bfloat16", "float32"), FP8_FORMATS, (False, True)
    ):
        found.append(QuantizeSpec(entry, values, codes, software))
    return found


def test_every_specialisation_has_its_own_name():
    found = every_spec()
    assert len(found) > 1500
    assert len({str(spec) for spec in found}) == len(set(found)) == len(found)


def test_every_specialisation_has_its_own_source():
    found = every_spec()[::7]
    # The entries of one quantize.cu share a module.
    keys = [(spec.source(), spec.entry) for spec in found]
    assert len(set(keys)) == len(keys)


def test_a_specialisation_shows_what_it_is():
    wide = dataclasses.replace(SPEC, q="bf16", column_tiles=2, head_dim=80, soft_cap=True, software_fp8=True)
    for text in ("q=bf16", "k=e4m3", "v=e5m2", "d=80", "columns=16", "soft_cap", "software_fp8"):
        assert text in str(wide)
    assert "soft_cap" not in str(SPEC) and "software" not in str(SPEC)
    assert str(wide) in wide.source() and "#define FP8_SOFTWARE 1" in wide.source()
    assert "#define FP8_SOFTWARE" not in SPEC.source().partition("cuda_src/")[0]
    for line in ("using QFormat = BF16;", "using KFormat = E4M3;", "using VFormat = E5M2;", "kHeadDim = 80;",
                 "kColumnTiles = 2;", "kSoftCap = true;"):  # fmt: skip
        assert line in wide.source()
    with pytest.raises(dataclasses.FrozenInstanceError):
        wide.head_dim = 64


def test_names_of_policies_exist():
    for fmt in KV_FORMATS.values():
        assert re.search(rf"struct {fmt.policy}\b", sources.FILES[f"kv_format/{fmt.name}.cuh"])
        if fmt.is_fp8:
            assert f"kMax = {fmt.max}f" in sources.FILES[f"kv_format/{fmt.name}.cuh"]
    for name, policy in LAYOUTS.items():
        assert re.search(rf"struct {policy}\b", sources.FILES[f"layout/{name}.cuh"])


# Argument blocks

#: Size and alignment in C, for every type that params.cuh may use.
C_TYPES = {
    "i64": ctypes.c_int64, "int": ctypes.c_int32, "u32": ctypes.c_uint32, "float": ctypes.c_float,
}  # fmt: skip


def c_struct(name):
    """The struct as ctypes lays it out, which is as a C compiler does; read here, not by params.py."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", sources.FILES["params.cuh"], re.S)[1]
    maps = len(re.findall(r"^    TensorMap \w+;", body, re.M))
    fields = [("maps", ctypes.c_char * (TENSOR_MAP_BYTES * maps))] if maps else []
    for line in body.splitlines():
        declared = line.split("//")[0].strip()
        if not declared or declared.startswith("TensorMap"):
            continue
        kind, star, field = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+);", declared).groups()
        fields.append((field, ctypes.c_void_p if star else C_TYPES.get(kind) or c_nested(kind)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def c_nested(name):
    found = (re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.S) for text in sources.FILES.values())
    body = next(match[1] for match in found if match)
    fields = [(field, C_TYPES[kind]) for kind, field in re.findall(r"^    (int|u32|i64|float) (\w+);", body, re.M)]
    assert fields, f"{name} has no fields that could be read"
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def flattened(struct, base=0):
    """(name, offset, type) of every plain field."""
    for field, kind in struct._fields_:
        at = base + getattr(struct, field).offset
        if issubclass(kind, ctypes.Structure):
            for (inner, offset, inner_kind), (first, _) in zip(flattened(kind, at), kind._fields_, strict=True):
                yield (field if inner == kind._fields_[0][0] else f"{field}_{inner}"), offset, inner_kind
                assert first == inner
        elif field != "maps":
            yield field, at, kind


#: Fields that change from call to call; of other blocks, all.
PLAIN = {name: [field for field in fields if field[1] != "128s"] for name, fields in STRUCTS.items()}
LEADING = {name: len(fields) for name, fields in PLAIN.items()} | {
    "DecodeParams": cuda._DECODE_LEADING, "QuantizeParams": cuda._QUANTIZE_LEADING,
    "MergeStatesParams": cuda_merging._LEADING, "AppendParams": cuda_append._LEADING,
    "CopyPagesParams": cuda_pages._COPY_LEADING, "GatherParams": cuda_pages._GATHER_LEADING,
}  # fmt: skip
CODES = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_uint32: "I", ctypes.c_float: "f"}


def numbered(name):
    """A block whose fields hold 1, 2, 3 …, and its bytes."""
    fields = [field for field, _ in PLAIN[name]]
    leading = LEADING[name]
    block = ParamBlock(name, leading, **{field: i for i, field in enumerate(fields[leading:], leading + 1)})
    block.write(*range(1, leading + 1))
    argument = ctypes.c_void_p.from_address(block.address).value
    return fields, argument, block


def test_every_struct_is_read():
    declared = re.findall(r"^struct (\w+) \{", sources.FILES["params.cuh"], re.M)
    assert {"DecodeParams", "QuantizeParams"} <= set(declared) == set(STRUCTS) == set(LEADING)


@pytest.mark.parametrize("name", LEADING)
def test_blocks_are_laid_out_as_a_compiler_does(name):
    struct = c_struct(name)
    layout = list(flattened(struct))
    assert [(field, CODES[kind]) for field, _, kind in layout] == PLAIN[name]
    fields, address, block = numbered(name)
    assert len(block._buffer) >= ctypes.sizeof(struct), "a launch would copy what lies behind the block"
    for value, (field, offset, kind) in enumerate(layout, 1):
        got = kind.from_address(address + offset).value
        assert got == value, f"{name}.{field} at {offset}: {got}, packed as number {value}"
    assert fields == [field for field, _, _ in layout]


@pytest.mark.parametrize("name", LEADING)
def test_a_write_changes_only_what_leads(name):
    fields, address, block = numbered(name)
    struct = c_struct(name)
    size = ctypes.sizeof(struct)
    offsets = [*(offset for _, offset, _ in flattened(struct)), size]
    before = ctypes.string_at(address, len(block._buffer))
    block.write(*range(101, 101 + LEADING[name]))
    after = ctypes.string_at(address, len(block._buffer))
    cut = offsets[LEADING[name]]
    assert before[cut:] == after[cut:] and before[:cut] != after[:cut] and len(fields) == len(offsets) - 1
    assert size <= 4096, "kernels take at most 4 KB of arguments on every architecture"


def test_fields_must_match():
    fields = [field for field, _ in STRUCTS["QuantizeParams"]]
    rest = dict.fromkeys(fields[LEADING["QuantizeParams"] :], 0)
    ParamBlock("QuantizeParams", LEADING["QuantizeParams"], **rest)
    with pytest.raises(AssertionError, match=fields[-1]):
        ParamBlock("QuantizeParams", LEADING["QuantizeParams"], **{k: v for k, v in rest.items() if k != fields[-1]})
    with pytest.raises(AssertionError, match="QuantizeParams"):
        ParamBlock("QuantizeParams", LEADING["QuantizeParams"], **rest, more=1)


def test_what_leads_is_what_a_call_writes():
    """The first field that a plan fixes is where params.cuh says so."""
    body = re.search(r"struct DecodeParams \{(.*?)\n\};", sources.FILES["params.cuh"], re.S)[1]
    before = body.partition("What a plan fixes")[0]
    declared = re.findall(r"^    (?!TensorMap)[\w ]+\*? \w+;", before, re.M)
    assert len(declared) == LEADING["DecodeParams"]


def test_tensor_maps_come_first_and_the_block_ends_where_the_struct_does():
    """alignas(64): the size of the struct, which a launch copies, is a multiple of that."""
    struct, (_, address, block) = c_struct("DecodeParams"), numbered("DecodeParams")
    maps = (ctypes.c_char * len(block.tensor_maps)).from_buffer(block.tensor_maps)
    assert ctypes.addressof(maps) == address and len(maps) == 2 * TENSOR_MAP_BYTES
    assert len(block._buffer) == -(-ctypes.sizeof(struct) // 64) * 64
    assert not ParamBlock("ReadParams", len(PLAIN["ReadParams"])).tensor_maps


@pytest.mark.parametrize("value", [1, 2, 3, 5, 7, 8, 12, 127, 128, 129, 1000, 65535, 65537, 2**20, 2**30, 2**31 - 1])
def test_divisors_divide(value):
    """The kernel's arithmetic, in Python: high half of a 32-bit product, an addition that may not overflow, a shift."""
    fields = divisors(x=value)
    assert fields["x"] == value and 0 <= fields["x_multiplier"] < 2**32 and 0 <= fields["x_shift"] < 32
    rng = np.random.default_rng(0)
    dividends = {0, 1, value - 1, value, value + 1, 2**31 - 1, 2**31 - 2, *map(int, rng.integers(0, 2**31, 2000))}
    dividends |= {n for m in map(int, rng.integers(0, 2**31 // value + 1, 500)) for n in (m * value - 1, m * value)}
    for n in dividends:
        if 0 <= n < 2**31:
            total = (n * fields["x_multiplier"] >> 32) + n
            assert total < 2**32 and total >> fields["x_shift"] == n // value, n


# Compilation, without a GPU


@pytest.fixture
def nvrtc():
    return pytest.importorskip("cupy").cuda.nvrtc


@pytest.mark.parametrize("arch", [80, 90])
def test_a_decode_kernel_compiles_without_spills(nvrtc, arch):
    assert arch in compiler.ARCHITECTURES
    problem = DecodeProblem(1, 1, 8, 1, 128, "f16", "e4m3", "e4m3", (0, 0), (0,) * 3, (0,) * 3)
    spec = specs(problem, 90)[0]
    report = compiler.compile_offline(spec, arch)
    assert not report.error and report.spec == spec and report.arch == arch
    assert report.spill_bytes == 0 and report.stack_bytes == 0
    assert 32 <= report.registers <= 65536 // (spec.threads * spec.ctas_per_sm)
    assert report.shared_bytes >= spec.shared_bytes > 0
    assert report.cubin[:4] == b"\x7fELF" and report.seconds > 0


@EACH_SPEC
@pytest.mark.parametrize("software", [False, True])
def test_every_kind_of_kernel_compiles(nvrtc, spec, software):
    if software:
        if not hasattr(spec, "software_fp8"):
            return
        spec = dataclasses.replace(spec, software_fp8=True)
    report = compiler.compile_offline(spec, 90)
    assert not report.error and report.spill_bytes == 0 and report.registers > 0
    assert spec.entry.encode() in report.cubin


@pytest.mark.parametrize("name", ["base/ptx.cuh", "softmax_state.cuh", "kv_format/e4m3.cuh", "decode.cu"])
def test_an_error_names_the_real_file_and_line(nvrtc, monkeypatch, name):
    lines = sources.FILES[name].splitlines()
    at = max(i for i, line in enumerate(lines, 1) if line == "};" or line.startswith("}"))
    lines.insert(at, "syntax error here")
    monkeypatch.setitem(sources.FILES, name, "\n".join(lines) + "\n")
    report = compiler.compile_offline(SPEC, 90)
    assert re.search(rf"cuda_src/{re.escape(name)}\({at + 1}\): error", report.error), report.error
    assert not report.cubin and report.registers == 0 and report.seconds > 0


def test_a_broken_specialisation_is_told_apart(nvrtc):
    report = compiler.compile_offline(dataclasses.replace(SPEC, head_dim=24), 90)
    assert "head_dim must be a multiple of 16" in report.error and "cuda_src/base/row_slice.cuh" in report.error


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_the_kernels_of_ptx_functions_compile(arch):
    """One source of all functions: what test_gpu_ptx.py compiles one by one."""
    pytest.importorskip("cupy")
    functions = [function for function in FUNCTIONS if function.arch <= arch]

    class All:
        entry = "kernel"
        shared_bytes = 0

        def source(self):
            header = functions[0].source().split("struct Params", 1)[0]
            bodies = [function.source().split("struct Params", 1)[1] for function in functions]
            return header + "".join(
                f"namespace kernel_{i} {{ struct Params{body.replace('void kernel', f'void kernel_{i}')} }}\n"
                for i, body in enumerate(bodies)
            )

    report = compiler.compile_offline(All(), arch)
    assert not report.error and report.cubin


# How the sources are written


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def test_inline_assembly_is_in_one_file():
    found = {name for name, text in sources.FILES.items() if re.search(r"\b(__)?asm(__)?\b", without_comments(text))}
    assert found == {"base/ptx.cuh"}


def test_sources_do_not_know_the_emulator():
    """Kernels run on a CPU as they are: another PTX header stands in, and nothing asks which."""
    pattern = r"emulator|EMULAT\w*|__GNUC__|__clang__|__CUDACC\w*|__NVCC__|_HOST\w*\b"
    assert not [name for name, text in sources.FILES.items() if re.search(pattern, without_comments(text))]


def test_intrinsics_are_in_one_file():
    """Warp intrinsics, barriers and conversions too: what depends on an architecture is decided in one place."""
    pattern = (
        r"\b__(sync\w+|shfl\w*|any\w*|all_sync|ballot\w*|match_\w+|reduce_\w+|activemask|threadfence\w*|nanosleep"
        r"|float_as\w+|uint_as\w+|float2\w+|\w+2float\w*|umulhi|byte_perm|ldg|ldc[gavs]|stc[gs]|cvta\w*|fdiv\w*"
        r"|pipeline\w*|mbarrier\w*)\b|\batomic[A-Z]\w*|\bcuda::|\bnvcuda::"
    )
    found = {name for name, text in sources.FILES.items() if re.search(pattern, without_comments(text))}
    assert found == {"base/ptx.cuh"}
    architecture = {name for name, text in sources.FILES.items() if "__CUDA_ARCH__" in without_comments(text)}
    assert architecture == {"base/ptx.cuh"}


def test_entry_points_take_a_documented_block():
    entries = {}
    for name, text in sources.FILES.items():
        for entry, block in re.findall(
            r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(const __grid_constant__ (\w+) p\)', text
        ):
            entries[entry] = (name, block)
        assert text.count("__global__") == len([e for e, (unit, _) in entries.items() if unit == name])
    units = {"decode": "decode.cu", "merge": "merge.cu", "schedule": "schedule.cu"}
    units |= {"merge_given": "merge_states.cu", "append": "append.cu"}
    units |= {"copy_pages": "pages.cu", "gather": "pages.cu"}
    units["check_tables"] = "check_tables.cu"
    units |= dict.fromkeys(("amax", "scales", "quantize", "dequantize"), "quantize.cu")
    assert {entry: entries[entry][0] for entry in units} == units
    assert {block for _, block in entries.values()} == set(STRUCTS), "every block belongs to a kernel"
    # Pointers say what they point to, and anything that may be null says so.
    for line in sources.FILES["params.cuh"].partition("struct ReadParams")[0].splitlines():
        if re.match(r"\s+(const )?\w+\* \w+;", line):
            assert re.search(r"; +// \S", line), f"no shape: {line.strip()}"


def test_kernels_name_no_policy():
    """ARCHITECTURE: formats, scale, layout, position and schedule reach kernels under their roles only."""
    text = "".join(without_comments(sources.FILES[name]) for name in ("decode.cu", "merge.cu", "schedule.cu"))
    names = {fmt.policy for fmt in KV_FORMATS.values()} | {
        "HeadScale", *LAYOUTS.values(), "NoPosition", *SCHEDULES.values(), "kv_format/", "scale/", "layout/",
        "position/",
    }  # fmt: skip
    assert not {name for name in names if re.search(rf"\b{name}", text)}


def test_headers_are_guarded_and_explain_themselves():
    for name, text in sources.FILES.items():
        assert text.startswith("// "), f"{name} does not say what it is"
        assert ("#pragma once" in text) == name.endswith(".cuh"), name
        assert text.endswith("\n") and "\t" not in text and "\r" not in text, name


LIMITS = {".cuh": 500, ".cu": 500, ".py": 400}


@pytest.mark.parametrize("folder", ["cuda_src", "cupy_fp8kv"])
def test_files_are_of_a_size_to_feel_at_home_in(folder):
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*") if path.suffix in LIMITS
    }  # fmt: skip
    assert len(lengths) > 15
    assert not {name: n for name, n in lengths.items() if n > LIMITS[Path(name).suffix]}


def test_lines_fit():
    for name, text in sources.FILES.items():
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
        assert not long, f"cuda_src/{name}: lines {long} are longer than 120"


def test_params_are_read_without_cupy():
    script = "import sys; from cupy_fp8kv.jit import params; print(len(params.STRUCTS), 'cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [str(len(params.STRUCTS)), "False"]
