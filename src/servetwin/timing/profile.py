"""Step times from a measured per-layer profile (kind `layers`; the rules are in docs/profiles.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from servetwin.catalog.profiles import Profile, read_profile
from servetwin.errors import InputError
from servetwin.model.kernels import Experts
from servetwin.timing.layers.attention import AttentionTable
from servetwin.timing.layers.curve import EXTRAPOLATED, HOW, INTERPOLATED, MEASURED, Curve
from servetwin.timing.layers.experts import ExpertBlocks, ExpertTable
from servetwin.timing.layers.skew import SkewModel
from servetwin.timing.layers.tables import read_table
from servetwin.timing.ledger import Ledger
from servetwin.timing.shape import StepShape


class Part(NamedTuple):
    """Time of a group of operators (ns), and how much of it is measured, interpolated and extrapolated."""

    ns: int
    shares: tuple[int, int, int]


class ProfileTimer:
    """Prices engine steps of one model on one device at one tensor-parallel degree.

    A step is prologue + layers x (attention half, MLP half) + head, each operator looked up and rounded to ns. Left out
    are the collectives between ranks (`all_reduces` says how many tensor parallelism has), host overhead and graph
    launches.
    """

    def __init__(
        self,
        profile: Profile,
        tensor: int,
        layers: int,
        experts: Sequence[Experts] = (),
        width: int | None = None,
        stages: Sequence[int] | None = None,
    ) -> None:
        """`experts`: a rank's expert operators (default: all experts in every layer, evenly routed); `width`: ranks
        that share an expert's width (default: the tensor-parallel ones); `stages`: layers of each pipeline stage.

        Raises InputError when the degree was not measured or a table is missing; use `load` with a folder.
        """
        if tensor not in profile.tensor:
            allowed = f"{', '.join(map(str, profile.tensor))}, or timing.source: auto, which prices it by operators"
            raise InputError(
                "this tensor-parallel degree was not measured", where=str(profile.folder), found=tensor, allowed=allowed
            )
        self.profile, self.tensor, self.layers = profile, tensor, layers
        self.ledger, self.booked = Ledger(), None
        self._dense = _curves(read_table(profile, "dense", tensor), "tokens")
        self._per_sequence = _curves(read_table(profile, "per_sequence", tensor), "sequences")
        rows = read_table(profile, "attention", tensor)
        self._attention = AttentionTable([rows[c] for c in ("chunk", "history", "decodes", "context", "time_ns")])
        self._experts: ExpertBlocks | None = None
        self._data = 1
        try:
            sequence = profile.data["sequence"]
            once = [*sequence["prologue"], *sequence["head"]]
            block = [*sequence["pre_attn"], *sequence["post_attn"], *sequence["mlp"]]
            skew = profile.data.get("skew", {}).get(tensor)
            self._skew = SkewModel.from_header(skew) if skew else None
            if "moe" in block:
                moe = read_table(profile, "moe", 1)
                table = ExpertTable([moe[c] for c in ("tokens", "activated", "time_ns")])
                count, top_k = int(profile.data["experts"]["count"]), int(profile.data["experts"]["top_k"])
                alone = Experts(name="moe", experts=count, local_experts=count, top_k=top_k, hidden=0, inter=0)
                blocks: list[tuple[Experts, Sequence[int]]] = [(op, op.stages) for op in experts]
                blocks = blocks or [(alone, stages or (layers,))]
                self._experts = ExpertBlocks(table, blocks, tensor if width is None else width)
                self._data = blocks[0][0].data
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"malformed: {error!r}", where=str(profile.folder / "profile.yaml")) from None
        counts: dict[str, int] = {}
        for names, times in ((once, 1), (block, layers)):
            for name in names:
                counts[name] = counts.get(name, 0) + times
        known = {*self._dense, *self._per_sequence, "attention", "moe"}
        if missing := next((name for name in counts if name not in known), None):
            raise InputError("a layer of the sequence has no measurements", where=str(profile.folder), found=missing)
        self._by_tokens = [(name, self._dense[name], n) for name, n in counts.items() if name in self._dense]
        self._by_logits = [
            (name, self._per_sequence[name], n) for name, n in counts.items() if name in self._per_sequence
        ]
        self._attention_count = counts.get("attention", 0)
        self._order = list(counts)
        self.stages = list(stages or (layers,))
        self._sequence = [*sequence["prologue"]], block, [*sequence["head"]]
        self._token_parts: dict[int, Part] = {}
        self._logit_parts: dict[int, Part] = {}
        self._lockstep_parts: dict[tuple[int, int], Part] = {}

    @classmethod
    def load(
        cls,
        folder: Path,
        tensor: int,
        layers: int | None = None,
        experts: Sequence[Experts] = (),
        width: int | None = None,
        stages: Sequence[int] | None = None,
    ) -> ProfileTimer:
        """The timer for the profile in `folder` at tensor-parallel degree `tensor`.

        `layers` is the number of transformer layers to price (default: the profile's, when it says so). Raises
        InputError when the profile is of another kind, damaged, or was not measured at this degree.
        """
        profile = read_profile(folder)
        where = str(folder / "profile.yaml")
        if profile.kind != "layers":
            raise InputError("not a per-layer profile", where=where, field="kind", found=profile.kind, allowed="layers")
        count = layers if layers is not None else profile.data.get("layers")
        if not isinstance(count, int) or count < 1:
            raise InputError("the profile does not say how many layers the model has", where=where, field="layers")
        return cls(profile, tensor, count, experts, width, stages)

    def step_ns(self, shape: StepShape) -> int:
        """Duration of one step in ns (at least 1)."""
        logits = shape[0] + shape[5]
        tokens = shape[1] + shape[5]
        by_tokens = self._token_parts.get(tokens) or self._token_part(tokens)
        by_logits = self._logit_parts.get(logits) or self._logit_part(logits)
        attention, how = self._attention_ns(shape)
        attention *= self._attention_count
        (first, a), (second, b), ledger = by_tokens, by_logits, self.ledger
        ledger.measured += a[0] + b[0]
        ledger.interpolated += a[1] + b[1]
        ledger.extrapolated += a[2] + b[2]
        if how == INTERPOLATED:
            ledger.interpolated += attention
        elif how == EXTRAPOLATED:
            ledger.extrapolated += attention
        else:
            ledger.measured += attention
        return first + second + attention

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        """Durations in ns of `steps` consecutive pure-decode steps: `step_ns(shape.later(i))` for i in 0..steps-1.

        Raises ValueError when the step holds a prefill.
        """
        if shape.prefill_seqs:
            raise ValueError("a run of steps is pure decode")
        by_tokens = self._token_parts.get(shape.tokens) or self._token_part(shape.tokens)
        by_logits = self._logit_parts.get(shape.logits) or self._logit_part(shape.logits)
        seqs, context, longest = shape.decode_seqs, shape.decode_context, shape.decode_max
        durations, fixed, sums = [], by_tokens.ns + by_logits.ns, [0, 0, 0]
        for step in range(steps):
            attention, how = self._pure_decode_ns(seqs, context + step * seqs, longest + step)
            attention *= self._attention_count
            sums[how] += attention
            durations.append(fixed + attention)
        self.ledger.add(by_tokens.shares, steps)
        self.ledger.add(by_logits.shares, steps)
        self.ledger.add((sums[0], sums[1], sums[2]), 1)
        return durations

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        fixed, shares = self._lockstep_fixed(shape, tokens, gathered)
        attention, how = self._attention_ns(shape)
        attention *= self._attention_count
        shares[how] += attention
        self.ledger.add(tuple(shares))
        return fixed + attention

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        fixed, shares = self._lockstep_fixed(shape, tokens, gathered)
        seqs, context, longest = shape.decode_seqs, shape.decode_context, shape.decode_max
        durations, sums = [], [share * steps for share in shares]
        for step in range(steps):
            attention, how = self._pure_decode_ns(seqs, context + step * seqs, longest + step)
            attention *= self._attention_count
            sums[how] += attention
            durations.append(fixed + attention)
        self.ledger.add(tuple(sums))
        return durations

    def _lockstep_fixed(self, shape: StepShape, tokens: int, gathered: int) -> tuple[int, list[int]]:
        """Time, and by how it is known, of all that depends on numbers of rows alone."""
        dense = self._lockstep_parts.get((tokens, gathered))
        if dense is None:
            dense = self._lockstep_parts[tokens, gathered] = self._token_part_of(tokens, gathered)
        if not shape.logits:  # a dummy batch: nobody wants a token of it
            return dense.ns, list(dense.shares)
        head = self._logit_parts.get(shape.logits) or self._logit_part(shape.logits)
        return dense.ns + head.ns, [a + b for a, b in zip(dense.shares, head.shares, strict=True)]

    def stage_ns(self, shape: StepShape) -> list[int]:
        """By pipeline stage, of which the first has the prologue and the last the head; sums to `step_ns`."""
        once = {name: _at(curve, shape.tokens) for name, curve, _ in self._by_tokens}
        once |= {name: _at(curve, shape.logits) for name, curve, _ in self._by_logits}
        once["attention"] = self._attention_ns(shape)[0]
        prologue, block, head = (sum(once.get(name, 0) for name in names) for names in self._sequence)
        parts = [block * layers for layers in self.stages]
        parts[0] += prologue
        parts[-1] += head
        if self._experts is not None:
            for op, stages in self._experts.blocks:
                ns, _ = self._experts.price(op, shape.tokens * self._data)
                parts = [part + ns * count for part, count in zip(parts, stages, strict=True)]
        return parts

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        return [self.stage_ns(shape.later(i)) for i in range(steps)]

    def explain(self, shape: StepShape) -> list[tuple[str, int, str]]:
        """Where the time of a step goes: (operator, ns over all layers, how it was found); the ns sum to `step_ns`."""
        found: dict[str, tuple[int, int]] = {}
        for name, curve, times in self._by_tokens:
            found[name] = _at(curve, shape.tokens) * times, curve.how(shape.tokens)
        for name, curve, times in self._by_logits:
            found[name] = _at(curve, shape.logits) * times, curve.how(shape.logits)
        if self._experts is not None:
            shares = self._moe(shape.tokens * self._data)
            found["moe"] = sum(shares), max(how for how in range(3) if shares[how])
        ns, how = self._attention_ns(shape)
        found["attention"] = ns * self._attention_count, how
        return [(name, found[name][0], HOW[found[name][1]]) for name in self._order]

    def dense_curves(self) -> list[Curve]:
        """The curves of the operators that depend on the number of tokens alone."""
        return [curve for _, curve, _ in self._by_tokens]

    def all_reduces(self) -> int:
        """All-reduces over the tensor-parallel ranks in a step: one after the embedding, two in every layer."""
        return 1 + 2 * self.layers if self.tensor > 1 else 0

    def dense_ns(self, layer: str, tokens: int) -> int:
        """One call of a dense operator over `tokens` tokens."""
        return _at(self._dense[layer], tokens)

    def per_sequence_ns(self, layer: str, sequences: int) -> int:
        """One call of an operator of the head over `sequences` rows."""
        return _at(self._per_sequence[layer], sequences)

    def attention_ns(self, chunk: int, history: float, decodes: int, context: float) -> int:
        """One attention call: a prefill of `chunk` tokens on `history` beside `decodes` with `context` each."""
        return max(1, int(self._attention.price(chunk, history, decodes, context, context)[0]))

    def moe_ns(self, tokens: float, activated: float) -> int:
        """One mixture-of-experts block (one rank, unsharded) over `tokens` that hit `activated` distinct experts."""
        if self._experts is None:
            raise ValueError("the profile is of a dense model")
        return self._experts.table.price(tokens, activated)[0]

    def _attention_ns(self, shape: StepShape) -> tuple[int, int]:
        prefills, chunk, _, pairs, decodes, _, context, longest, _ = shape
        if not prefills:
            return self._pure_decode_ns(decodes, context, longest)
        # The history that gives one prefill of `chunk` tokens as many query-key pairs as the prefills of the step have;
        # exact for one prefill, negative when many short ones share the step.
        surplus = pairs - chunk * (chunk + 1) // 2
        history = surplus // chunk if surplus % chunk == 0 else surplus / chunk
        mean = context / decodes if decodes else 0.0
        t_mean, t_max, how = self._attention.price(chunk, history, decodes, mean, longest)
        if longest <= mean or self._skew is None:
            return max(1, int(t_mean)), how
        excess = self._skew.excess(chunk, history, decodes, mean, longest, t_mean, t_max)
        return max(1, int(t_mean + excess)), how or INTERPOLATED

    def _pure_decode_ns(self, decodes: int, context: int, longest: int) -> tuple[int, int]:
        if not decodes:
            return 0, MEASURED
        mean = context / decodes
        t_mean, t_max, how = self._attention.price(0, 0, decodes, mean, longest)
        if longest <= mean or self._skew is None:
            return max(1, int(t_mean)), how
        excess = self._skew.excess(0, 0, decodes, mean, longest, t_mean, t_max)
        return max(1, int(t_mean + excess)), how or INTERPOLATED

    def _moe(self, gathered: int) -> list[int]:
        """Time of the expert blocks of a step whose group sees `gathered` tokens, by how it is known."""
        assert self._experts is not None
        shares = [0, 0, 0]
        for op, stages in self._experts.blocks:
            ns, how = self._experts.price(op, gathered)
            shares[how] += ns * sum(stages)
        return shares

    def _token_part(self, tokens: int) -> Part:
        """Where nothing else is said, every rank of a group brings as many tokens as this one."""
        return self._token_parts.setdefault(tokens, self._token_part_of(tokens, tokens * self._data))

    def _token_part_of(self, tokens: int, gathered: int) -> Part:
        shares = [0, 0, 0]
        for _, curve, times in self._by_tokens:
            shares[curve.how(tokens)] += _at(curve, tokens) * times
        if self._experts is not None:
            shares = [a + b for a, b in zip(shares, self._moe(gathered), strict=True)]
        return Part(sum(shares), (shares[0], shares[1], shares[2]))

    def _logit_part(self, logits: int) -> Part:
        shares = [0, 0, 0]
        for _, curve, times in self._by_logits:
            shares[curve.how(logits)] += _at(curve, logits) * times
        return self._logit_parts.setdefault(logits, Part(sum(shares), (shares[0], shares[1], shares[2])))


def _at(curve: Curve, x: int) -> int:
    return max(1, int(curve.at(x)))


def _curves(columns: Mapping[str, list[Any]], axis: str) -> dict[str, Curve]:
    """The curve of each layer from columns layer, `axis`, time_ns."""
    points: dict[str, tuple[list[int], list[int]]] = {}
    for layer, x, ns in zip(columns["layer"], columns[axis], columns["time_ns"], strict=True):
        xs, ts = points.setdefault(layer, ([], []))
        xs.append(x)
        ts.append(ns)
    return {layer: Curve(xs, ts) for layer, (xs, ts) in points.items()}
