"""A base with an encoder and a decoder: questions beside a context, answers written by beam search."""

import json
import shutil

import pytest

from lora_ft.model.load import find_base, load_base
from lora_ft.sections import ModelSection
from tests.test_run import stock

COLOURS, SHAPES = ("red", "green", "blue", "white"), ("one", "two", "three", "four", "five")
ANSWER = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
inputs = tokenizer(json.loads(sys.argv[2]), return_tensors="pt", padding=True)
written = model.generate(**inputs, max_new_tokens=12)
said = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
print(json.dumps([said, model.generation_config.num_beams, model.generation_config.no_repeat_ngram_size]))
"""


def make_t5(folder):
    """A random T5 of two layers, with a tokenizer that ends each text as T5's does."""
    import torch
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, number)]
    )
    shape = {"vocab_size": 320, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": number, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**shape, **ids, dropout_rate=0.0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def answer_recipe(recipe_file, tiny_t5, tmp_path):
    """A function that writes a recipe over rows of context, question and text."""
    rows = [
        {"context": f"the light is {colour} {shape}", "question": "what is the light?", "text": f"{colour} {shape}"}
        for colour in COLOURS
        for shape in SHAPES
    ]
    data = tmp_path / "reading.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**sections):
        section = {"task": "seq2seq", "sources": [{"path": str(data)}], "max_length": 64, "truncation": "context"}
        section["split"] = {"validation": 0.1, "test": 0.2}
        defaults = {
            "model": {"base": str(tiny_t5), "dtype": "float32"},
            "evaluation": {"generate": "all", "metrics": ["exact_match", "f1"], "max_new_tokens": 12},
        }
        merged = {**defaults, **sections}
        return recipe_file(**{**merged, "data": section})

    return write


def test_the_whole_way(answer_recipe, tmp_path, lora_ft):
    """Train, verify, evaluate, merge; the merged model answers by itself as it did in the evaluation."""
    learn = {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 8}
    done = lora_ft("train", answer_recipe(training=learn, export={"merge": True}))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    figures = json.loads((folder / "report" / "report.json").read_text())["figures"]
    assert figures["loss"]["tuned"]["value"] < 0.8 * figures["loss"]["base"]["value"]
    assert {"exact_match", "f1", "token_accuracy"} < set(figures) and figures["f1"]["num_rows"] == 4
    rows = [json.loads(line) for line in (folder / "report" / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"].startswith("question: what is the light?\ncontext: the light is")
    said, num_beams, ngram = stock(ANSWER, folder / "merged", json.dumps([row["prompt"] for row in rows]))
    assert said == [row["tuned"] for row in rows] and (num_beams, ngram) == (4, 2)
    again = lora_ft("evaluate", folder, "--json")
    assert json.loads(again.stdout)["figures"] == figures, again.stderr
    assert lora_ft("verify", folder).returncode == 0
    assert "text2text-generation" in (folder / "adapter" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in (folder / "merged" / "README.md").read_text()


def test_the_two_best_checkpoints_and_the_newest_are_kept(answer_recipe, tmp_path):
    from lora_ft.recipe import load_recipe
    from lora_ft.run import run_recipe

    steps = {
        "save_steps": 1,
        "eval_steps": 1,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_total_limit": 2,
    }
    learn = {"max_steps": 6, "learning_rate": 0.5, "per_device_train_batch_size": 16, "load_best_model_at_end": True}
    run_recipe(load_recipe(answer_recipe(training={**learn, **steps}, evaluation={"generate": 0})), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    kept = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {*sorted(losses, key=losses.__getitem__)[:2], 6}


def test_a_base_in_4_bit_learns(answer_recipe):
    from lora_ft.recipe import load_recipe
    from lora_ft.run import run_recipe
    from tests.test_run import NF4

    result = run_recipe(load_recipe(answer_recipe(quantization=NF4, evaluation={"generate": 0})), quiet=True)
    assert result.manifest["verification"]["ok"] and result.manifest["training"]["train_loss"] > 0


def test_the_loss_is_that_of_the_model_over_answers_alone(tiny_t5):
    """Failure mode 32: padded places of an answer are -100, so that they count for nothing."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from lora_ft.data.collate import Collator
    from lora_ft.training.labelled import answer_inputs, score_labels

    rows = [{"input_ids": [5, 6, 7], "labels": [8, 2]}, {"input_ids": [9, 10], "labels": [11, 12, 13, 2]}]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["labels"].tolist() == [[8, 2, -100, -100], [11, 12, 13, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    with torch.no_grad():
        losses = score_labels(model(**answer_inputs(model, batch)).logits, batch["labels"])
        expected = model(**batch).loss
        alone = [model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])) for r in rows]
    assert losses.sum() / 6 == pytest.approx(expected.item(), rel=1e-5)
    assert losses.sum(1).tolist() == pytest.approx([alone[0].loss.item() * 2, alone[1].loss.item() * 4], rel=1e-4)


@pytest.mark.parametrize(
    ("own", "expected"), [({}, (4, 2)), ({"num_beams": 1}, (1, None)), ({"no_repeat_ngram_size": 0}, (None, 0))]
)
def test_a_base_that_says_how_it_answers_is_taken_at_its_word(tiny_t5, tmp_path, own, expected):
    folder = shutil.copytree(tiny_t5, tmp_path / "base")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    section = ModelSection(base=str(folder), dtype="float32")
    config = load_base(find_base(section.base), section, task="seq2seq").generation_config
    assert (config.num_beams, config.no_repeat_ngram_size) == expected


@pytest.mark.parametrize(
    "override",
    [
        "model.dtype=float16",
        "training.fp16=true",
        "export.dtype=float16",
        "quantization={load_in_4bit: true, bnb_4bit_compute_dtype: float16}",
    ],
)
def test_half_precision_is_refused(answer_recipe, tmp_path, override, lora_ft):
    """Failure mode 32."""
    done = lora_ft("train", answer_recipe(), override)
    assert done.returncode == 2 and "overflows to NaN" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_bfloat16_reads_t5_in_float32():
    """Failure mode 32: what is chosen where the recipe leaves it open."""
    from lora_ft.model.machine import Machine, _fastest_dtype

    fields = {"device": "cuda:0", "native_bf16": False, "bf16_reason": "compute capability 7.5", "name": "T4"}
    known = {name: fields.get(name, 0) for name in Machine.__dataclass_fields__}
    assert _fastest_dtype(Machine(**known), "seq2seq")[0] == "float32"
    assert _fastest_dtype(Machine(**known), "sft")[0] == "float16"


@pytest.mark.parametrize(("task", "kind"), [("seq2seq", "causal"), ("sft", "t5")])
def test_a_base_of_another_kind_is_refused(answer_recipe, tiny_base, tmp_path, task, kind, lora_ft):
    sections = {"model": {"base": str(tiny_base), "dtype": "float32"}} if kind == "causal" else {}
    overrides = [] if task == "seq2seq" else ["data.task=sft", "data.truncation=keep_start"]
    done = lora_ft("train", answer_recipe(**sections), *overrides)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "or another data.task" in done.stderr or "An encoder reads one question" in done.stderr
