"""How many examples take part in what, and whether a batch of that many can be divided so."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Division:
    """What the settings divide a batch into.

    Attributes:
      shards: number of data shards; everything takes an equal share of each.
      ascent_fraction: share of the ascent micro-batch.
      m: number of groups that share the ascent micro-batch.
      parts: number of parts of the batch, one for each group, or 1 where each has all of it.
      passes: number of micro-batches of the descent.
    """

    shards: int
    ascent_fraction: float
    m: int = 1
    parts: int = 1
    passes: int = 1

    def ascent_size(self, b: int) -> int:
        """Return `a = max(ascent_fraction * b, shards)`, rounded to whole shards."""
        if not isinstance(b, numbers.Integral):  # but one of jax.export.symbolic_shape
            raise ValueError(
                f"The batch has b={b} examples, so the size of the ascent micro-batch is not "
                "known: export the step for a batch of a known size, or, on one device and "
                "without groups, with ascent_fraction=1."
            )
        # From the examples of a shard, as a shard does that is alone with its own.
        of_a_shard = float(self.ascent_fraction) * (b / self.shards)
        return self.shards * max(1, math.floor(of_a_shard + 0.5))

    def check(self, b: int) -> None:
        """Raise a `ValueError` with the nearest legal sizes if a batch of `b` does not fit."""
        fault = self._fault(b)
        if fault:
            hint = "" if b % (self.passes * self.shards) else self._groups_of_shards()
            raise ValueError(f"{fault} The nearest batch sizes that can: {self._nearest(b)}.{hint}")
        if not self._groups_share(b):
            raise ValueError(self._fault_of_the_ascent(b))

    def _fault(self, b: int) -> str | None:
        if b % self.shards:
            return (
                f"The batch of b={b} examples cannot be shared evenly by {self.shards} data shards."
            )
        for name, number in {"accumulation_steps": self.passes, "m": self.parts}.items():
            if b % (number * self.shards):
                also = f" share it and the ascent's a={self.ascent_size(b)}" if name == "m" else ""
                return (
                    f"{name}={number}: as many parts{self._on_shards()} cannot share the batch of "
                    f"b={b} examples evenly; {name} in {self._fitting(name, b)} can{also}."
                )
        return None

    def _fitting(self, name: str, b: int) -> list[int]:
        """Return the values of one setting with which a batch of `b` can be shared."""
        a = self.ascent_size(b)
        shared = {"accumulation_steps": b, "m": math.gcd(a, b) if self.parts > 1 else a}[name]
        of_a_shard = shared // self.shards
        return [k for k in range(1, of_a_shard + 1) if of_a_shard % k == 0]

    def _groups_share(self, b: int) -> bool:
        """Whether every group has as many ascent examples as the others."""
        return self.m == 1 or self.ascent_size(b) % (self.m * self.shards) == 0

    def _nearest(self, b: int) -> str:
        """Return the sizes next to `b` with which nothing else is wrong either."""
        unit = self.shards * math.lcm(self.passes, self.parts)

        def first(sizes: Iterable[int]) -> list[int]:
            # One fits before long, but for fractions that nobody takes.
            legal = (x for x in itertools.islice(sizes, 100_000) if self._groups_share(x))
            return list(itertools.islice(legal, 1))

        below, above = (
            range(b // unit * unit, 0, -unit),
            itertools.count((b // unit + 1) * unit, unit),
        )
        return " or ".join(map(str, first(below) + first(above))) or "none near it"

    def _fault_of_the_ascent(self, b: int) -> str:
        a, unit = self.ascent_size(b), self.m * self.shards
        around = (x for x in (a // unit * unit, -(-a // unit) * unit) if 0 < x <= b)
        nearest = " or ".join(f"a={x} (ascent_fraction={x / b:.6g})" for x in around)
        fitting = self._fitting("m", b)
        return (
            f"m={self.m} groups{self._on_shards()} cannot share the ascent micro-batch of a={a} "
            f"examples (of a batch of b={b}) evenly. The nearest sizes that can: "
            f"{nearest or 'none in this batch'}; or, at a={a}, m in {fitting}."
            f"{self._groups_of_shards()}"
        )

    def _groups_of_shards(self) -> str:
        if self.shards == 1 or self.parts == 1:
            return ""
        return (
            " In a step on a mesh, group_axes makes groups of whole shards, all at the same time, "
            "for which one ascent example a shard is enough."
        )

    def _on_shards(self) -> str:
        return f" on {self.shards} data shards" if self.shards > 1 else ""
