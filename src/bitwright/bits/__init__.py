"""Which tensor gets how many bits: costs of every choice, and the choice that loses least within limits.

``tables.py``, ``program.py`` and ``solve.py`` are mathematics on tables of numbers; ``costs.py`` makes
such tables of a network; ``allocate.py`` joins them with measured losses and gives a plan.
"""

from bitwright.bits.allocate import Losses, allocate, allocations, plan_for, problem_of
from bitwright.bits.costs import Variable, costs_of, residual_ties, variables_of
from bitwright.bits.solve import Solution, pareto, reachable, solution_of, solve
from bitwright.bits.tables import Cost, Problem, Term, TermSum

__all__ = [
    "Cost", "Losses", "Problem", "Solution", "Term", "TermSum", "Variable", "allocate", "allocations", "costs_of",
    "pareto", "plan_for", "problem_of", "reachable", "residual_ties", "solution_of", "solve", "variables_of",
]  # fmt: skip
