"""common.py: batches against plain transformers, data, runs, checkpoints, grading of bad input."""

import dataclasses
import json
import types

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError

import common
from common import Rollout, Stop

STUDENT = str(ROOT / "tiny" / "student")


@dataclasses.dataclass
class Args:
    student: str = STUDENT
    seed: int = 0
    run_dir: str = ""
    resume: str = ""
    learning_rate: float = 1.0


@pytest.fixture
def student():
    torch.manual_seed(0)
    return common.load_student(
        STUDENT, lora_rank=4, lora_alpha=8, dtype="float32", device="cpu", checkpointing=False
    )


ROLLOUTS = [
    Rollout([5, 6, 7], [8, 9], "length", [0.0] * 2),
    Rollout([5], [10, 11, 12, 13, 14], "stop", [0.0] * 5),
    Rollout([20, 21, 22, 23], [24], "length", [0.0]),
]


def test_completion_hidden_predicts_the_completion_as_one_unpadded_forward_does(student):
    batch = common.collate(ROLLOUTS, "cpu")
    ids = batch.input_ids[batch.completion_mask]
    assert ids.tolist() == [8, 9, 10, 11, 12, 13, 14, 24]
    with torch.no_grad():
        hidden = common.completion_hidden(student, batch)
        ours = common.token_logprobs(hidden, common.head_of(student), ids)
        theirs = []
        for r in ROLLOUTS:
            logits = student(input_ids=torch.tensor([r.prompt_ids + r.completion_ids])).logits[0]
            logprobs = logits.log_softmax(-1)
            start = len(r.prompt_ids) - 1  # the position before a token predicts it
            theirs += [logprobs[start + n, i] for n, i in enumerate(r.completion_ids)]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-4)


def test_a_longer_neighbour_changes_nothing(student):
    alone = common.completion_hidden(student, common.collate(ROLLOUTS[:1], "cpu"))
    long = Rollout([3] * 30, [4] * 20, "length", [0.0] * 20)
    beside = common.completion_hidden(student, common.collate([ROLLOUTS[0], long], "cpu"))
    torch.testing.assert_close(alone, beside[:2], rtol=1e-5, atol=1e-5)


def test_eos_is_supervised_even_where_pad_is_eos():
    batch = common.collate([Rollout([1], [2, 0], "stop", [0.0] * 2), ROLLOUTS[1]], "cpu")
    assert batch.input_ids[batch.completion_mask].tolist()[:2] == [2, 0]


def test_unsupervised_tokens_are_read_but_not_predicted(student):
    r = dataclasses.replace(ROLLOUTS[1], supervised=[True, False, True, False, True])
    batch = common.collate([r], "cpu")
    assert batch.input_ids[batch.completion_mask].tolist() == [10, 12, 14]
    every = common.completion_hidden(student, common.collate([ROLLOUTS[1]], "cpu"))
    torch.testing.assert_close(common.completion_hidden(student, batch), every[::2])


def test_problems_for_step_is_pure_and_covers_every_epoch():
    problems = list(range(10))
    flat = [p for step in range(5) for p in common.problems_for_step(problems, step, 4, 0)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == problems
    assert flat[:10] != flat[10:]
    assert common.problems_for_step(problems, 3, 4, 0) == flat[12:16]
    assert common.problems_for_step(problems, 0, 20, 0) == flat
    assert common.problems_for_step(problems, 0, 10, 1) != flat[:10]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_load_problems_reads_the_usual_columns(tmp_path):
    rows = [
        {"problem": "a\u2028b", "answer": "1", "solution": "s"},  # U+2028 is no end of line
        {"problem": "p", "solution": r"so \boxed{\frac{1}{2}}"},
        {"problem": "q", "answer": "5 + 5 = 10\n#### 10"},
        {"problem": "r", "answer": 7},
    ]
    got = common.load_problems(write(tmp_path / "x.jsonl", rows))
    assert [p.answer for p in got] == ["1", r"\frac{1}{2}", "10", "7"]
    assert got[0].prompt == "a\u2028b"
    assert got[2].solution.startswith("5 + 5")
    question = common.load_problems(write(tmp_path / "y.jsonl", [{"question": "q", "answer": "1"}]))
    assert question[0].prompt == "q"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ('{"text": "x"}\n', "no problem, prompt or question column"),
        ("{broken\n", "cannot read the dataset"),
        (None, "cannot read the dataset"),
    ],
)
def test_bad_datasets(tmp_path, text, sentence):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Stop) as stop:
        common.load_problems(str(path))
    assert sentence in stop.value.sentence
    assert stop.value.code == 2


