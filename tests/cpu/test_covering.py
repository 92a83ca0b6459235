"""Which specialisations are compiled to know that all compile, on which architecture."""

import itertools
import re

import pytest

from cupy_fp8kv import offline, plan
from cupy_fp8kv.bench import limit
from cupy_fp8kv.formats import KV_FORMATS
from cupy_fp8kv.jit import covering, sources
from cupy_fp8kv.jit.compiler import ARCHITECTURES
from cupy_fp8kv.jit.spec import MergeSpec
from cupy_fp8kv.layouts import LAYOUTS
from cupy_fp8kv.problem import DecodeProblem


def test_pairwise_covers_every_pair_with_few_choices():
    factors = {"a": range(5), "b": "xyz", "c": (True, False), "d": range(4)}
    chosen = covering.pairwise(factors)
    for one in factors:
        for other in factors:
            met = {(row[one], row[other]) for row in chosen}
            assert one == other or met == {(x, y) for x in factors[one] for y in factors[other]}
    assert 20 <= len(chosen) <= 25


def guards(arch):
    """What the sources' guards answer on an architecture, by their limits."""
    limits = re.findall(r"__CUDA_ARCH__ >= (\d+)", sources.FILES["base/ptx.cuh"])
    assert len(limits) == len(re.findall(r"^#.*__CUDA_ARCH__", "".join(sources.FILES.values()), re.M)) == 3
    return {int(limit): 10 * arch >= int(limit) for limit in limits}


@pytest.mark.parametrize(("arch", "other"), [(arch, other) for arch, (other, _) in covering.ALIKE.items()])
def test_what_is_left_out_is_compiled_for_an_architecture_like_it(arch, other):
    """Neither planners nor guards in the sources tell the two apart in what is left out."""
    assert {arch, other} <= set(ARCHITECTURES) and other not in covering.ALIKE
    usual = [spec for spec, _ in offline.jobs(None, [arch]) if spec not in limit.SPECS]
    left_out = set(covering.covering_specs(arch)) - set(usual)
    assert left_out and left_out < set(covering.covering_specs(other))
    assert set(usual) < set(covering.covering_specs(arch)) and {at for _, at in offline.jobs(None, [arch])} == {arch}
    differ = {limit for limit, answer in guards(arch).items() if answer != guards(other)[limit]}
    if differ:
        # The conversion of FP8, which decode needs for E4M3 alone.
        assert differ == {890} and all(spec.entry == "decode" for spec in left_out)
        assert not any("e4m3" in (spec.k, spec.v) for spec in left_out)


def test_decode_of_e5m2_does_not_convert():
    """Its codes are the upper bytes of fp16 numbers, on every architecture."""
    text = sources.FILES["kv_format/e5m2.cuh"]
    decode = re.search(r"DEVICE void decode_word\(.*?\n    }\n", text, re.S)
    assert decode and "permute_bytes" in decode[0] and not re.search(r"#|e5m2x2|FP8_HARDWARE", decode[0])
    assert decode.end() < text.index("#if FP8_HARDWARE")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_default_set_has_what_planners_choose(arch):
    """For E4M3 without options, whatever batch, lengths and device: padded and, where rows go to registers, pages."""
    specs = covering.default_specs(arch)
    shapes = {(spec.head_dim, spec.column_tiles, spec.warps, spec.ctas_per_sm, spec.heads) for spec in specs
              if spec.entry == "decode"}  # fmt: skip
    for q, head_dim, group in itertools.product(("f16", "bf16"), (64, 128, 256), (1, 8, 12, 16)):
        strides = (4096 * head_dim, head_dim, head_dim)
        problem = DecodeProblem(16, 4096, group, 1, head_dim, q, "e4m3", "e4m3", (head_dim, head_dim), strides, strides)
        for spec in plan.specs(problem, arch):
            assert spec in specs
            shapes.discard((spec.head_dim, spec.column_tiles, spec.warps, spec.ctas_per_sm, spec.heads))
    assert not shapes


@pytest.mark.parametrize("arch", [80, 90])
def test_covering_set(arch):
    specs = covering.covering_specs(arch)
    assert specs == covering.covering_specs(arch) and len(set(specs)) == len(specs) < 600
    decode = [spec for spec in specs if spec.entry == "decode"]
    assert {spec.head_dim for spec in decode} == set(range(16, 257, 16))
    assert {(spec.k, spec.v) for spec in decode} == {(k, v) for k in KV_FORMATS for v in KV_FORMATS}
    # The switch has kernels of its own, so that each pair below is of one that users may reach.
    software = [spec for spec in decode if spec.software_fp8]
    assert {(spec.k, spec.v, spec.head_dim, spec.layout) for spec in software} == {
        ("e4m3", "e4m3", head_dim, layout) for head_dim in (64, 128, 256) for layout in LAYOUTS if arch >= 89
    }  # fmt: skip
    assert {spec.q for spec in software} == ({"f16", "bf16"} if arch >= 89 else set())
    assert {spec.column_tiles for spec in software} == ({1, 2} if arch >= 89 else set())
    kinds = {(spec.schedule, spec.layout, spec.stages > 0) for spec in software}
    usual = {(spec.schedule, spec.layout, spec.stages > 0) for spec in decode if not spec.many_queries}
    assert kinds == (usual if arch >= 89 else set())
    decode = [spec for spec in decode if not spec.software_fp8]
    for one, other in itertools.combinations(("q", "k", "v", "head_dim", "layout", "soft_cap"), 2):
        met = {(getattr(spec, one), getattr(spec, other)) for spec in decode}
        values = [{getattr(spec, name) for spec in decode} for name in (one, other)]
        assert met == set(itertools.product(*values)), (one, other)
    paged = [spec for spec in decode if spec.layout == "paged"]
    assert {spec.head_dim for spec in paged} == set(range(16, 257, 16))
    assert {spec.q for spec in paged} == {"f16", "bf16"}
    assert {spec.k for spec in paged} == set(KV_FORMATS) == {spec.v for spec in paged}
    assert {spec.entry for spec in specs} == {
        "decode", "schedule", "merge", "amax", "scales", "quantize", "dequantize", "check_tables", "merge_given",
        "append", "copy_pages", "gather",
    }  # fmt: skip
    has_rings = arch >= 90
    for entry in ("decode", "merge"):
        found = {spec.schedule for spec in specs if spec.entry == entry}
        assert found == ({"uniform", "listed", "even"} if has_rings else {"uniform", "listed"})
    assert {MergeSpec.behind(spec) for spec in decode} == {spec for spec in specs if spec.entry == "merge"}
    even = [spec for spec in decode if spec.schedule == "even"]
    assert {(spec.layout, spec.heads, spec.column_tiles) for spec in even} == {
        (layout, heads, tiles) for layout in LAYOUTS for heads in (1, 2) for tiles in (1, 2) if has_rings
    }  # fmt: skip
