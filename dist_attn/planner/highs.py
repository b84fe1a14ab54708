"""Linear and mixed-integer programs in arrays, solved by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from dist_attn.planner.cost import FloatArray, IntArray


@dataclass
class LinearProgram:
    """Minimise cost @ v with 0 <= v <= upper and row_lower <= A v <= row_upper.

    A is given by its entries (rows, columns, values), none twice. Values should be near one: HiGHS
    compares with absolute tolerances.
    """

    cost: FloatArray
    upper: FloatArray
    row_lower: FloatArray
    row_upper: FloatArray
    rows: IntArray
    columns: IntArray
    values: FloatArray
    #: Which columns must be integers; None: a plain linear program.
    integer: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Solution:
    """An answer of HiGHS: values, objective, and whether it is proven optimal."""

    values: FloatArray
    objective: float
    optimal: bool


def solve_linear_program(
    program: LinearProgram, *, max_nodes: int = 200, relative_gap: float = 1e-3
) -> Solution | None:
    """Solve on one thread, reproducibly.

    Args:
        program: the program.
        max_nodes: branch-and-bound nodes of an integer program, a work limit rather than a time limit.
        relative_gap: when an integer program counts as solved.

    Returns:
        The solution, or None when there is none (or none was found within the work limit).
    """
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("random_seed", 0)
    highs.setOptionValue("mip_max_nodes", max_nodes)
    highs.setOptionValue("mip_rel_gap", relative_gap)
    highs.passModel(_model(program))
    highs.run()
    status = highs.getModelStatus()
    info = highs.getInfo()
    if info.primal_solution_status != int(highspy.SolutionStatus.kSolutionStatusFeasible):
        return None
    return Solution(
        values=np.array(highs.getSolution().col_value),
        objective=float(info.objective_function_value),
        optimal=status == highspy.HighsModelStatus.kOptimal,
    )


def _model(program: LinearProgram) -> highspy.HighsLp:
    by_column = np.lexsort((program.rows, program.columns))
    num_columns, num_rows = len(program.cost), len(program.row_lower)
    model = highspy.HighsLp()
    model.num_col_ = num_columns
    model.num_row_ = num_rows
    model.col_cost_ = program.cost
    model.col_lower_ = np.zeros(num_columns)
    model.col_upper_ = program.upper
    model.row_lower_ = program.row_lower
    model.row_upper_ = program.row_upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.searchsorted(
        program.columns[by_column], np.arange(num_columns + 1)
    ).astype(np.int32)
    model.a_matrix_.index_ = program.rows[by_column].astype(np.int32)
    model.a_matrix_.value_ = program.values[by_column]
    if program.integer is not None:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        model.integrality_ = [kinds[int(i)] for i in program.integer]
    return model
