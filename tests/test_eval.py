"""eval.py: answers and verdicts, estimators against brute force, the command line end to end."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import tyro

import benchmarks
import common
import compare as comparison
import eval as evaluation
from common import Problem, Rollout

TINY = Path(__file__).parent.parent / "tiny"

# ---- Completion -> answer -> verdict -------------------------------------------------------------
CASES = [
    # completion, reference, extracted answer, correct
    (r"so \boxed{17}.", "17", "17", True),
    (r"so \boxed{18}.", "17", "18", False),
    (r"\boxed{1 1/2}", "11/2", "1 1/2", False),  # a space between digits means something
    ("the answer is 17", "17", None, False),  # no box
    (r"\boxed{}", "17", "", False),  # empty box
    (r"\boxed{ 17 }", "17", "17", True),
    (r"first \boxed{16}, no: \boxed{17}", "17", "17", True),  # the last box counts
    (r"first \boxed{17}, no: \boxed{16}", "17", "16", False),
    (r"\boxed{17} and then \boxed{1", "17", None, False),  # cut inside its last box
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}", True),  # nested
    (r"\boxed{\boxed{17}}", "17", "17", True),
    (r"\boxed{\frac12}", "0.5", r"\frac12", True),
    (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}", r"\dfrac{3}{4}", True),
    (r"\boxed{3/4}", r"\frac{4}{3}", "3/4", False),
    (r"\boxed{0.333}", r"\frac13", "0.333", False),  # rounded is not equal
    (r"\boxed{1,234}", "1234", "1,234", True),
    (r"\boxed{70,\!000}", "70000", r"70,\!000", True),
    (r"\boxed{50\%}", "50", r"50\%", True),
    (r"\boxed{\$18.00}", "18", r"\$18.00", True),
    (r"\boxed{90^\circ}", "90", r"90^\circ", True),
    (r"\boxed{5\text{ cm}}", "5", r"5\text{ cm}", True),  # units
    (r"\boxed{5\,\mathrm{m}}", "6", r"5\,\mathrm{m}", False),
    (r"\boxed{[0,\infty)}", r"[0, \infty)", r"[0,\infty)", True),  # intervals
    (r"\boxed{(0,1)}", "[0,1]", "(0,1)", False),
    (r"\boxed{(1, 2)}", "(1,2)", "(1, 2)", True),  # tuples are ordered
    (r"\boxed{(2,1)}", "(1,2)", "(2,1)", False),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", r"\{2,1\}", True),  # sets are not
    (r"\boxed{-2, 6}", "6,-2", "-2, 6", True),
    (r"\boxed{2}", "1,2", "2", False),
    (r"\boxed{3+\sqrt2, 3-\sqrt2}", r"3\pm\sqrt2", r"3+\sqrt2, 3-\sqrt2", True),
    (r"\boxed{x=5}", "5", "x=5", True),
    (r"\boxed{\text{Evelyn}}", "Evelyn", r"\text{Evelyn}", True),  # text
    (r"\boxed{\text{(C)}}", "C", r"\text{(C)}", True),
    (r"\boxed{\text{odd}}", "even", r"\text{odd}", False),
    (r"\boxed{q-p}", "p - q", "q-p", False),
]


@pytest.mark.parametrize(("completion", "reference", "answer", "correct"), CASES)
def test_grade(completion: str, reference: str, answer: str | None, correct: bool) -> None:
    (row,) = evaluation.grade([Problem("0", "", reference)], [completion])
    assert row == {"answer": answer, "correct": correct}
    if answer:  # grading is symmetric
        assert common.same_answer(reference, answer) == common.same_answer(answer, reference)


# ---- Estimators ----------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            correct = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                share = np.mean([any(s) for s in itertools.combinations(correct, k)])
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(share), (n, c, k)
    with pytest.raises(ValueError, match="k=5"):
        evaluation.pass_at_k(4, 2, 5)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["1", "2", "2"], [True, False, False], False),
        (["2", "1", "1"], [False, True, True], True),
        (["1/2", "3", "0.5", r"\frac12"], [True, False, True, True], True),  # one cluster of three
        (["1", "2"], [True, False], True),  # tie: the earlier cluster wins
        (["2", "1"], [False, True], False),
        ([None, None, "1"], [False, False, True], False),  # no answer wins the vote, and is wrong
        ([None, "1"], [False, True], False),  # ... and wins a tie when it came first
        (["1", None], [True, False], True),
        (["3", None, "1", None, "1", "1"], [False, False, True, False, True, True], True),
        ([None], [False], False),
        (["", "", "1"], [False, False, True], False),  # an empty box is an answer
    ],
)
def test_majority(answers: list[str | None], correct: list[bool], expected: bool) -> None:
    assert evaluation.majority_correct(answers, correct) is expected


def test_majority_joins_by_the_first_member_and_grades_it(monkeypatch) -> None:
    near = {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")}  # not transitive: a ~ b ~ c, a !~ c
    monkeypatch.setattr(evaluation, "same_answer", lambda x, y: x == y or (x, y) in near)
    # c is like b but not like a, the first of their cluster, so three c outvote a and b
    right = [False, False, True, True, True]
    assert evaluation.majority_correct(["a", "b", "c", "c", "c"], right)
    # first member decides: the cluster {a, b} is wrong though b is right
    assert not evaluation.majority_correct(["a", "b", "d"], [False, True, False])


def test_bootstrap_known_cases() -> None:
    half = np.array([0.0, 1.0] * 200)  # std of the mean: 0.5 / 20
    low, high = evaluation.bootstrap_interval(half)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    assert evaluation.bootstrap_interval(np.full(10, 0.3)) == pytest.approx((0.3, 0.3))
    # Pairing: every problem gains exactly 0.1, so the interval has no width; unpaired it would.
    difference = evaluation.paired_bootstrap(half + 0.1, half)
    assert difference == pytest.approx((0.1, 0.1, 0.1))
    diff, low, high = evaluation.paired_bootstrap(half, half[::-1])
    assert diff == 0
    assert low < -0.08 < 0.08 < high
    with pytest.raises(ValueError, match="one shape"):
        evaluation.paired_bootstrap(half, half[:-1])


# ---- evaluate with canned rollouts ---------------------------------------------------------------
class Letters:
    """A tokenizer of one id per character; id 0 is the end of a turn."""

    def apply_chat_template(self, messages: list[dict], *, enable_thinking: bool, **_) -> str:
        return messages[0]["content"] + ("<think>" if enable_thinking else "<answer>")

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids if i or not skip_special_tokens)


class Canned:
    """A sampler that answers problem 'p<i>' with script[i], one (text, finish_reason) a sample."""

    def __init__(self, script: dict[str, list[tuple[str, str]]]) -> None:
        self.script, self.calls = script, []

    def sample(self, prompts, seeds, *, max_new_tokens, temperature, top_p, top_k):
        assert prompts
        knobs = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.calls.append({"seeds": seeds, **knobs, "top_p": top_p, "top_k": top_k})
        self.texts = ["".join(map(chr, ids)) for ids in prompts]
        turn = {key: iter(answers) for key, answers in self.script.items()}
        rollouts = []
        for ids, text in zip(prompts, self.texts, strict=True):
            completion, reason = next(turn[text[:2]])
            end = [0] if reason == "stop" else []
            rollouts.append(Rollout(ids, [ord(c) for c in completion] + end, reason, []))
        return rollouts


SCRIPT = {
    "p0": [(r"\boxed{7}", "stop"), (r"\boxed{7}", "stop"), (r"\boxed{8}", "stop"), ("7", "length")],
    "p1": [("no", "length"), ("no", "length"), (r"\boxed{9}", "stop"), (r"\boxed", "length")],
    "p2": [(r"\boxed{1}", "stop")] * 4,
}
PROBLEMS = [Problem("a", "p0", "7"), Problem("b", "p1", "9"), Problem("c", "p2", "2")]
KNOBS = {"n": 4, "max_new_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 3}


def test_evaluate_metrics_and_rows() -> None:
    sampler = Canned(SCRIPT)
    metrics, samples = evaluation.evaluate(sampler, Letters(), PROBLEMS, **KNOBS, top_k=5)
    lengths = [[10, 10, 10, 1], [2, 2, 10, 6], [10] * 4]  # an end of turn is a token
    assert metrics == pytest.approx(
        {
            "avg@4": 3 / 12,
            "pass@1": 3 / 12,
            "pass@2": (5 / 6 + 1 / 2 + 0) / 3,
            "pass@4": 2 / 3,
            "maj@4": 1 / 3,
            "len_mean": np.mean(lengths),
            "stop_frac": 8 / 12,
            "truncated_frac": 4 / 12,
            "boxed_frac": 8 / 12,
            "problems": 3,
        }
    )
    assert [(r["problem_id"], r["sample"]) for r in samples] == [
        (i, s) for i in "abc" for s in range(4)
    ]
    assert samples[3] == {
        "problem_id": "a",
        "sample": 3,
        "completion": "7",
        "answer": None,
        "correct": False,
        "tokens": 1,
        "finish_reason": "length",
    }
    assert samples[0]["completion"] == r"\boxed{7}"  # without the end of turn
    assert json.loads(json.dumps(samples)) == samples
    expected = [common.request_seed(3, "eval", i, s) for i in range(3) for s in range(4)]
    assert sampler.calls == [
        {"seeds": expected, "max_new_tokens": 20, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    ]


def test_evaluate_prompts() -> None:
    sampler = Canned(SCRIPT)
    evaluation.evaluate(sampler, Letters(), PROBLEMS, **KNOBS)
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    assert sampler.texts[0] == f"p0\n{instruction}<answer>"
    evaluation.evaluate(
        sampler, Letters(), PROBLEMS, **KNOBS, thinking=True, prompt="{problem} {x}?"
    )
    assert sampler.texts[0] == "p0 {x}?<think>"  # braces other than {problem} are text


@pytest.mark.parametrize("size", [2, 5])  # five ranks: two of them have no problem
def test_evaluate_over_ranks_equals_one_rank(size: int) -> None:
    whole = evaluation.evaluate(Canned(SCRIPT), Letters(), PROBLEMS, **KNOBS)
    parts: dict[int, list] = {}
    sampler = Canned(SCRIPT)
    for rank in range(size):  # first pass: collect what each rank would send

        def keep(rows: list, rank: int = rank) -> list:
            parts[rank] = rows
            return rows or [(0, 0, whole[1][0])] * 4

        world = SimpleNamespace(rank=rank, size=size, gather=keep)
        evaluation.evaluate(sampler, Letters(), PROBLEMS, **KNOBS, world=world)
    seeds = [seed for call in sampler.calls for seed in call["seeds"]]
    alone = [common.request_seed(3, "eval", i, s) for i in range(3) for s in range(4)]
    assert sorted(seeds) == sorted(alone)
    everything = [row for rank in range(size) for row in parts[rank]]
    world = SimpleNamespace(rank=1, size=size, gather=lambda rows: everything)
    assert evaluation.evaluate(Canned(SCRIPT), Letters(), PROBLEMS, **KNOBS, world=world) == whole
    assert max(len(part) for part in parts.values()) < 12  # the work was split


# ---- Benchmarks ----------------------------------------------------------------------------------
def test_load_benchmark_names(monkeypatch) -> None:
    calls = []

    def load(name: str, split: str = "train", config: str | None = None) -> list[Problem]:
        calls.append((name, split, config))
        return PROBLEMS

    monkeypatch.setattr(common, "load_problems", load)
    for name in ("math500", "HuggingFaceH4/MATH-500", "gsm8k", "aime24"):
        assert evaluation.load_benchmark(name) == PROBLEMS
    assert calls == [
        ("HuggingFaceH4/MATH-500", "test", None),
        ("HuggingFaceH4/MATH-500", "test", None),
        ("openai/gsm8k", "test", "main"),
        ("HuggingFaceH4/aime_2024", "train", None),
    ]


def test_load_benchmark_own_columns(monkeypatch) -> None:
    olympiad = {"id": 6, "question": "q?", "final_answer": ["$2$", "3"], "solution": ["s", "t"]}
    amo = {"question_id": 1, "prompt": "q?", "answer": r"\boxed{\frac12}", "solution": "s"}
    rows = {
        "math-ai/olympiadbench": [olympiad, olympiad | {"id": 7, "context": "Let x be 1."}],
        "meituan-longcat/AMO-Bench": [
            amo | {"answer_type": "number"},
            amo | {"answer_type": "description"},
        ],
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: rows[name])
    first, second = evaluation.load_benchmark("olympiad")
    assert first == Problem("6", "q?", "2, 3", "s\nt")
    assert second.prompt == "Let x be 1.\nq?"
    assert evaluation.load_benchmark("amobench") == [Problem("1", "q?", r"\frac12", "s")]


@pytest.mark.parametrize("name", ["math-501", "foo/math500", "no/such/file.jsonl", "empty.jsonl"])
def test_load_benchmark_stops(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text('{"problem": "1 + 1?"}\n')
    with pytest.raises(SystemExit) as stop:
        evaluation.load_benchmark(name)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert ("hmmt25" in text) == (not name.endswith(".jsonl"))  # the known names are listed
    assert "no answer" in text if name == "empty.jsonl" else name in text


def test_table_numbers() -> None:
    result = {"problem_ids": list("abcd"), "per_problem": {"avg@2": [0.6] * 4}}
    result["per_seed"] = {"0": {"avg@2": 0.5}, "1": {"avg@2": 0.7}}
    other = {"per_problem": {"avg@2": [0.5] * 4}}
    row = evaluation.table("x", result, other).splitlines()[-1]
    expected = "avg@2 0.6000 0.1414 [0.6000, 0.6000] 0.5000 +0.1000 [+0.1000, +0.1000]"
    assert row.split() == expected.split()
    result["per_seed"].pop("1")
    assert evaluation.table("x", result, None).splitlines()[-1].split()[:3] == [
        "avg@2",
        "0.5000",
        "-",
    ]


# ---- Command line --------------------------------------------------------------------------------
def cli(out: Path, *more: str) -> Path:
    line = f"--model {TINY}/student --benchmark {TINY}/test.jsonl --limit 4 --n 2 --seeds 0 1"
    line += f" --max-new-tokens 48 --sampler hf --device cpu --out {out}"
    return evaluation.main(tyro.cli(evaluation.Args, args=[*line.split(), *more]))


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    return cli(tmp_path_factory.mktemp("eval") / "first.json")


def stops(capsys, out: Path, *more: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli(out, *more)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_cli_writes_every_knob_and_sample(result: Path) -> None:
    record = json.loads(result.read_text())
    assert record["knobs"] == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 48,
        "thinking": False,
        "prompt": evaluation.PROMPT,
    }
    assert record["seeds"] == [0, 1]
    assert record["sampler"] == "hf"
    assert {"model", "adapter", "versions", "git", "dtype", "device"} <= set(record)
    scores = record["results"]["test.jsonl"]
    lines = (result.parent / "first.samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 4 * 2 * 2
    for seed in ("0", "1"):
        right = [row["correct"] for row in samples if str(row["seed"]) == seed]
        assert scores["per_seed"][seed]["avg@2"] == pytest.approx(np.mean(right))
    means = [scores["per_seed"][seed]["len_mean"] for seed in ("0", "1")]
    assert np.mean(scores["per_problem"]["len_mean"]) == pytest.approx(np.mean(means))
    assert len(scores["problem_ids"]) == len(scores["per_problem"]["avg@2"]) == 4
    texts = {seed: [r["completion"] for r in samples if r["seed"] == seed] for seed in (0, 1)}
    assert texts[0] != texts[1]
    assert sorted(p.name for p in result.parent.iterdir()) == ["first.json", "first.samples.jsonl"]


def test_cli_against_itself_is_no_difference(result: Path, tmp_path: Path, capsys) -> None:
    cli(tmp_path / "second.json", "--against", str(result))
    again = json.loads((tmp_path / "second.json").read_text())["results"]
    assert again == json.loads(result.read_text())["results"]  # same seeds, same samples
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("len_mean"))
    assert row.split()[-3:] == ["+0.0", "[+0.0,", "+0.0]"]


def test_cli_refusals(result: Path, tmp_path: Path, capsys) -> None:
    against, new = ("--against", str(result)), tmp_path / "new.json"
    assert "exists already" in stops(capsys, result)
    assert "max_new_tokens 48 there, 32 here" in stops(
        capsys, new, *against, "--max-new-tokens", "32"
    )
    assert "other problems" in stops(capsys, new, *against, "--limit", "3")
    other = tmp_path / "other.jsonl"
    other.write_text((TINY / "test.jsonl").read_text())
    assert "scored" in stops(capsys, new, *against, "--benchmark", str(other))
    assert "not a result file" in stops(capsys, new, "--against", str(other))
    assert "--n 0 must be at least 1" in stops(capsys, new, "--n", "0")
    assert "--top-p" in stops(capsys, new, "--top-p", "0")
    assert "none twice" in stops(capsys, new, "--seeds", "1", "1")
    assert "lower --max-new-tokens" in stops(capsys, new, "--max-new-tokens", "1000000")
    assert "no adapter_config.json" in stops(capsys, new, "--adapter", str(tmp_path))
    assert not new.exists()


def test_cli_greedy_samples_are_announced_identical(tmp_path: Path, capsys) -> None:
    out = cli(tmp_path / "greedy.json", "--temperature", "0", "--limit", "1")
    assert "identical" in capsys.readouterr().out
    lines = out.with_suffix(".samples.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert len({json.loads(line)["completion"] for line in lines}) == 1


# ---- Adapters ------------------------------------------------------------------------------------
@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = common.load_student(
        str(TINY / "student"), lora_rank=4, lora_alpha=8, dtype="float32", device="cpu",
        checkpointing=False,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_cli_adapter_changes_the_samples(adapter: Path, result: Path, tmp_path: Path) -> None:
    out = cli(tmp_path / "lora.json", "--adapter", str(adapter))
    lora, base = (path.with_suffix(".samples.jsonl").read_text() for path in (out, result))
    assert lora != base
    assert json.loads(out.read_text())["adapter"] == str(adapter)


def test_adapter_of_another_base_warns_or_stops(adapter: Path, tmp_path: Path, capsys) -> None:
    args = evaluation.Args(f"{TINY}/student", (), adapter=str(adapter))
    model = evaluation.load_evaluated(args, "cpu")
    assert isinstance(model, peft.PeftModel)
    assert model.compute_dtype == torch.float32
    assert capsys.readouterr().out == ""
    edit_config(adapter, base_model_name_or_path="some/other")
    evaluation.load_evaluated(args, "cpu")
    assert capsys.readouterr().out.count("some/other") == 1
    edit_config(adapter, r=8)  # shapes differ
    with pytest.raises(SystemExit):
        evaluation.load_evaluated(args, "cpu")
    assert "does not fit" in capsys.readouterr().err
    edit_config(adapter, r=4, target_modules=["q_proj"])  # layers differ: peft would only warn
    with pytest.raises(SystemExit):
        evaluation.load_evaluated(args, "cpu")
    assert "other layers" in capsys.readouterr().err


def test_adapter_given_as_model_stops(adapter: Path, tmp_path: Path, capsys) -> None:
    assert "--adapter" in stops(capsys, tmp_path / "x.json", "--model", str(adapter))


# ---- Protocols, going on, comparing --------------------------------------------------------------
def test_a_protocol_sets_its_flags_and_refuses_others(capsys) -> None:
    args = evaluation.Args("m", ("x",), protocol="pw_opsd", seeds=(5,))
    got = evaluation.apply_protocol(args)
    assert (got.n, got.temperature, got.top_p, got.max_new_tokens) == (12, 1.0, 0.95, 38912)
    assert (got.thinking, got.prompt, got.seeds) == (True, "pw_opsd", (5,))
    assert "protocol pw_opsd: n 12, temperature 1.0" in capsys.readouterr().out
    for changed, sentence in (
        ({"n": 7}, "sets --n 12, not 7: drop one"),
        ({"protocol": "grpo"}, "there are esr, pw_opsd, trd"),
    ):
        with pytest.raises(common.Stop) as stop:
            evaluation.apply_protocol(dataclasses.replace(args, **changed))
        assert sentence in stop.value.sentence


def test_a_killed_evaluation_goes_on_and_gives_the_same_numbers(
    tmp_path, monkeypatch, capsys
) -> None:
    whole = json.loads(cli(tmp_path / "whole.json", "--batch", "2").read_text())
    real, calls = evaluation.evaluate, []

    def killed(*args, **kwargs):
        calls.append(kwargs["first"])
        if len(calls) == 3:  # in the second seed
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        cli(tmp_path / "again.json", "--batch", "2")
    part = tmp_path / "again.part.jsonl"
    with open(part, "a") as file:
        file.write('{"key": ["cut in the mi')
    said = stops(capsys, tmp_path / "again.json", "--batch", "2", "--temperature", "0.5")
    assert "begun with other arguments: knobs was" in said
    again = json.loads(cli(tmp_path / "again.json", "--batch", "2").read_text())
    assert calls == [0, 2, 0, 0, 2]  # nothing is sampled twice
    assert again["results"] == whole["results"]
    samples = [(tmp_path / f"{n}.samples.jsonl").read_text() for n in ("whole", "again")]
    assert samples[0] == samples[1]
    assert not part.exists()
    one = json.loads(cli(tmp_path / "one.json").read_text())  # batches change nothing
    assert one["results"] == whole["results"]


def test_sign_test_is_the_binomial() -> None:
    a, b = np.array([1.0] * 9 + [0.0] * 2 + [0.5] * 5), np.array([0.0] * 9 + [1.0] * 2 + [0.5] * 5)
    better, worse, p = comparison.sign_test(a, b)
    assert (better, worse) == (9, 2)
    assert p == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert comparison.sign_test(b, a) == (2, 9, p)
    assert comparison.sign_test(a, a) == (0, 0, 1.0)


def test_buckets() -> None:
    kinds = [comparison.bucket(c, 16) for c in range(17)]
    assert kinds == ["never"] + ["seldom"] * 7 + ["often"] * 9


def test_analysis_by_hand() -> None:
    def rows(*corrects: str) -> dict[str, list[dict]]:
        return {
            str(i): [{"correct": c == "1", "tokens": 10 * i + s} for s, c in enumerate(flags)]
            for i, flags in enumerate(corrects)
        }

    a, b = rows("11", "10", "00", "11"), rows("11", "00", "00", "10")
    got = comparison.analyse(a, b)
    assert (got["problems"], got["samples"], got["difference"]) == (4, 2, 0.25)
    assert (got["better"], got["worse"]) == (2, 0)
    assert got["a"]["pass_at_k"] == pytest.approx([5 / 8, 3 / 4])
    assert got["b"]["pass_at_k"] == pytest.approx([3 / 8, 2 / 4])
    assert got["b"]["lengths_of_right"] == [0, 1, 30]
    assert got["never"] == {"problems": 2, "a_solves_any": 1, "a": 0.25, "b": 0.0}
    assert got["often"] == {"problems": 2, "a_solves_any": 2, "a": 1.0, "b": 0.75}
    assert got["seldom"]["problems"] == 0


def test_compare_writes_numbers_and_figures_and_refuses_other_protocols(
    result, tmp_path, capsys
) -> None:
    teacher = tmp_path / "teacher.json"
    line = f"--model {TINY}/teacher --benchmark {TINY}/test.jsonl --limit 4 --n 2 --seeds 0 1"
    line += f" --max-new-tokens 48 --sampler hf --device cpu --out {teacher}"
    evaluation.main(tyro.cli(evaluation.Args, args=line.split()))
    ask = ["--compare", str(teacher), str(result), "--out", str(tmp_path / "both.json")]
    got = evaluation.main(tyro.cli(evaluation.Args, args=ask))
    numbers = json.loads(got.read_text())["results"]["test.jsonl"]
    assert numbers["samples"] == 4  # two seeds of two
    means = [json.loads(p.read_text())["results"]["test.jsonl"]["per_problem"]["avg@2"]
             for p in (teacher, result)]  # fmt: skip
    assert numbers["difference"] == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    out = capsys.readouterr().out
    assert "sign test p =" in out
    assert (tmp_path / "both.test.jsonl.pass.png").exists()
    assert (tmp_path / "both.test.jsonl.lengths.png").exists()
    with pytest.raises(common.Stop) as stop:
        evaluation.main(tyro.cli(evaluation.Args, args=ask))
    assert "exists already" in stop.value.sentence
    record = json.loads(teacher.read_text())
    record["knobs"]["temperature"] = 1.0
    teacher.write_text(json.dumps(record))
    with pytest.raises(common.Stop) as stop:
        evaluation.main(tyro.cli(evaluation.Args, args=[*ask[:4], str(tmp_path / "new.json")]))
    assert "temperature 1.0 and 0.7" in stop.value.sentence


# ---- Function calls ------------------------------------------------------------------------------
TOOL = {
    "name": "area", "description": "Area of a square.",
    "parameters": {
        "type": "dict", "properties": {"side": {"type": "integer", "description": "its side"}},
        "required": ["side"],
    },
}  # fmt: skip
ITEM = {"id": "c0", "problem": "p0 a square of side 3?", "function": [TOOL]}
ITEM |= {"answer": [{"area": {"side": [3]}}]}


def test_function_calls_from_file_to_scores(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    none = ITEM | {"id": "c1", "problem": "p1 who are you?", "answer": []}
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps(none) + "\n")
    problems = evaluation.load_benchmark(str(path))
    assert [p.kind for p in problems] == ["calls", "calls"]
    call = '<tool_call>\n{"name": "area", "arguments": {"side": %s}}\n</tool_call>'
    texts = [call % 3, call % 4, "no idea", call % 3]
    rows = evaluation.grade([problems[0], problems[0], problems[0], problems[1]], texts)
    assert [r["correct"] for r in rows] == [True, False, False, False]
    assert [r["name_correct"] for r in rows] == [True, True, False, False]
    assert [r["answer"] is None for r in rows] == [False, False, True, False]
    tokenizer = common.load_tokenizer(f"{TINY}/student")
    shown = tokenizer.decode(
        benchmarks.chat_ids(tokenizer, problems[0], prompt="{problem}!", thinking=False)
    )
    assert '"name": "area"' in shown
    assert "<tools>" in shown  # in the template's own way
    assert "side 3?<|im_end|>" in shown  # the math prompt is not for calls
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    shown = tokenizer.decode(
        benchmarks.chat_ids(tokenizer, problems[0], prompt="{problem}!", thinking=False)
    )
    assert "You can call these functions" in shown
    assert '"area"' in shown
    script = {"p0": [(texts[0], "stop"), (texts[1], "stop")], "p1": [("hi", "stop")] * 2}
    metrics, _ = evaluation.evaluate(
        Canned(script), ToolLetters(), problems, **KNOBS | {"n": 2}, top_k=0
    )
    assert metrics["avg@2"] == 0.75
    assert metrics["name_correct"] == 1.0
    assert metrics["parsed"] == 0.5
    assert "maj@2" not in metrics


class ToolLetters(Letters):
    def apply_chat_template(self, messages: list[dict], *, tools=None, **_) -> str:
        return messages[0]["content"] + json.dumps(tools)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"answer": None}, "lacks answer, which calls items have"),
        ({"problem": None}, "lacks messages or problem"),
        ({}, "the id 'c0' is there twice"),
    ],
)
def test_bad_items_stop(tmp_path, changes, sentence) -> None:
    path = tmp_path / "calls.jsonl"
    row = {k: v for k, v in (ITEM | changes).items() if v is not None}
    path.write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(common.Stop) as stop:
        evaluation.load_benchmark(str(path))
    assert sentence in stop.value.sentence


def test_code_from_file_to_scores(tmp_path) -> None:
    path = tmp_path / "code.jsonl"
    row = {"id": "T/0", "problem": 'def add(a, b):\n    """Sum."""\n', "entry_point": "add"}
    row["test"] = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    path.write_text(json.dumps(row) + "\n")
    (problem,) = evaluation.load_benchmark(str(path))
    texts = [f"Sure:\n```python\ndef add(a, b):\n    return a {sign} b\n```" for sign in "+-"]
    rows = evaluation.grade([problem, problem], [*texts])
    assert [r["correct"] for r in rows] == [True, False]
    assert [r["status"] for r in rows] == ["passed", "failed"]
    del row["entry_point"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(common.Stop) as stop:
        evaluation.load_benchmark(str(path))
    assert "lacks entry_point, which humaneval items have" in stop.value.sentence


def test_kinds_are_told_by_their_columns() -> None:
    told = [{"problem": ""}, {"function": []}, {"test_list": []}, {"test": ""}]
    told += [{"plus_input": [], "id": "Mbpp/2"}, {"plus_input": [], "id": "HumanEval/2"}]
    kinds = [benchmarks.kind_of(row) for row in [*told, {"public_test_cases": ""}]]
    assert kinds == [
        "math", "calls", "mbpp", "humaneval", "mbpp_plus", "humaneval_plus", "livecodebench",
    ]  # fmt: skip


def test_answer_pairs_of_our_own_making() -> None:
    """211 pairs, 105 of them equal; each row has the verdict seen and math-verify's beside it."""
    rows = [json.loads(line) for line in (Path(__file__).parent / "answer_pairs.jsonl").open()]
    assert len(rows) == 211
    wrong = []
    for row in rows:
        verdict = common.same_answer(row["a"], row["b"])
        assert verdict == row["verdict"] == common.same_answer(row["b"], row["a"]), row
        wrong += [row] if verdict != row["equal"] else []
    assert (
        len(wrong) == 4
    )  # all of them equal and not seen to be: i^2, 1/i, 0.333..., two empty sets
    assert all(row["equal"] for row in wrong)
