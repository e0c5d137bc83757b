"""Base against tuned: figures that do not depend on the batch size, and answers in the order of the questions."""

import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from lora_ft.data.prepare import build_splits
from lora_ft.evaluation.compare import compare_models, evaluating, generate_answers
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_base, load_tokenizer
from lora_ft.sections import DataSection, EvaluationSection, ModelSection, SourceSection


@pytest.fixture(scope="module")
def tuned(tiny_base):
    """The tiny base with an adapter that does something."""
    section = ModelSection(base=str(tiny_base), dtype="float32", attn_implementation="sdpa")
    model = load_base(find_base(section.base), section)
    model = attach_adapter(model, {"r": 4, "target_modules": "all-linear", "init_lora_weights": False})
    return model, load_tokenizer(find_base(section.base).folder, section)


@pytest.fixture
def test_split(tuned, chat_rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    source = SourceSection(path=str(path), split="test")
    other = SourceSection(path=str(path), split="train")
    data = DataSection(sources=(other, source), max_length=96, cache_dir=str(tmp_path / "cache"))
    splits = build_splits(data, tuned[1])
    return data, splits.test, splits.examples("test")


def reference_loss(model, rows: datasets.Dataset) -> tuple[float, int]:
    """Full logits, row by row, in fp32: the definition."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        kept = labels[0, 1:] != -100
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
        total, count = total + losses[kept].sum().item(), count + int(kept.sum())
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_loss_is_the_mean_over_supervised_tokens_for_any_batch(tuned, test_split, batch_size):
    """Failure mode 20: a mean of the batches' means would differ, for answers of one to five tokens."""
    model, tokenizer = tuned
    data, rows, examples = test_split
    section = EvaluationSection(generate=3, max_new_tokens=4, batch_size=batch_size)
    compared = compare_models(model, tokenizer, rows, examples, data, section, general=rows.select(range(5)))
    loss, count = reference_loss(model, rows)
    assert compared.num_supervised_tokens == count
    found = compared.figures["loss"]
    assert found.tuned.value == pytest.approx(loss, abs=1e-5)
    assert compared.figures["perplexity"].tuned.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert compared.general.tuned.value == pytest.approx(reference_loss(model, rows.select(range(5)))[0], abs=1e-5)
    with model.disable_adapter():
        assert found.base.value == pytest.approx(reference_loss(model, rows)[0], abs=1e-5)
    assert found.base.value != pytest.approx(found.tuned.value, abs=1e-3)


def test_intervals_do_not_depend_on_the_batch_size(tuned, test_split):
    model, tokenizer = tuned
    data, rows, examples = test_split
    found = []
    for batch_size in (1, 7, 64):
        section = EvaluationSection(generate=6, max_new_tokens=4, batch_size=batch_size, metrics=("f1",))
        found.append(compare_models(model, tokenizer, rows, examples, data, section))
    assert [each.predictions for each in found[1:]] == [found[0].predictions] * 2
    for name, figure in found[0].figures.items():
        for other in found[1:]:
            for column in ("base", "tuned", "difference"):
                expected, got = getattr(figure, column), getattr(other.figures[name], column)
                scale = 1e-5 * max(abs(figure.base.value), abs(figure.tuned.value))  # of both, a difference has less
                assert (got.value, got.low, got.high) == pytest.approx(
                    (expected.value, expected.low, expected.high), abs=scale + 1e-6
                )


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import resource
from pathlib import Path
import datasets
from lora_ft.evaluation.compare import score_rows
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_base, load_tokenizer
from lora_ft.sections import ModelSection
from lora_ft.training.trainer import build_arguments, build_trainer

def make_rows(count):
    row = {{"input_ids": [5, 6, 7, 8] * 16, "labels": [-100] * 16 + [5, 6, 7, 8] * 12}}
    return datasets.Dataset.from_list([row] * count)

section = ModelSection(base={base!r}, dtype="float32", attn_implementation="sdpa")
base = find_base(section.base)
model = attach_adapter(load_base(base, section), {{"r": 4, "target_modules": "all-linear"}}).eval()
tokenizer = load_tokenizer(base.folder, section)

def score(rows):
    sums = score_rows(model, tokenizer, rows, batch_size=8)
    assert sums.shape == (len(rows), 3) and (sums[:, 2] == 48).all()

def validate(rows):
    settings = {{"use_cpu": True, "bf16": False, "report_to": "none", "per_device_eval_batch_size": 8}}
    arguments = build_arguments(settings, Path({folder!r}))
    build_trainer(model, tokenizer, rows, rows, arguments, quiet=True).evaluate()

peaks = []
for count in (64, 64, 4096):
    {what}(make_rows(count))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[2] - peaks[1])
