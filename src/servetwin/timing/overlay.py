"""A calibration: a handful of physical terms, fitted to a real deployment, laid over what the sources price.

    overlay: 1
    terms:
      prefill_factor: 1.15
      gap_ns: 180000
    fitted: {...}        # what it was fitted on and how well; not read when pricing

Terms that are left out keep the value of the engine version or the source.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from servetwin.errors import InputError, nearest
from servetwin.model.expert_placement import straggler
from servetwin.model.kernels import AttentionKernel, Experts, Gemm, Operator
from servetwin.timing.host import HostOverhead
from servetwin.timing.ledger import Ledger
from servetwin.timing.operators import Price, Pricer, Scalable, Source, needs
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape
from servetwin.timing.stages import apportion

NOT_DECODE = ("prefill_seqs", "prefill_tokens", "prefill_context", "prefill_pairs")


@dataclass(frozen=True)
class Overlay:
    """Terms of a calibration; None = as priced without it."""

    prefill_factor: float | None = None
    """on the time of matrix products and experts beyond reading their weights, and on prefill attention"""
    decode_factor: float | None = None
    """on the time of reading weights"""
    attention_factor: float | None = None
    """on the time of decode attention, which reads the KV cache"""
    step_ns: int | None = None
    """host time a step that may overlap the device (see `HostOverhead`)"""
    gap_ns: int | None = None
    """time a step that never overlaps"""
    gap_seq_ns: int | None = None
    """the same for each sequence of the step"""
    request_ns: int | None = None
    """front end, a request"""
    request_token_ns: int | None = None
    """the same for each token of its prompt"""
    kv_factor: float | None = None
    """on the number of KV blocks"""

    def host(self, host: HostOverhead) -> HostOverhead:
        """`host` with the terms of this overlay."""
        names = ("step_ns", "gap_ns", "gap_seq_ns", "request_ns", "request_token_ns")
        return replace(host, **{n: getattr(self, n) for n in names if getattr(self, n) is not None})

    @property
    def scales_devices(self) -> bool:
        factors = (self.prefill_factor, self.decode_factor, self.attention_factor)
        return any(factor is not None for factor in factors)


TERMS = tuple(field.name for field in fields(Overlay))


def read_overlay(path: Path) -> Overlay:
    """Read an overlay file. Raises InputError for a missing file, an unknown term, or a value out of range."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=str(path)) from None
    if not isinstance(data, dict) or data.get("overlay") != 1 or not isinstance(data.get("terms"), dict):
        raise InputError("not an overlay", where=str(path), allowed="a mapping with overlay: 1 and terms")
    return overlay_of(data["terms"], str(path))


def overlay_of(terms: dict[str, Any], where: str) -> Overlay:
    """An overlay from its terms. Raises InputError."""
    for name, value in terms.items():
        field = f"terms.{name}"
        if name not in TERMS:
            allowed = ", ".join(TERMS)
            raise InputError("unknown term", where=where, field=field, allowed=allowed, hint=nearest(name, TERMS))
        factor = name.endswith("_factor")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if factor and not ((whole or isinstance(value, float)) and 0.1 <= value <= 10):
            raise InputError("is no factor", where=where, field=field, found=value, allowed="0.1 to 10")
        if not factor and not (whole and 0 <= value <= 10**10):
            raise InputError("is no time", where=where, field=field, found=value, allowed="ns, 0 to 10000000000")
    return Overlay(**terms)


