"""Each peer in a process of its own, so that a crash or a broken CUDA context costs one figure and not the run.

The parent hands over shapes as JSON on stdin; the child appends a JSON line for each to a file, or one that says that
the peer cannot be imported.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import terminal
from ..jit.device import require_cupy
from .inputs import Filler, InputSets
from .peers import PEERS, Peer, TorchInputs, UnsupportedError, shapes_of
from .report import PeerFigure, PeerInfo
from .suites import Shape
from .timing import Call, host_us, time_calls

#: A process that takes longer is ended.
_MOST_SECONDS = 300.0
#: Exit code of a process whose CUDA context broke: the shapes that are left need another.
_BROKEN = 3
#: Enough of an exception's text to know it again.
_REASON_CHARACTERS = 200


class TorchGraphs:
    """What timing.CupyGraphs is, for calls that follow torch's current stream and allocate from its pools."""

    def __init__(self, torch: Any):
        self._torch = torch

    def on(self, stream: Any) -> Any:
        return self._torch.cuda.stream(self._torch.cuda.ExternalStream(stream.ptr))

    def capture(self, stream: Any, call: Call, sets: int, calls: int) -> Callable[[], object]:
        cuda = self._torch.cuda
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=cuda.current_stream(), capture_error_mode="thread_local"):
            for index in range(calls):
                call(index % sets)
        return graph.replay


def figure(peer: Peer, torch: Any, inputs: InputSets) -> PeerFigure:
    """Check, time, and check again."""
    cupy, graphs = require_cupy(), TorchGraphs(torch)
    shape = inputs.shape
    call = peer.prepare(TorchInputs(torch, inputs))

    def error() -> float:
        out = call(len(inputs) - 1).reshape(shape.batch, shape.num_qo_heads, shape.head_dim)
        return inputs.error_of(out.float().cpu().numpy())

    before = error()
    if not before <= peer.tolerance:
        return PeerFigure(error=before, reason=f"wrong result: relative L2 {before:.1e}")
    timing = time_calls(cupy, call, len(inputs), shape.kv_bytes, replays=11, graphs=graphs)
    host = host_us(cupy, call, len(inputs), calls=20, graphs=graphs)
    after = error()
    if not after <= peer.tolerance:
        return PeerFigure(error=after, reason=f"wrong result after the timing: relative L2 {after:.1e}")
    return PeerFigure(timing.us, host, max(before, after))


def child(peer: Peer, shapes: Sequence[Shape], path: Path) -> int:
    """Measure one peer; ``_BROKEN`` if it broke the CUDA context."""

    def tell(record: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        tell({"unavailable": "this torch has no CUDA"})
        return 0
    filler = Filler()
    for shape in shapes:
        try:
            found = figure(peer, torch, InputSets.of(shape, filler))
        except UnsupportedError as error:
            found = PeerFigure(reason=str(error), skipped=True)
        except ImportError as error:
            tell({"unavailable": str(error)})
            return 0
        except Exception as error:  # of somebody else's code
            found = PeerFigure(reason=f"{type(error).__name__}: {error}".splitlines()[0][:_REASON_CHARACTERS])
        tell({"shape": shape.name, **asdict(found)})
        gc.collect()
        require_cupy().get_default_memory_pool().free_all_blocks()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            return _BROKEN
    return 0


def _command(peer: Peer, path: Path) -> list[str]:
    return [sys.executable, "-m", __name__, peer.name, str(path)]


def _run(peer: Peer, shapes: Sequence[Shape]) -> tuple[list[dict[str, Any]], str]:
    """What a process told, and how it ended if not as it should."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.jsonl"
        path.touch()
        try:
            done = subprocess.run(
                _command(peer, path), input=json.dumps([asdict(shape) for shape in shapes]), text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, timeout=_MOST_SECONDS,
            )  # fmt: skip
            last = (done.stderr.strip().splitlines() or [""])[-1][:_REASON_CHARACTERS]
            bad = done.returncode not in (0, _BROKEN)
            ended = f"its process ended with code {done.returncode}: {last}" if bad else ""
        except subprocess.TimeoutExpired:
            ended = f"its process took longer than {_MOST_SECONDS:.0f} s"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], ended


def measure_one(peer: Peer, shapes: Sequence[Shape]) -> dict[str, PeerFigure] | str:
    """Its figures by shape, or why it cannot be imported. A shape that ends the process is a failure of that shape."""
    figures: dict[str, PeerFigure] = {}
    left = list(shapes)
    while left:
        told, ended = _run(peer, left)
        for record in told:
            if "unavailable" in record:
                return str(record["unavailable"])
            name = record.pop("shape")
            figures[name] = PeerFigure(**record)
        left = [shape for shape in left if shape.name not in figures]
        if left and (ended or not told):
            figures[left.pop(0).name] = PeerFigure(reason=ended or "its process told nothing")
    return figures


def measure(
    peers: Sequence[Peer], shapes: Sequence[Shape]
) -> tuple[dict[str, PeerInfo], dict[str, dict[str, PeerFigure]]]:
    """Of each peer that can be imported, who it is and its figures by shape. The others are told on stderr."""
    infos, figures = {}, {}
    with terminal.progress() as bar:
        task = bar.add_task("", total=len(peers))
        for peer in peers:
            bar.update(task, description=peer.name)
            found = measure_one(peer, shapes)
            if isinstance(found, str):
                print(f"cupy_fp8kv: without {peer.name}: {found}", file=sys.stderr)
            else:
                infos[peer.name], figures[peer.name] = peer.info(), found
            bar.advance(task)
    return infos, figures


if __name__ == "__main__":
    _peer = next(peer for peer in PEERS if peer.name == sys.argv[1])
    sys.exit(child(_peer, shapes_of(json.load(sys.stdin)), Path(sys.argv[2])))
