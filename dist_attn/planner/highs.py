"""Linear programs in arrays, solved again and again by HiGHS from where the last one ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from dist_attn.planner.costs import FloatArray, IntArray

_CONCLUSIVE = (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible)


@dataclass(frozen=True)
class LinearProgram:
    """Minimise cost @ v with v >= 0 and row_lower <= A v <= row_upper.

    A is given by its entries (rows, columns, values), none twice. Values should be near one: HiGHS
    compares with absolute tolerances.
    """

    cost: FloatArray
    row_lower: FloatArray
    row_upper: FloatArray
    rows: IntArray
    columns: IntArray
    values: FloatArray


@dataclass(frozen=True)
class Answer:
    """An optimum, its solution, and the basis to go on from."""

    objective: float
    values: FloatArray
    basis: highspy.HighsBasis


class WarmProgram:
    """A linear program whose limits change between solutions; one thread, reproducible."""

    def __init__(self, program: LinearProgram) -> None:
        self._highs = highspy.Highs()
        self._highs.setOptionValue("output_flag", False)
        self._highs.setOptionValue("threads", 1)
        self._highs.setOptionValue("random_seed", 0)
        # Presolve costs more than the few pivots from one solution to the next.
        self._highs.setOptionValue("presolve", "off")
        self._highs.passModel(_model(program))
        self._shut: frozenset[int] = frozenset()

    def limit_rows(self, rows: range, lower: Sequence[float], upper: Sequence[float]) -> None:
        """Replace the limits of some rows."""
        for row, low, high in zip(rows, lower, upper, strict=True):
            self._highs.changeRowBounds(row, low, high)

    def shut_columns(self, columns: frozenset[int]) -> None:
        """Fix these columns at zero, and no others."""
        for column in self._shut - columns:
            self._highs.changeColBounds(column, 0.0, highspy.kHighsInf)
        for column in columns - self._shut:
            self._highs.changeColBounds(column, 0.0, 0.0)
        self._shut = columns

    def solve(self, basis: highspy.HighsBasis | None = None) -> Answer | None:
        """Solve, from a basis of an earlier answer where one is given.

        Returns:
            Optimum, solution and basis; None when the limits contradict each other.

        Raises:
            ArithmeticError: HiGHS came to neither, also from scratch and by other means.
        """
        if basis is not None:
            self._highs.setBasis(basis)
        status = self._run()
        for presolve, solver in (("on", "ipm"), ("on", "simplex"), ("off", "simplex")):
            if status in _CONCLUSIVE:
                break
            self._highs.clearSolver()
            self._highs.setOptionValue("presolve", presolve)
            self._highs.setOptionValue("solver", solver)
            status = self._run()
        self._highs.setOptionValue("presolve", "off")
        self._highs.setOptionValue("solver", "simplex")
        if status not in _CONCLUSIVE:
            raise ArithmeticError(f"HiGHS ended with {self._highs.modelStatusToString(status)}")
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        return Answer(
            float(self._highs.getInfo().objective_function_value),
            np.array(self._highs.getSolution().col_value),
            self._highs.getBasis(),
        )

    def _run(self) -> highspy.HighsModelStatus:
        self._highs.run()
        return self._highs.getModelStatus()


def _model(program: LinearProgram) -> highspy.HighsLp:
    by_column = np.lexsort((program.rows, program.columns))
    num_columns = len(program.cost)
    model = highspy.HighsLp()
    model.num_col_ = num_columns
    model.num_row_ = len(program.row_lower)
    model.col_cost_ = program.cost
    model.col_lower_ = np.zeros(num_columns)
    model.col_upper_ = np.full(num_columns, highspy.kHighsInf)
    model.row_lower_ = program.row_lower
    model.row_upper_ = program.row_upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    starts = np.searchsorted(program.columns[by_column], np.arange(num_columns + 1))
    model.a_matrix_.start_ = starts.astype(np.int32)
    model.a_matrix_.index_ = program.rows[by_column].astype(np.int32)
    model.a_matrix_.value_ = program.values[by_column]
    return model