class CalibratedSource:
    """A source of operator prices with the factors of an overlay.

    A product's or an expert layer's time is split at the time that reading its weights takes at `bandwidth` (B/s).
    """

    def __init__(self, source: Source, overlay: Overlay, bandwidth: float) -> None:
        self._source, self._bandwidth = source, bandwidth
        self._prefill = 1.0 if overlay.prefill_factor is None else overlay.prefill_factor
        self._decode = 1.0 if overlay.decode_factor is None else overlay.decode_factor
        self._attention = 1.0 if overlay.attention_factor is None else overlay.attention_factor
        self.name = source.name

    def pricer(self, operator: Operator) -> Pricer | None:
        found = self._source.pricer(operator)
        if found is None:
            return None
        priced, prefill, decode = found, self._prefill, self._decode
        match operator:
            case Gemm():
                read = operator.weight_bytes / self._bandwidth * 1e9
                return lambda rows: _split(priced(rows), read, prefill, decode)
            case Experts():
                a_expert = operator.weight_bytes / operator.local_experts / self._bandwidth * 1e9

                def price(rows: int) -> Price:
                    touched = straggler(operator.work_of(rows), lambda pairs, active: active)
                    return _split(priced(rows), touched * a_expert, prefill, decode)

                return price
            case AttentionKernel():
                factor = prefill if needs(operator) == "prefills" else self._attention
                if isinstance(priced, Scalable):
                    return priced.scaled(factor)

                def scaled(*work: int) -> Price:
                    ns, how = priced(*work)
                    return ns * factor, how

                return scaled
            case _:
                return found


def _split(price: Price, read: float, prefill: float, decode: float) -> Price:
    ns, how = price
    floor = min(ns, read)
    return floor * decode + (ns - floor) * prefill, how


class CalibratedTimer:
    """A whole-step source with the factors of an overlay: the decode part of a step is what its decodes alone would
    take, the prefill part the rest. Such a source does not tell attention from reading weights, so `attention_factor`
    does nothing here."""

    def __init__(self, timer: StepTimer, overlay: Overlay) -> None:
        self.timer = timer
        self._prefill = 1.0 if overlay.prefill_factor is None else overlay.prefill_factor
        self._decode = 1.0 if overlay.decode_factor is None else overlay.decode_factor
        self.ledger: Ledger = timer.ledger
        self.booked = None

    def step_ns(self, shape: StepShape) -> int:
        whole = self.timer.step_ns(shape)
        decodes = whole
        if shape.prefill_seqs:
            decodes = 0
            if shape.decode_seqs:
                saved = self.ledger.copy()
                decodes = min(whole, self.timer.step_ns(shape._replace(**dict.fromkeys(NOT_DECODE, 0))))
                self.ledger.restore(saved)
        scaled = max(1, int(decodes * self._decode + (whole - decodes) * self._prefill))
        self.ledger.analytic += scaled - whole
        return scaled

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        durations = self.timer.run_ns(shape, steps)
        scaled = [max(1, int(ns * self._decode)) for ns in durations]
        self.ledger.analytic += sum(scaled) - sum(durations)
        return scaled

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        """Padding counts to the decodes. Of the group's tokens, the part of the decodes is taken to be this rank's."""
        whole = self.timer.lockstep_ns(shape, tokens, gathered)
        decodes = whole
        if shape.prefill_seqs:
            decodes = 0
            rest = tokens - shape.prefill_tokens
            if rest:
                saved = self.ledger.copy()
                alone = shape._replace(**dict.fromkeys(NOT_DECODE, 0))
                decodes = min(whole, self.timer.lockstep_ns(alone, rest, gathered * rest // tokens))
                self.ledger.restore(saved)
        scaled = max(1, int(decodes * self._decode + (whole - decodes) * self._prefill))
        self.ledger.analytic += scaled - whole
        return scaled

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        durations = self.timer.lockstep_run_ns(shape, steps, tokens, gathered)
        scaled = [max(1, int(ns * self._decode)) for ns in durations]
        self.ledger.analytic += sum(scaled) - sum(durations)
        return scaled

    def stage_ns(self, shape: StepShape) -> list[int]:
        """The factors are taken to be the same in every stage."""
        saved = self.ledger.copy()
        scaled = self.step_ns(shape)
        self.ledger.restore(saved)
        return apportion(scaled, self.timer.stage_ns(shape))

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        saved = self.ledger.copy()
        scaled = self.run_ns(shape, steps)
        self.ledger.restore(saved)
        return [apportion(ns, parts) for ns, parts in zip(scaled, self.timer.run_stage_ns(shape, steps), strict=True)]
