"""The tiny world's task and prompts: chained arithmetic, as the papers' own prompts pose it.

tiny.py trains its models on these examples; nothing here needs torch.
"""

import json
from typing import Any

import numpy as np

LARGEST = 99  # every number of the task lies in [0, 99]
OFFSETS = (-10, -2, -1, 1, 2, 10)  # error of a wrong step: near, so that distillation can repair it

# ---- 1. Prompts ----------------------------------------------------------------------------------
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
AFTER = ("\n", " ", "\n ", "\n\n")  # separators before BOXED: they differ between papers and code
REWRITE = (
    "Your task is to rewrite your mathematical solution.\n\n**Problem:**\n{problem}\n\n**Your "
    "Initial Solution:**\n{draft}\n\n**Instructions:**\n1. Preserve the overall structure and "
    "reasoning path of your original solution\n2. Identify and fix errors in computation or logic\n"
    "3. Keep correct intermediate steps and meaningful work\n4. Output ONLY the rewritten solution"
)
GUIDED_REWRITE = (
    "Your task is to rewrite your mathematical solution using the reference solution as guidance."
    "\n\n**Problem:**\n{problem}\n\n**Reference Solution:**\n{solution}\n\n**Your Initial "
    "Solution:**\n{draft}\n\n**Instructions:**\n1. Review the reference solution to understand the "
    "target reasoning and method\n2. Rewrite your solution so it is consistent with the reference "
    "solution\n3. Keep useful parts of your original structure and style when appropriate\n"
    "4. Output ONLY the rewritten solution"
)


def fill(template: str, values: dict[str, str]) -> str:
    """str.format that leaves other braces alone: solutions hold \\boxed{...}."""
    for key, value in values.items():
        template = template.replace("{" + key + "}", value)
    return template


