"""A decode call prepared once and run many times: by the layers of a step, by the steps of a generation."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from . import arrays, dispatch, scales
from .arrays import HOST, Library, device_name
from .explain import Explanation
from .formats import dtype_name, format_of_dtype
from .layouts import to_nhd
from .lengths import device_lens, host_lens
from .options import integer
from .outputs import read_out
from .problem import DecodeProblem, Facts, contiguous_strides, without_idle_strides

_NAMES = ("q", "k", "v")
#: Libraries by the name that ``for_shapes`` knows them by.
_LIBRARIES = ("cupy", "torch", "jax", "numpy")
_DEFAULTS: dict[str, Any] = {
    "ragged": False, "logits_soft_cap": None, "sm_scale": None, "kv_format": None, "window_left": -1, "lse_base": "2",
    "backend": None,
}  # fmt: skip


class DecodePlan:
    """Everything of a decode call but the values: checked, planned, compiled and packed once.

    A plan is made from arrays of the kind that it will run on, and keeps none of them. ``run`` then takes any arrays of
    that kind, with less host time than a call of :func:`batch_decode_with_padded_kv_cache` and the same result.

    For requests with lengths of their own, the plan is made with ``ragged=True`` and told them by ``schedule``, once
    for all layers of a step::

        plan = DecodePlan(q, k_cache[0], v_cache[0], ragged=True)
        for step in range(steps):
            plan.schedule(kv_lens)
            for layer in range(layers):
                out = plan.run(q, k_cache[layer], v_cache[layer])

    When lengths are taken in: only when ``schedule`` is called, which reads ``kv_lens`` in the order of the caller's
    current stream and leaves what it made of them (the work list, see ``cuda_src/schedule.cu``, or a copy) in memory of
    the plan. Every ``run`` after it, up to the next ``schedule``, uses that, whatever is written to ``kv_lens`` in the
    meantime. ``run`` has to come after ``schedule`` in the order of streams: on the same one, or on one that waits; and
    ``schedule`` after what the stream had to do when the plan was made, which its memory came from.

    In a captured graph, ``schedule`` is part of the graph if it is called during the capture: each replay then reads
    the lengths that ``kv_lens`` holds at that time, and one graph serves all lengths up to ``kv_len``. A graph without
    ``schedule`` uses what the last one left in the plan. Nothing is synchronised and nothing comes back to the host.

    Keep the plan as long as what it has launched is running and as long as graphs that it is part of are replayed. A
    plan belongs to its arrays' device; threads may share it as far as they agree on the lengths.

    Parameters
    ----------
    q : array ``[batch, num_qo_heads, head_dim]``, or ``[num_qo_heads, head_dim]`` for a single request.
    k, v : caches as in :func:`batch_decode_with_padded_kv_cache`, or without the batch axis for a single request.
    ragged : whether requests have lengths of their own, which ``schedule`` tells.
    kv_layout, pos_encoding_mode, logits_soft_cap, sm_scale, rope_scale, rope_theta, kv_format, window_left, lse_base,
    backend : as there.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`batch_decode_with_padded_kv_cache`.
    """

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        kv_layout: str = "NHD",
        pos_encoding_mode: str = "NONE",
        *,
        ragged: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        kv_format: Any = None,
        window_left: int = -1,
        lse_base: str = "2",
        backend: str | None = None,
    ):
        q, k, v = (arrays.adopt(array, name) for array, name in zip((q, k, v), _NAMES, strict=True))
        library = dispatch.common_library(q, k, v)
        facts = [
            library.facts(arrays.read(library, array, name)[1])
            for array, name in zip((q, k, v), _NAMES, strict=True)
        ]  # fmt: skip
        self._prepare(
            library, facts, kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode, ragged=ragged,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, kv_format=kv_format, window_left=window_left,
            lse_base=lse_base, backend=backend,
        )  # fmt: skip

    @classmethod
    def for_shapes(
        cls,
        batch: int,
        kv_len: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_layout: str = "NHD",
        pos_encoding_mode: str = "NONE",
        *,
        q_dtype: Any = "float16",
        kv_dtype: Any = "uint8",
        library: str = "cupy",
        device: int = 0,
        **options: Any,
    ) -> DecodePlan:
        """A plan for contiguous arrays of these sizes, before there are any.

        Parameters
        ----------
        kv_len : rows that the caches hold for each request.
        kv_dtype : dtype of both caches, or a pair (K, V); ``"uint8"`` is codes of ``kv_format``.
        library : ``"cupy"``, ``"torch"``, ``"jax"`` or ``"numpy"``: whose arrays ``run`` gets.
        device : index of the CUDA device; arrays of NumPy are on the host.
        options : ``ragged``, ``logits_soft_cap``, ``sm_scale``, ``kv_format``, ``window_left``, ``lse_base``,
            ``backend`` as in the constructor.
        """
        if library not in _LIBRARIES:
            raise ValueError(f"library: expected one of {', '.join(_LIBRARIES)}, got {library!r}")
        unknown = options.keys() - _DEFAULTS.keys()
        if unknown:
            raise TypeError(f"{min(unknown)}: expected one of {', '.join(_DEFAULTS)}")
        if library == "cupy":
            found = arrays.cupy_library()
        else:
            importlib.import_module(library)
            found = arrays.library(library)
        index = HOST if library == "numpy" else device
        k_dtype, v_dtype = kv_dtype if isinstance(kv_dtype, (tuple, list)) else (kv_dtype, kv_dtype)
        # The order of a layout's axes is its own inverse.
        cache = to_nhd((batch, kv_len, num_kv_heads, head_dim), kv_layout)
        kinds = (
            ("q_dtype", q_dtype, (batch, num_qo_heads, head_dim)), ("kv_dtype", k_dtype, cache),
            ("kv_dtype", v_dtype, cache),
        )  # fmt: skip
        facts = [_contiguous(argument, dtype, shape, index, found.name) for argument, dtype, shape in kinds]
        plan = cls.__new__(cls)
        plan._prepare(
            found, facts, kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode, **{**_DEFAULTS, **options}
        )  # fmt: skip
        return plan

    def _prepare(
        self,
        library: Library,
        facts: list[Facts],
        *,
        kv_layout: str,
        pos_encoding_mode: str,
        ragged: bool,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        kv_format: Any,
        window_left: int,
        lse_base: str,
        backend: str | None,
    ) -> None:
        if not isinstance(ragged, bool):
            raise TypeError(f"ragged: expected True or False, got {ragged!r}")
        if logits_soft_cap is not None:
            logits_soft_cap = scales.number(logits_soft_cap, "logits_soft_cap")
        self._library = library
        self._kv_layout = kv_layout
        self._window_left = integer(window_left, "window_left")
        self._soft_cap = logits_soft_cap
        self._lse_base = lse_base
        self._ragged = ragged
        self._facts = [without_idle_strides(one) for one in facts]
        #: Signatures that have been found to fit, which ``run`` compares: of q, k and v; and of a contiguous ``out``.
        self._fitting: Any = None
        self._fitting_out: Any = None
        self._options: dict[str, Any] = {
            "batched": len(facts[0].shape) == 3, "kv_layout": kv_layout, "pos_encoding_mode": pos_encoding_mode,
            "logits_soft_cap": logits_soft_cap, "window_left": self._window_left,
            "kv_format": tuple(kv_format) if isinstance(kv_format, list) else kv_format, "backend": backend,
            "ragged": ragged, "lse_base": lse_base,
        }  # fmt: skip
        self._prepared = dispatch.prepare(facts, None, **self._options)
        #: By the strides of ``out``, where they are not those of a contiguous array.
        self._prepared_for: dict[Any, dispatch.Prepared] = {None: self._prepared}
        default = self._prepared.default_scale
        self._sm_scale = default if sm_scale is None else scales.number(sm_scale, "sm_scale")
        self._lens: np.ndarray | None = None
        self._scheduled = not ragged
        self._lens_address = self._list_address = 0
        on_device = self._prepared.on_device
        if on_device and ragged and self.problem.batch:
            device = self._prepared.device
            bounds = self._prepared.kernels.plan.bounds
            if bounds:
                self._memory, self._list_address = library.empty((bounds.nbytes,), "uint8", device)
            else:
                self._memory, self._lens_address = library.empty((self.problem.batch,), "int32", device)
        self._tables = (self._lens_address, 0, 0, 0, 0) if self._lens_address else dispatch.NO_TABLES
        self._has_fast_way = on_device and abs(self._sm_scale) <= scales.MOST_FLOAT32
        if on_device:
            self._kernels = self._prepared.kernels
        #: What follows the addresses among the values of a run without scales.
        self._rest = (
            *self._tables, 0, 0, 0, self._sm_scale, 1.0, logits_soft_cap or 0.0, self._window_left, 0, 0,
        )  # fmt: skip

    @property
    def problem(self) -> DecodeProblem:
        """The sizes, formats and strides that the plan is for."""
        return self._prepared.problem

    def schedule(self, kv_lens: Any) -> None:
        """Take in the lengths of the requests, for every ``run`` until the next ``schedule``.

        Parameters
        ----------
        kv_lens : int32 ``[batch]``, on the plan's device, where it is read in the order of the current stream and cut
            to ``[0, kv_len]``; or on the host, checked.

        Raises
        ------
        ValueError, TypeError
            Lengths that do not fit, or a plan without ``ragged=True``.
        RuntimeError
            Lengths on the host while a graph is captured.
        """
        if not self._ragged:
            raise ValueError("kv_lens: this plan is for requests of full length; make it with ragged=True")
        problem, library = self.problem, self._library
        if not self._prepared.on_device:
            self._lens = host_lens(kv_lens, problem.batch, problem.kv_len)
        else:
            # Held until the launch: what was uploaded is freed in the order of the stream.
            _lens, address = device_lens(kv_lens, library, problem, self._prepared.device)
            if self._list_address:
                self._kernels.schedule(library, address, self._window_left, self._list_address)
            elif self._lens_address:
                self._kernels.copy_lens(library, address, self._lens_address)
        self._scheduled = True

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        out: Any = None,
        return_lse: bool = False,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> Any:
        """Attention of ``q`` over the caches, on the caller's current stream.

        Parameters and result are those of :func:`batch_decode_with_padded_kv_cache`.

        Raises
        ------
        ValueError
            Arrays of another kind than the plan's; the message names the argument and what differs.
        RuntimeError
            A ragged plan before its first ``schedule``.
        """
        if not self._scheduled:
            raise RuntimeError("run: a plan with ragged=True needs schedule(kv_lens) first")
        library = self._library
        out_address, out_signature = 0, None
        try:
            q_address, k_address, v_address, signature = library.read_inputs(q, k, v)
            if out is not None:
                out_address, out_signature = library.read(out)
            fits = signature == self._fitting
        except (AttributeError, TypeError, ValueError):
            fits = False
        if (
            fits
            and self._has_fast_way
            and q_scale is k_scale is v_scale is None
            and out_signature == self._fitting_out is not None
            and not return_lse
            and q_address and k_address and v_address
            and not (q_address | k_address | v_address | out_address) % 16
        ):  # fmt: skip
            # The usual call, of which only addresses are new. What is different goes on, to be named.
            self._kernels.run(
                library, out_address, 0, 1.0, q_address, k_address, v_address, self._rest, self._list_address
            )  # fmt: skip
            return out
        if not fits:
            q, k, v = (arrays.adopt(array, name) for array, name in zip((q, k, v), _NAMES, strict=True))
            q_address, k_address, v_address = (self._check(i, array) for i, array in enumerate((q, k, v)))
            self._fitting = library.read_inputs(q, k, v)[-1]
        prepared = self._prepared
        if out is not None:
            out_address, prepared = self._check_out(out)
        if not prepared.on_device:
            return dispatch.decode_from_host(
                library, prepared, q, k, v, self._kv_layout, q_scale, k_scale, v_scale, self._window_left,
                self._soft_cap, self._sm_scale, self._lens, return_lse, self._lse_base, out,
            )  # fmt: skip
        return dispatch.run_on_device(
            library, prepared, q, (q_address, k_address, v_address, out_address), self._tables, q_scale, k_scale,
            v_scale, self._window_left, self._soft_cap, self._sm_scale, return_lse, out, self._list_address,
        )  # fmt: skip

    def _check(self, index: int, array: Any) -> int:
        """The address of an array of the plan's kind. ValueError that says what differs."""
        name, library, expected = _NAMES[index], self._library, self._facts[index]
        found = arrays.library_of(array, name)
        if found is not library:
            raise ValueError(f"{name}: this plan is for arrays of {library.name}, got one of {found and found.name}")
        address, signature = arrays.read(library, array, name)
        facts = without_idle_strides(library.facts(signature))
        for what, wanted, got in (
            ("shape", list(expected.shape), list(facts.shape)),
            ("dtype", expected.dtype, facts.dtype),
            ("device", device_name(expected.device), device_name(facts.device)),
            ("strides", f"{list(expected.strides)} in bytes", f"{list(facts.strides)} in bytes"),
        ):
            if wanted != got:
                raise ValueError(f"{name}: this plan is for {what} {wanted}, got {got}")
        return address

    def _check_out(self, out: Any) -> tuple[int, dispatch.Prepared]:
        """The address of ``out``, and what is prepared for its strides."""
        address, signature = read_out(self._library, out)
        prepared = self._prepared_for.get(signature)
        if prepared is None:
            facts = self._library.facts(signature)
            contiguous = facts.is_contiguous(2) and facts[:2] == (self._facts[0].dtype, self._facts[0].shape)
            if contiguous and facts.device == self._facts[0].device:
                prepared = self._prepared
                self._fitting_out = signature
            else:
                prepared = dispatch.prepare(self._facts, facts, **self._options)
            self._prepared_for[signature] = prepared
        return address, prepared

    def __str__(self) -> str:
        if not self._prepared.cuda:
            return str(Explanation("numpy", self.problem, None, None))
        if not self._prepared.on_device:
            return f"{Explanation('cuda', self.problem, None, None)}, from and to the host"
        return str(Explanation("cuda", self.problem, self._kernels.info, self._kernels.plan))

    def __repr__(self) -> str:
        return f"<DecodePlan for {self.problem}{', ragged' if self._ragged else ''}>"


def _contiguous(argument: str, dtype: Any, shape: tuple[int, ...], device: int, library: str) -> Facts:
    """Facts of an array in C order."""
    name = dtype_name(dtype)
    strides = contiguous_strides(shape, format_of_dtype(name, argument).itemsize)
    return Facts(name, shape, strides, device, library)
