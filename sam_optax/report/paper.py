"""The paper's figures: Tables 1 to 9 of Bahri, Mobahi and Tay (arXiv:2110.08529).

One run each, the best checkpoint for each task-metric pair. Table 3 is the first column of Table 8.
"""

import dataclasses
from collections.abc import Mapping

from .settings import BASELINE, SAM, SINGLE, Group, Settings
from .tasks import AVERAGES, BENCHMARKS, Pair


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      table: its number.
      model: such as "t5_1_1_base" or "mt5_base".
      rho: SAM's, or `None` for the baseline.
      ascent_fraction: a / b.
      m: the number of groups.
      averages: by name in `AVERAGES`, as printed.
      scores: by task-metric pair.
    """

    table: int
    model: str
    rho: float | None
    ascent_fraction: float
    m: int
    averages: Mapping[str, float]
    scores: Mapping[Pair, float]


def find_rows(benchmark: str, group: Group) -> list[Row]:
    """Return the rows for runs of a group: the baseline, the paper's choice for SAM, the rest."""
    cbqa = 5 if group.trained_on == SINGLE else 4
    tables: Mapping[tuple[str, float], tuple[int, ...]] = {
        ("SuperGLUE", 100): (1, 9),
        ("SuperGLUE", 5): (6,),
        ("GLUE", 100): (2,),
        ("CBQA", 100): (cbqa,),
        ("CBQA", 5): (7,),
        ("TyDiQA", 100): (8,),
    }
    numbers = tables.get((benchmark, group.percent), ())
    return [row for row in ROWS if row.table in numbers and row.model == group.model]


def matching_row(rows: list[Row], settings: Settings) -> Row | None:
    """Return the row of a run's setting, or the paper's choice if it has no such row of SAM."""
    if settings.method == BASELINE:
        return next((row for row in rows if row.rho is None), None)
    if settings.method != SAM:
        return None
    ours = {"m_sharpness": "paper", **settings.sam}
    with_sam = [row for row in rows if row.rho is not None]
    for row in with_sam:
        theirs = {"rho": row.rho, "ascent_fraction": row.ascent_fraction, "m": row.m}
        if ours == {**theirs, "m_sharpness": "paper"}:
            return row
    return with_sam[0] if with_sam else None