"""


@pytest.mark.parametrize("what", ["score", "validate"])
def test_memory_does_not_grow_with_the_rows(tiny_base, tmp_path, what):
    """Failure mode 22: the logits alone of 4,000 rows more would be 330 MB; their tokens are 8 MB."""
    root = str(Path(__file__).parents[2])
    program = MEMORY.format(root=root, base=str(tiny_base), folder=str(tmp_path), what=what)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 40e6


def test_answers_do_not_depend_on_their_neighbours(tuned):
    model, tokenizer = tuned
    prompts = [[5, 6, 7], [8] * 40, [9, 10], [11, 12, 13, 14, 15]]
    alone = [generate_answers(model, tokenizer, [p], [2], EvaluationSection(max_new_tokens=6))[0] for p in prompts]
    together = generate_answers(model, tokenizer, prompts, [2], EvaluationSection(max_new_tokens=6, batch_size=3))
    assert together == alone


def test_number_of_answers(tuned, test_split):
    model, tokenizer = tuned
    data, rows, examples = test_split
    for asked, written in {0: 0, 5: 5, "all": len(rows)}.items():
        section = EvaluationSection(generate=asked, max_new_tokens=1)
        compared = compare_models(model, tokenizer, rows, examples, data, section)
        assert len(compared.predictions) == written
        assert ("exact_match" in compared.figures) == bool(written)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_a_perfect_answer_is_an_exact_match_whatever_the_template_puts_around_it(
    tuned, tmp_path, monkeypatch, variables
):
    """Qwen3's answers begin with an empty thinking part, which the model was taught to write."""
    model, tokenizer = tuned
    template = Path(__file__).parents[1] / "data" / "templates" / "qwen3.jinja"
    rows = [
        {"messages": [{"role": "user", "content": f"how many {n}"}, {"role": "assistant", "content": f"blinks {n}"}]}
        for n in "abc"
    ]
    rows.append({"text": "the battery is full"})
    data, splits = prepare_test(rows, tokenizer, tmp_path, chat_template=str(template), template_kwargs=variables)
    taught = splits.test["input_ids"][:]

    def parrot(input_ids, attention_mask, **_):
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        wholes = [next(row for row in taught if row[: len(prompt)] == prompt) for prompt in prompts]
        said = [whole[len(prompt) : -1] for prompt, whole in zip(prompts, wholes, strict=True)]  # a line break is last
        longest = max(map(len, said))
        padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in said]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    monkeypatch.setattr(model, "generate", parrot)
    section = EvaluationSection(generate="all", metrics=("exact_match", "f1"))
    compared = compare_models(model, tokenizer, splits.test, splits.examples("test"), data, section)
    assert [compared.figures[name].tuned.value for name in section.metrics] == [1, 1]
    assert [row.reference.startswith("<think>") for row in compared.predictions] == [not variables] * 3


def prepare_test(rows, tokenizer, folder, **options):
    """The section, and splits with all rows in train and test."""
    sources = []
    for kind in ("messages", "prompt", "text"):  # a file's first row tells the format of all
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if kind in row))
        sources += [SourceSection(str(path), split=split) for split in ("train", "test") if path.stat().st_size]
    data = DataSection(tuple(sources), max_length=96, cache_dir=str(folder / "cache"), **options)
    return data, build_splits(data, tokenizer)


def test_rows_that_ask_nothing_are_measured_and_not_answered(tuned, tmp_path):
    """The tokenizer puts no BOS before a text, so that a prompt would have no token at all."""
    model, tokenizer = tuned
    rows = [{"text": f"the battery is {n}"} for n in "abc"]
    section = EvaluationSection(generate=2, max_new_tokens=2)
    for more, num_answered in (([], 0), ([{"prompt": "how many?", "completion": "two"}], 1)):
        data, splits = prepare_test([*rows, *more], tokenizer, tmp_path)
        compared = compare_models(model, tokenizer, splits.test, splits.examples("test"), data, section)
        assert len(compared.predictions) == num_answered and ("exact_match" in compared.figures) == bool(num_answered)
        assert compared.figures["loss"].num_rows == 3 + num_answered


def test_model_is_left_as_it_was(tuned, test_split):
    model, tokenizer = tuned
    data, rows, examples = test_split
    model.train()
    compare_models(model, tokenizer, rows, examples, data, EvaluationSection(generate=1, max_new_tokens=1))
    assert model.training and model.active_adapter == "default"
    assert not model.base_model.model.model.layers[0].mlp.up_proj.disable_adapters


def test_a_mixture_of_experts_answers_after_it_was_trained(tuned):
    """TRL has its config ask for the router's logits, whose loss does not fit the steps of `generate`."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    _, tokenizer = tuned
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, **heads, **experts)
    model = get_peft_model(Qwen3MoeForCausalLM(config), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.config.output_router_logits = True
    section = EvaluationSection(generate=2, max_new_tokens=4)
    with evaluating(model, adapter_on=True):
        answers = generate_answers(model, tokenizer, [[5, 6, 7], [8, 9]], [tokenizer.eos_token_id], section)
    assert len(answers) == 2 and model.config.output_router_logits
