"""Tools for `ossature chat`: a calculator and a calendar.

    python examples/chat_tools.py > tools.json       what the model is told of them
    ossature chat MODEL --tools tools.json --run-tools "python examples/chat_tools.py"

The second line has the chat run `python examples/chat_tools.py NAME` for every call, with the
arguments as JSON on its input; what it prints is the result.
"""

import ast
import datetime
import json
import operator
import sys

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Works out a sum, such as 3 * (4 + 5).",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "weekday",
            "description": "Tells the day of the week of a date.",
            "parameters": {
                "type": "object",
                "properties": {"date": {"type": "string", "description": "As 2025-06-28."}},
                "required": ["date"],
            },
        },
    },
]
OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.USub: operator.neg,
}  # fmt: skip


def calculate(expression: str) -> float:
    """The value of a sum; nothing but numbers and signs is ever run."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.operand))
        raise ValueError(f"not a sum: {expression}")

    return value(ast.parse(expression, mode="eval").body)


def weekday(date: str) -> str:
    return f"{datetime.date.fromisoformat(date):%A}"


def main() -> None:
    if len(sys.argv) == 1:
        print(json.dumps(TOOLS, indent=2))
        return
    arguments = json.load(sys.stdin)
    result = {"calculate": calculate, "weekday": weekday}[sys.argv[1]](**arguments)
    print(json.dumps(result) if isinstance(result, dict) else result)


if __name__ == "__main__":
    main()