def test_no_such_model_and_no_chat_template(tmp_path):
    with pytest.raises(Stop, match="2"):
        common.load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(Stop, match="2"):
        common.load_model(str(tmp_path / "nothing"), dtype="auto", device="cpu")
    with pytest.raises(Stop) as stop:  # a typing error in a local path never asks the hub
        common.load_tokenizer("tiny/studnet")
    assert "tiny is a directory here" in stop.value.sentence
    tokenizer = common.load_tokenizer(STUDENT)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(Stop) as stop:
        common.load_tokenizer(str(tmp_path / "plain"))
    assert "no chat template" in stop.value.sentence


def new_run(tmp_path, name="run", **changes):
    args = Args(run_dir=str(tmp_path / name), **changes)
    return common.Run(args, __file__, common.World("cpu"))


def test_run_refuses_an_existing_directory(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    with pytest.raises(Stop) as stop:
        new_run(tmp_path)
    assert "exists" in stop.value.sentence
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious"]


def checkpoint_pieces(student):
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    return student, common.load_tokenizer(STUDENT), optimizer


def test_checkpoint_restores_weights_optimizer_and_logs(tmp_path, student):
    run = new_run(tmp_path)
    student, tokenizer, optimizer = checkpoint_pieces(student)
    run.begin(student, optimizer)
    trained = [p for p in student.parameters() if p.requires_grad]
    for step in (1, 2, 3):
        for p in trained:
            p.grad = torch.full_like(p, float(step))
        optimizer.step()
        run.log("metrics", {"step": step})
        if step == 2:
            run.save_checkpoint(2, student, tokenizer, optimizer)
            kept = [p.detach().clone() for p in trained]
            noise = torch.rand(3)
    again = common.Run(Args(resume=str(run.dir)), __file__, common.World("cpu"))
    assert again.begin(student, optimizer) == 2
    assert all(torch.equal(a, b) for a, b in zip(trained, kept, strict=True))
    assert optimizer.state_dict()["state"][0]["step"] == 2
    assert torch.equal(torch.rand(3), noise)
    assert [row["step"] for row in run.read("metrics")] == [1, 2]


def test_resume_refuses_other_arguments(tmp_path, student):
    run = new_run(tmp_path)
    run.begin(student, None)
    with pytest.raises(Stop) as stop:
        common.Run(Args(resume=str(run.dir), learning_rate=2.0), __file__, common.World("cpu"))
    assert "learning_rate was 1.0" in stop.value.sentence
    with pytest.raises(Stop):
        common.Run(Args(resume=str(tmp_path / "none")), __file__, common.World("cpu"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, student, monkeypatch):
    run = new_run(tmp_path)
    student, tokenizer, optimizer = checkpoint_pieces(student)
    run.begin(student, optimizer)
    run.save_checkpoint(1, student, tokenizer, optimizer)
    before = {p.name: p.read_bytes() for p in (run.dir / "checkpoints/step_000001").iterdir()}

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(student, "save_pretrained", full)
    with pytest.raises(Stop) as stop:
        run.save_checkpoint(2, student, tokenizer, optimizer)
    assert "No space left" in stop.value.sentence
    assert [p.name for p in (run.dir / "checkpoints").iterdir()] == ["step_000001"]
    assert before == {
        p.name: p.read_bytes() for p in (run.dir / "checkpoints/step_000001").iterdir()
    }


def test_a_checkpoint_is_an_ordinary_peft_adapter(tmp_path, student):
    import peft

    run = new_run(tmp_path)
    student, tokenizer, optimizer = checkpoint_pieces(student)
    run.begin(student, optimizer)
    for p in student.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    run.save_checkpoint(1, student, tokenizer, optimizer)
    base = common.load_model(STUDENT, dtype="float32", device="cpu")
    loaded = peft.PeftModel.from_pretrained(base, run.dir / "checkpoints/step_000001")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, student(ids).logits)


def test_full_fine_tune_keeps_float32_masters_and_round_trips(tmp_path):
    model = common.load_student(
        STUDENT, lora_rank=0, lora_alpha=1, dtype="bfloat16", device="cpu", checkpointing=False
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    hidden = common.completion_hidden(model, common.collate(ROLLOUTS, "cpu"))
    assert hidden.dtype == common.head_of(model).weight.dtype == torch.bfloat16
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    model.save_pretrained(tmp_path / "full")
    other = common.load_student(
        STUDENT, lora_rank=0, lora_alpha=1, dtype="float32", device="cpu", checkpointing=False
    )
    common.load_weights(other, tmp_path / "full")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_context_is_checked_before_anything_runs(student):
    tokenizer = common.load_tokenizer(STUDENT)
    room = student.config.max_position_embeddings
    prompts = [common.chat_prompt_ids(tokenizer, "1 + 1")]
    needed = common.context_needed(student, prompts, 5, "--n")
    assert needed == len(common.chat_prompt_ids(tokenizer, "1 + 1")) + 5
    with pytest.raises(Stop) as stop:
        common.context_needed(student, prompts, room, "--n")
    assert f"exceed the context of {STUDENT} ({room})" in stop.value.sentence


def supervised(rollouts):
    return [dataclasses.replace(r, supervised=[True] * len(r.completion_ids)) for r in rollouts]


def test_step_0_checks_pass_on_a_sound_setup_and_stop_on_each_fault(student, monkeypatch):
    rollouts = supervised(ROLLOUTS)
    batch = common.collate(rollouts, "cpu")
    sides = {"student": (student, batch), "teacher": (student, batch)}
    common.check_first_batch(sides, rollouts, common.reverse_kl)
    with pytest.raises(Stop) as stop:  # lost tokens (OPSD's defect)
        common.check_first_batch(sides, supervised([ROLLOUTS[1], *ROLLOUTS[1:]]), common.reverse_kl)
    assert "not the sampled ids" in stop.value.sentence
    with pytest.raises(Stop) as stop:  # a divergence that is not 0 at equality
        common.check_first_batch(sides, rollouts, lambda s, t: common.entropy(s))
    assert "teacher against itself" in stop.value.sentence
    head = common.head_of(student)
    monkeypatch.setattr(common, "head_of", lambda *_: head._replace(weight=head.weight * 0.5))
    with pytest.raises(Stop) as stop:  # an architecture that scales its logits
        common.check_first_batch(sides, rollouts, common.reverse_kl)
    assert "scales its logits" in stop.value.sentence
    common.check_logprob_gap(1, 0.005, torch.float32)
    for gap in (0.02, float("nan")):
        with pytest.raises(Stop):
            common.check_logprob_gap(9, gap, torch.float32)


def test_soft_capping_is_read_from_the_config():
    config = types.SimpleNamespace(final_logit_softcapping=30.0)
    model = types.SimpleNamespace(
        compute_dtype=torch.float32,
        config=types.SimpleNamespace(get_text_config=lambda: config),
        get_output_embeddings=lambda: torch.nn.Linear(2, 3, bias=True),
    )
    head = common.head_of(model, torch.tensor([2, 0]))
    assert head.softcap == 30.0
    assert head.weight.shape == (2, 2)
    assert head.bias.shape == (2,)


def test_gemma_2_keeps_both_soft_caps(tmp_path):
    """Attention soft-capping needs the eager kernel: sdpa leaves it out without a word."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=0.05,
        final_logit_softcapping=1.0, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    reference = Gemma2ForCausalLM(config).eval()
    reference.save_pretrained(tmp_path / "gemma")
    model = common.load_model(str(tmp_path / "gemma"), dtype="float32", device="cpu")
    batch = common.collate(ROLLOUTS, "cpu")
    ids = batch.input_ids[batch.completion_mask]
    with torch.no_grad():
        logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        ours = common.token_logprobs(
            common.completion_hidden(model, batch), common.head_of(model), ids
        )
    theirs = logits[:, :-1][batch.completion_mask[:, 1:]].log_softmax(-1)
    torch.testing.assert_close(ours, theirs[torch.arange(len(ids)), ids], rtol=1e-4, atol=1e-4)


def test_the_end_of_turn_comes_from_the_template():
    """A base model's EOS (Qwen2.5-Math: <|endoftext|>) is not what its template writes."""
    tokenizer = common.load_tokenizer(STUDENT)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.eos_token_id != end
    assert common.turn_end_id(tokenizer) == end


def test_a_log_line_cut_by_a_kill_is_dropped(tmp_path, student):
    run = new_run(tmp_path)
    run.begin(student, None)
    run.log("metrics", {"step": 0})
    with open(run.dir / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "lo')
    assert run.read("metrics") == [{"step": 0}]