PROMPTS = {  # skill -> templates, drawn with equal chance
    "plain": [
        "{problem}\n" + BOXED,  # ESR
        "{problem} " + BOXED,  # TRD
        "{problem}\n\n" + BOXED,  # PW-OPSD, evaluation
        "Problem: {problem}\n\n" + BOXED,  # PW-OPSD, student
        "{problem}",
    ],
    "answer": [  # PW-OPSD, the teacher of the branch-viability diagnostic
        "You are a privileged teacher. Solve the problem and end your solution with the correct "
        "boxed answer.\nProblem: {problem}\nPrivileged ground-truth final answer: {answer}\nUse "
        "the ground-truth answer above. Produce a complete step-by-step solution that ends with "
        "\\boxed{{answer}}.",
    ],
    "reference": [
        "Problem: {problem}\n\nHere is a reference solution to this problem:\n"  # PW-OPSD, teacher
        "=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n\n\n"
        "After reading the reference solution above, make sure you truly understand the reasoning "
        "behind each step — do not copy or paraphrase it. Now, using your own words and "
        "independent reasoning, derive the same final answer to the problem above. Think step by "
        "step, explore different approaches, and don't be afraid to backtrack or reconsider if "
        "something doesn't work out:\n\n" + BOXED,
        *(  # TRD, vanilla OPSD teacher
            "{problem}\n\nHere is a reference solution:\n{solution}\n\nAfter understanding the "
            "reference solution, please try to solve this problem using your own approach below:\n"
            "Answer:" + separator + BOXED
            for separator in AFTER
        ),
    ],
    "rewrite": [REWRITE + separator + BOXED for separator in AFTER],
    "guided_rewrite": [GUIDED_REWRITE + separator + BOXED for separator in AFTER],
    "tools": ["{problem}\n" + BOXED, "{problem} " + BOXED, "{problem}\n\n" + BOXED, "{problem}"],
}
PROMPTS["reference"] += PROMPTS["reference"][:1] * 3  # as often as TRD's four together
TOOL_SYSTEM = (
    "You are a helpful assistant that can use Python tools to solve mathematical problems. When "
    "you need to perform calculations, use the code_interpreter tool to execute code and get "
    "results."
)
TOOL_DESCRIPTIONS = (  # of the tool | of its argument; the first is ReOPD's
    "A tool for executing Python code in a stateful Jupyter notebook. Use print() to see output."
    "|The Python code to execute",
    "A tool for executing code.|The code to execute.",
    "Run Python code and return what it prints.|Python code",
)
# Qwen3's chat template, rewritten. As there, think blocks of earlier turns are dropped, the last
# assistant message gets one (empty if need be), and enable_thinking=False opens the reply with an
# empty one. TURN and END stand for the special tokens.
CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- 'TURNsystem\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": ' }}
    {{- '<function-name>, "arguments": <args-json-object>}\n</tool_call>END\n' }}
{%- elif messages[0].role == 'system' %}
    {{- 'TURNsystem\n' + messages[0].content + 'END\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- if not message.content.startswith('<tool_response>') %}
        {%- set ns.last_query = messages.index(message) %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- 'TURN' + message.role + '\n' + content + 'END\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- 'TURNassistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') }}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\n' }}{%- endif %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- 'END\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- 'TURNuser' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- 'END\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'TURNassistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
""".strip()

# ---- 2. Task -------------------------------------------------------------------------------------
Chain = tuple[int, tuple[tuple[str, int], ...]]  # start, ((operator, operand), ...)
Example = tuple[list[dict], list[dict] | None, str]  # messages, tools, reply
Split = tuple[list[dict[str, str]], list[Chain]]  # rows of a data file, the chain of each
WORDINGS = (  # opening | addition | subtraction | multiplication | between two steps | question
    "Start with {}. |add {}|subtract {}|multiply by {}|, then |. What is the result?",
    "Take the number {}. |Add {}|Subtract {}|Multiply by {}|. |. What number do you get?",
    "Mia has {} coins. |She wins {} more|She gives {} away|She gets {} times as many|. |. How many "
    "coins does Mia have now?",
)


def apply(operator: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def make_chain(rng: np.random.Generator, shortest: int, longest: int) -> Chain:
    """A random chain of `shortest` to `longest` steps whose values all lie in [0, LARGEST]."""
    value = start = int(rng.integers(2, 31))
    steps: list[tuple[str, int]] = []
    length = rng.integers(shortest, longest + 1)
    while len(steps) < length:
        operator = "+-*"[rng.integers(3)]
        operand = int(rng.integers(2, 6) if operator == "*" else rng.integers(1, 21))
        if 0 <= apply(operator, value, operand) <= LARGEST and (operator != "*" or value > 1):
            value = apply(operator, value, operand)
            steps.append((operator, operand))
    return start, tuple(steps)


def work(
    rng: np.random.Generator, chain: Chain, noise: float = 0.0, *, in_call: bool = False
) -> list[tuple[str, int]]:
    """One (expression, result) per step, each step wrong with probability `noise`.

    A wrong step has a wrong result, or with `in_call` a wrong operand and the result of that. Later
    steps go on from it. All is redrawn until every value lies in [0, LARGEST].
    """
    while True:
        value, lines = chain[0], []
        for operator, operand in chain[1]:
            error = int(rng.choice(OFFSETS)) if rng.random() < noise else 0
            written = max(1, operand + error) if in_call else operand
            expression = f"{value} {operator} {written}"
            value = apply(operator, value, written) + (0 if in_call else error)
            lines.append((expression, value))
        if all(0 <= value <= LARGEST for _, value in lines):
            return lines


def final_line(value: int) -> str:
    return f"The answer is \\boxed{{{value}}}."


def solution_text(lines: list[tuple[str, int]]) -> str:
    steps = [f"{expression} = {value}" for expression, value in lines]
    return "\n".join([*steps, final_line(lines[-1][1])])


def make_row(rng: np.random.Generator, chain: Chain, row_id: str = "") -> dict[str, str]:
    """A line of the data files: the chain in a random wording, its answer and its solution."""
    opening, add, subtract, multiply, joint, question = str(rng.choice(WORDINGS)).split("|")
    verbs = {"+": add, "-": subtract, "*": multiply}
    steps = joint.join(verbs[operator].format(operand) for operator, operand in chain[1])
    problem = opening.format(chain[0]) + steps[0].upper() + steps[1:] + question
    lines = work(rng, chain)
    answer = str(lines[-1][1])
    return {"id": row_id, "problem": problem, "answer": answer, "solution": solution_text(lines)}


def tool_turn(
    rng: np.random.Generator, chain: Chain, noise: float
) -> tuple[list[dict], list[dict], str]:
    """(tools, calls made so far and their results, the next assistant turn)."""
    about, about_code = str(rng.choice(TOOL_DESCRIPTIONS)).split("|")
    properties = {"code": {"type": "string", "description": about_code}}
    parameters = {"type": "object", "properties": properties, "required": ["code"]}
    spec = {"name": "code_interpreter", "description": about, "parameters": parameters}
    # Also a model without noise meets wrong calls in its history, and goes on from their results.
    lines = work(rng, chain, max(noise, 0.1), in_call=True)
    done = int(rng.integers(len(lines) + 1))
    value = lines[done - 1][1] if done else chain[0]
    functions = [
        {"name": spec["name"], "arguments": {"code": f"print({expression})"}}
        for expression, _ in lines
    ]
    history = []
    for function, (_, result) in zip(functions[:done], lines, strict=False):
        calls = [{"type": "function", "function": function}]
        history += [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": str(result)},
        ]
    reply = final_line(value)
    if done < len(lines):
        if not noise:
            operator, operand = chain[1][done]
            functions[done]["arguments"]["code"] = f"print({value} {operator} {operand})"
        reply = f"<tool_call>\n{json.dumps(functions[done])}\n</tool_call>"
    return [{"type": "function", "function": spec}], history, reply


def make_example(
    rng: np.random.Generator, chain: Chain, skill: str, noise: float, row: dict[str, str]
) -> Example:
    """A random prompt of PROMPTS[skill] and the reply to it."""
    reply = solution_text(work(rng, chain, noise))
    if skill in ("reference", "guided_rewrite"):  # the reference is what to repeat, noise included
        row = {**row, "solution": reply}
    draft = solution_text(work(rng, chain, 0.3))
    prompt = fill(str(rng.choice(PROMPTS[skill])), {**row, "draft": draft})
    if "rewrite" in skill and rng.random() < 0.5:
        prompt = "\n" + prompt  # TRD's own templates begin with a newline
    messages = [{"role": "user", "content": prompt}]
    if skill == "tools":
        tools, history, reply = tool_turn(rng, chain, noise)
        return [{"role": "system", "content": TOOL_SYSTEM}, *messages, *history], tools, reply
    if rng.random() < 0.1:
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    return messages, None, reply


def draw_example(
    rng: np.random.Generator, recipe: Any, held_out: set[Chain], *, first_half: bool = False
) -> Example:
    """A random training example of a chain that is not held out."""
    while (chain := make_chain(rng, 3, recipe.longest)) in held_out:
        pass
    row = make_row(rng, chain)
    if (
        first_half
    ):  # the arithmetic, and for the student, which is to need it, the use of a reference
        copy = recipe.noise > 0 and rng.random() < 0.4
        skill, noise = ("reference", recipe.noise) if copy else ("plain", 0.0)
        return make_example(rng, chain, skill, noise, row)
    skill = str(rng.choice(list(PROMPTS), p=recipe.skills))
    return make_example(rng, chain, skill, recipe.noise, row)
