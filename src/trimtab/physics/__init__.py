"""Neural differential equations, PDE solvers and operators, constraints and symmetry."""
