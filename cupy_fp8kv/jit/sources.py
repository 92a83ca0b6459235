"""The CUDA sources: found, read and inlined into the one string that is compiled and that is the cache's key."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'\s*#include "([^"]+)"')


def _find_root() -> Path:
    # Inside the package in a wheel, beside it in a checkout.
    for root in (_PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src"):
        if (root / "decode.cu").is_file():
            return root
    raise ImportError(f"cupy_fp8kv: the CUDA sources are missing; looked for cuda_src in {_PACKAGE} and beside it")


ROOT = _find_root()
#: Every source file by its path below ``cuda_src``, read when the package is imported.
FILES: dict[str, str] = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.cu*"))
}


def digest() -> str:
    """A fingerprint of all sources, kept with measurements so that a record tells what it was measured on."""
    sha = hashlib.sha256()
    for name, text in FILES.items():
        sha.update(f"{name}\0{text}\0".encode())
    return sha.hexdigest()[:16]


def _inline(name: str, seen: set[str], out: list[str]) -> None:
    if name not in FILES:
        raise ValueError(f"cuda_src/{name} does not exist")
    seen.add(name)
    out.append(f'#line 1 "cuda_src/{name}"')
    for number, line in enumerate(FILES[name].splitlines(), 1):
        include = _INCLUDE.match(line) if "#include" in line else None
        if include and include[1] not in seen:
            _inline(include[1], seen, out)
            out.append(f'#line {number + 1} "cuda_src/{name}"')
        else:
            # An empty line in place of a directive keeps the numbers right.
            out.append("" if include or line.startswith("#pragma once") else line)


def render(title: str, headers: list[str], lines: list[str], unit: str) -> str:
    """One compilation unit: the policies' ``headers``, the specialisation's ``lines``, then ``cuda_src/<unit>``.

    Includes are inlined (each file once) with ``#line``, so an error names the real file, and an edited header is
    another string: no cache can give the kernel of the old one.
    """
    out: list[str] = [f"// {title}"]
    seen: set[str] = set()
    for header in headers:
        if header not in seen:
            _inline(header, seen, out)
    out.append('#line 1 "specialisation"')
    out += lines
    _inline(unit, seen, out)
    return "\n".join(out) + "\n"
