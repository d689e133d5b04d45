"""Lines of code of a file."""

from __future__ import annotations

import ast


def code_lines(source: str) -> list[str]:
    """What is neither empty nor part of a docstring."""
    told = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in told]
