"""Generalisation measures, exactly solvable models, diagnostics and synthetic testbeds."""