# Each line: size, rho ("-" for the baseline), the average if there is one, then the tasks.
# Table 9 has a and m in addition, after rho.
_TABLES = {
    1: """
small -    | 67.7 | 72.6 | 89.4 / 89.3   | 67.0 | 68.5 / 21.4 | 61.7 / 60.8 | 69.3 | 65.4 | 72.1
small 0.05 | 68.4 | 73.5 | 92.1 / 89.3   | 61.0 | 68.5 / 22.8 | 62.1 / 61.0 | 69.7 | 65.7 | 79.8
base  -    | 75.3 | 80.0 | 91.7 / 94.6   | 71.0 | 75.4 / 35.4 | 76.2 / 75.4 | 80.9 | 69.3 | 76.9
base  0.15 | 78.5 | 82.2 | 93.7 / 94.6   | 78.0 | 77.5 / 39.1 | 78.2 / 77.2 | 85.9 | 70.4 | 81.7
large -    | 84.3 | 86.6 | 99.4 / 98.2   | 89.0 | 83.7 / 51.0 | 86.5 / 85.6 | 89.2 | 72.9 | 84.6
large 0.15 | 84.6 | 88.0 | 95.0 / 96.4   | 86.0 | 84.0 / 53.7 | 87.3 / 86.4 | 89.2 | 75.2 | 86.5
xl    -    | 87.2 | 88.6 | 93.7 / 96.4   | 95.0 | 86.9 / 61.1 | 89.5 / 88.4 | 91.3 | 74.9 | 89.4
xl    0.15 | 89.1 | 89.4 | 100.0 / 100.0 | 95.0 | 87.9 / 63.7 | 90.9 / 90.0 | 92.1 | 75.5 | 94.2
""",
    2: """
small -    | 79.8 | 39.9 | 92.3 | 90.1/85.8 | 85.4/84.9 | 87.3/90.5 | 80.9/81.4 | 87.6 | 74.0
small 0.05 | 79.9 | 42.9 | 92.1 | 90.9/87.3 | 85.5/85.3 | 87.6/90.7 | 81.0/81.4 | 87.7 | 70.4
base  -    | 84.7 | 50.9 | 94.2 | 91.5/88.2 | 88.5/88.3 | 88.5/91.4 | 87.3/87.6 | 92.1 | 81.6
base  0.15 | 85.1 | 49.8 | 94.2 | 93.4/90.7 | 90.0/89.7 | 89.0/91.7 | 87.3/87.5 | 92.5 | 82.7
large -    | 86.2 | 57.8 | 95.3 | 89.5/85.3 | 88.3/88.5 | 87.8/90.9 | 88.9/89.0 | 93.4 | 85.9
large 0.15 | 88.3 | 65.6 | 95.6 | 93.6/91.2 | 90.2/89.8 | 89.7/92.2 | 89.9/89.7 | 94.5 | 85.9
xl    -    | 89.9 | 70.7 | 96.3 | 92.8/90.0 | 91.2/91.0 | 89.6/92.1 | 91.1/91.3 | 95.5 | 90.6
xl    0.15 | 90.2 | 69.7 | 96.9 | 93.2/90.7 | 91.7/91.8 | 90.2/92.7 | 91.4/91.5 | 95.8 | 91.0
""",
    4: """
small -    | 16.7 / 12.4 | 22.8 / 16.5 | 10.2 / 7.3
small 0.05 | 17.5 / 13.1 | 23.5 / 16.9 | 11.0 / 7.8
base  -    | 23.2 / 18.1 | 29.7 / 22.5 | 19.3 / 15.3
base  0.15 | 25.7 / 20.6 | 31.0 / 24.5 | 21.5 / 17.4
large -    | 27.4 / 22.3 | 34.3 / 27.6 | 25.2 / 20.9
large 0.15 | 30.6 / 25.0 | 36.4 / 29.6 | 28.5 / 24.2
xl    -    | 33.5 / 27.5 | 39.3 / 31.6 | 36.5 / 31.1
xl    0.15 | 34.7 / 28.8 | 40.7 / 33.3 | 38.0 / 32.6
""",
    5: """
small -    | 19.2 / 15.0 | 23.8 / 17.7 | 10.9 / 8.1
small 0.05 | 20.8 / 16.5 | 25.9 / 20.4 | 12.3 / 9.4
base  -    | 26.3 / 21.1 | 31.6 / 26.0 | 20.6 / 16.8
base  0.15 | 27.8 / 22.6 | 33.6 / 27.5 | 23.7 / 19.5
large -    | 28.1 / 23.0 | 32.7 / 25.8 | 25.1 / 20.8
large 0.15 | 30.8 / 25.3 | 34.4 / 28.0 | 28.8 / 24.2
xl    -    | 33.4 / 27.3 | 37.1 / 30.6 | 35.5 / 30.2
xl    0.15 | 34.2 / 28.3 | 39.4 / 32.3 | 37.6 / 32.0
""",
    6: """
small -    | 50.2 | 60.8 | 37.0 / 55.4 | 52.0 | 60.1 / 11.0 | 33.9 / 32.5 | 54.5 | 54.4 | 65.4
small 0.05 | 51.9 | 60.5 | 45.6 / 66.1 | 53.0 | 61.1 / 12.5 | 36.7 / 34.5 | 52.3 | 55.2 | 66.3
base  -    | 52.9 | 59.6 | 32.3 / 55.4 | 53.0 | 60.2 / 11.8 | 47.8 / 46.5 | 58.5 | 57.2 | 68.3
base  0.15 | 56.7 | 61.4 | 41.8 / 64.3 | 55.0 | 62.4 / 15.7 | 59.7 / 57.9 | 62.5 | 55.3 | 68.3
large -    | 62.8 | 65.3 | 40.1 / 62.5 | 62.0 | 71.6 / 24.0 | 80.4 / 78.9 | 69.7 | 57.7 | 69.2
large 0.15 | 64.3 | 77.3 | 47.9 / 69.6 | 59.0 | 69.0 / 20.4 | 81.5 / 80.0 | 65.0 | 59.6 | 69.2
xl    -    | 75.9 | 84.5 | 57.0 / 82.1 | 86.0 | 82.4 / 48.7 | 83.3 / 81.7 | 78.7 | 66.0 | 74.0
xl    0.15 | 77.0 | 82.5 | 58.9 / 83.9 | 85.0 | 79.9 / 45.3 | 86.8 / 85.6 | 80.5 | 64.4 | 83.7
""",
    7: """
small -    | 4.9 / 2.9  | 4.8 / 1.8   | 3.0 / 1.3
small 0.05 | 6.0 / 3.7  | 7.1 / 2.2   | 3.3 / 1.6
base  -    | 7.9 / 4.8  | 13.7 / 4.6  | 7.6 / 4.2
base  0.15 | 8.6 / 5.6  | 12.2 / 5.7  | 7.7 / 4.4
large -    | 8.7 / 5.2  | 14.0 / 7.0  | 9.8 / 6.0
large 0.15 | 10.5 / 6.6 | 14.9 / 7.7  | 10.6 / 7.1
xl    -    | 13.1 / 8.0 | 20.6 / 11.9 | 19.6 / 15.3
xl    0.15 | 13.4 / 8.1 | 22.9 / 13.6 | 19.1 / 14.5
""",
    8: """
small -    | 73.4/62.1 | 66.3/54.5 | 78.0/62.8 | 69.4/60.2 | 73.7/60.9 \
| 77.8/65.0 | 64.1/55.8 | 69.5/56.7 | 78.0/68.9 | 84.0/74.4
small 0.02 | 74.3/63.0 | 67.1/55.7 | 79.2/64.9 | 68.4/57.5 | 75.0/61.8 \
| 78.8/67.6 | 64.0/54.3 | 72.0/58.0 | 79.9/72.1 | 84.2/75.0
base  -    | 81.6/71.0 | 76.7/65.7 | 84.2/70.4 | 81.7/71.7 | 81.6/69.3 \
| 85.1/74.2 | 73.6/66.3 | 78.8/64.7 | 84.4/77.2 | 87.9/79.4
base  0.02 | 82.0/71.3 | 76.1/65.0 | 83.9/70.2 | 84.4/75.2 | 81.1/69.6 \
| 85.4/74.0 | 74.5/66.7 | 79.5/65.3 | 84.8/76.4 | 88.8/79.1
large -    | 85.6/75.3 | 81.2/70.0 | 86.6/73.1 | 86.3/77.9 | 84.6/71.6 \
| 87.7/77.9 | 81.1/72.1 | 84.0/72.8 | 88.7/81.2 | 90.3/81.5
large 0.02 | 85.9/76.1 | 82.3/71.6 | 87.3/74.4 | 86.6/79.6 | 84.5/72.5 \
| 88.1/80.0 | 81.3/73.2 | 84.2/71.9 | 88.3/79.8 | 90.9/82.1
xl    -    | 87.0/77.4 | 82.1/72.0 | 87.3/74.4 | 88.9/82.3 | 85.8/74.6 \
| 89.7/80.4 | 81.7/73.6 | 85.1/73.5 | 90.7/83.2 | 91.5/82.4
xl    0.05 | 87.3/77.7 | 82.8/73.4 | 87.6/75.0 | 89.2/81.4 | 86.4/74.2 \
| 89.6/80.2 | 82.6/75.0 | 85.5/74.8 | 90.7/83.0 | 91.4/82.5
""",
    9: """
base 0.02 32 1  | 76.6 | 80.5 | 92.4 / 92.9 | 73.0 | 76.2 / 36.8 | 77.3 / 76.4 | 81.9 | 70.8 | 80.8
base 0.05 32 1  | 77.2 | 80.3 | 97.4 / 96.4 | 73.0 | 76.4 / 37.9 | 77.8 / 76.9 | 83.8 | 71.9 | 76.9
base 0.1  32 1  | 77.4 | 81.7 | 94.8 / 94.6 | 72.0 | 76.8 / 38.3 | 79.3 / 78.3 | 83.8 | 72.7 | 77.9
base 0.15 32 1  | 78.5 | 82.2 | 93.7 / 94.6 | 78.0 | 77.5 / 39.1 | 78.2 / 77.2 | 85.9 | 70.4 | 81.7
base 0.2  32 1  | 77.7 | 82.3 | 95.0 / 96.4 | 75.0 | 77.2 / 39.5 | 77.9 / 76.8 | 84.1 | 71.8 | 76.9
base 0.3  32 1  | 77.8 | 81.1 | 93.6 / 94.6 | 74.0 | 77.4 / 40.0 | 79.8 / 78.7 | 85.9 | 70.8 | 78.8
base 0.4  32 1  | 77.6 | 80.6 | 94.3 / 96.4 | 79.0 | 76.3 / 37.5 | 77.9 / 76.9 | 81.9 | 71.0 | 78.8
base 0.15 8 1   | 77.8 | 81.9 | 97.4 / 96.4 | 72.0 | 77.5 / 40.8 | 78.6 / 77.5 | 84.5 | 71.0 | 78.8
base 0.15 24 1  | 78.1 | 82.5 | 97.4 / 96.4 | 74.0 | 77.2 / 40.2 | 79.2 / 78.4 | 83.8 | 69.4 | 80.8
base 0.15 32 1  | 78.5 | 81.9 | 96.1 / 94.6 | 77.0 | 77.6 / 40.3 | 78.9 / 77.8 | 85.6 | 71.9 | 78.8
base 0.15 64 1  | 78.5 | 82.3 | 96.1 / 94.6 | 79.0 | 78.4 / 40.8 | 79.3 / 78.2 | 84.5 | 71.3 | 76.9
base 0.15 128 1 | 78.8 | 82.4 | 97.4 / 96.4 | 74.0 | 77.6 / 40.6 | 79.0 / 78.0 | 87.0 | 72.9 | 79.8
base 0.15 32 1  | 78.6 | 81.5 | 96.1 / 96.4 | 73.0 | 77.2 / 40.0 | 79.0 / 77.9 | 87.0 | 72.6 | 81.7
base 0.15 32 2  | 78.1 | 81.8 | 96.1 / 94.6 | 77.0 | 76.5 / 37.6 | 78.5 / 77.6 | 84.8 | 71.8 | 78.8
base 0.15 32 4  | 78.3 | 82.3 | 97.4 / 96.4 | 75.0 | 77.3 / 38.5 | 78.2 / 77.1 | 85.2 | 72.1 | 79.8
""",
}
_BENCHMARK_OF = {
    **{1: "SuperGLUE", 2: "GLUE", 4: "CBQA", 5: "CBQA"},
    **{6: "SuperGLUE", 7: "CBQA", 8: "TyDiQA", 9: "SuperGLUE"},
}
_BATCH = 128  # examples, in every experiment


def _row(table: int, line: str) -> Row:
    setting, *cells = line.split("|")
    size, rho, *rest = setting.split()
    a, m = rest or (_BATCH // 4, 1)
    benchmark = _BENCHMARK_OF[table]
    figures = [float(figure) for cell in cells for figure in cell.split("/")]
    names = [name for name in AVERAGES if name.startswith(benchmark)]
    averages, scores = figures[: len(names)], figures[len(names) :]
    return Row(
        table=table,
        model=f"mt5_{size}" if benchmark == "TyDiQA" else f"t5_1_1_{size}",
        rho=None if rho == "-" else float(rho),
        ascent_fraction=int(a) / _BATCH,
        m=int(m),
        averages=dict(zip(names, averages, strict=True)),
        scores=dict(zip(BENCHMARKS[benchmark], scores, strict=True)),
    )


ROWS = tuple(
    _row(number, line) for number, lines in _TABLES.items() for line in lines.strip().splitlines()
)
MODELS = tuple(dict.fromkeys(row.model for row in ROWS))
