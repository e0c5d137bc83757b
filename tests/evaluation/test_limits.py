"""Answers that something other than the model ends: the recipe's limit, or a base that learned few positions."""

import pytest
import torch

from lora_ft.chat import _answer
from lora_ft.errors import UserError
from lora_ft.evaluation.answer import write_answers
from lora_ft.evaluation.compare import (
    Answer,
    Generation,
    Prediction,
    compare_models,
    generate_answers,
    sum_up,
)
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.profile import count_positions
from lora_ft.sections import EvaluationSection
from tests.conftest import make_tokenizer
from tests.evaluation.test_compare import prepare_test

POSITIONS = 40
SHAPE = {"vocab_size": 320, "max_position_embeddings": POSITIONS, "num_hidden_layers": 2, "hidden_size": 64}


@pytest.fixture(params=["gpt2", "opt", "gpt2 with an adapter on its positions"])
def learned(request):
    """A base of 40 learned positions with an adapter, which never ends an answer by itself; and its tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = request.param.partition(" ")[0]
    ends = {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 64, "bos_token_id": 2, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SHAPE, **ends, pad_token_id=0))
    modules = ["wpe", "c_attn"] if " " in request.param else "all-linear"
    return attach_adapter(model, {"r": 2, "target_modules": modules}).eval(), make_tokenizer()


def test_answers_end_where_learned_positions_do(learned):
    """Whatever prompts share the batch: the last new token is read by nobody, and needs no position."""
    model, tokenizer = learned
    assert count_positions(model) == POSITIONS
    prompts = [[5] * width for width in (10, POSITIONS - 1, POSITIONS, POSITIONS + 1, POSITIONS - 4)]
    section = EvaluationSection(max_new_tokens=8, batch_size=16)
    answers = generate_answers(model, tokenizer, prompts, [319], section)
    assert [answer.cut_by for answer in answers] == ["max_new_tokens", *["positions"] * 4]
    assert answers[3].text == ""
    alone = [generate_answers(model, tokenizer, [prompt], [319], section)[0] for prompt in prompts]
    assert alone == answers


def test_other_text_is_read_as_far_as_positions_go(learned, tmp_path):
    model, tokenizer = learned
    rows = [{"prompt": f"how many {n}", "completion": f"blinks {n}"} for n in "abc"]
    data, splits = prepare_test(rows, tokenizer, tmp_path)
    (tmp_path / "long").mkdir()
    _, long = prepare_test([{"text": "the battery is full " * 20}], tokenizer, tmp_path / "long")
    assert len(long.test["input_ids"][0]) > POSITIONS
    section = EvaluationSection(max_new_tokens=128)
    compared = compare_models(model, tokenizer, splits.test, splits.examples("test"), data, section, general=long.test)
    assert compared.general.is_finite and compared.generation.num_out_of_positions == 3
    assert "3 of 3 answers were cut where the base's learned positions end" in compared.notes[0]


def test_a_conversation_that_is_too_long_is_refused(learned):
    model, tokenizer = learned
    history = [{"role": "user", "content": "red"}]
    said = _answer(model, tokenizer, history, True, 128, "tuned", quiet=True)
    history += [{"role": "assistant", "content": said}, {"role": "user", "content": "green blue " * 10}]
    with pytest.raises(UserError, match=r"learned 40 positions.* Say /new"):
        _answer(model, tokenizer, history, True, 128, "tuned", quiet=True)


def test_answers_that_were_cut_are_told_from_those_that_ended(learned, monkeypatch):
    model, tokenizer = learned

    def write(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([[7, 2, 0], [7, 8, 9]])], dim=1)

    monkeypatch.setattr(model, "generate", write)
    answers = generate_answers(model, tokenizer, [[5], [6]], [2], EvaluationSection(max_new_tokens=3))
    assert [answer.cut_by for answer in answers] == [None, "max_new_tokens"]


@pytest.mark.parametrize("forced", [None, 2])
def test_cut_answers_of_a_decoder(forced, monkeypatch):
    """BART's decoder starts with the token that ends a text, and is made to write it where it is cut."""
    from transformers import BartConfig, BartForConditionalGeneration

    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": POSITIONS}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=320, **shape, **heads, **ids)).eval()
    model.generation_config.forced_eos_token_id = forced
    model.final_logits_bias[0, 2] = -1e4  # it never ends by itself
    section = EvaluationSection(max_new_tokens=6)
    assert [answer.cut_by for answer in write_answers(model, make_tokenizer(), [[5, 6, 2]], section)] == [
        "max_new_tokens"
    ]
    long = EvaluationSection(max_new_tokens=100)
    assert write_answers(model, make_tokenizer(), [[5, 6, 2]], long)[0].cut_by == "positions"
    written = torch.tensor([[2, 7, 2, 0, 0, 0, 0], [2, 7, 8, 9, 7, 8, forced or 9]])
    monkeypatch.setattr(model, "generate", lambda **_: written)
    answers = write_answers(model, make_tokenizer(), [[5], [6]], section)
    assert [answer.cut_by for answer in answers] == [None, "max_new_tokens"]


def test_references_that_cannot_be_written_are_counted(learned, tmp_path, monkeypatch):
    model, tokenizer = learned
    rows = [{"prompt": "how many", "completion": text} for text in ("two", "the battery is full now")]
    data, splits = prepare_test(rows, tokenizer, tmp_path)
    sizes = [len(tokenizer(row["completion"])["input_ids"]) for row in rows]
    monkeypatch.setattr("lora_ft.evaluation.compare.generate_answers", lambda *_: [Answer(""), Answer("")])
    found = []
    for limit in (min(sizes) - 1, min(sizes), max(sizes)):
        section = EvaluationSection(max_new_tokens=limit)
        compared = compare_models(model, tokenizer, splits.test, splits.examples("test"), data, section)
        found.append(compared.generation.num_long_references)
    assert found == [2, 1, 0], "the token that ends an answer is not counted"


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((158, 0, 0, 0), []),
        (
            (158, 12, 0, 9),
            [
                "12 of 158 answers were cut at max_new_tokens (128), and 9 references are longer:"
                " raise evaluation.max_new_tokens."
            ],
        ),
        ((158, 12, 0, 0), ["12 of 158 answers were cut at max_new_tokens (128), though no reference is longer."]),
        (
            (158, 0, 0, 9),
            ["9 of 158 references are longer than max_new_tokens (128): raise evaluation.max_new_tokens."],
        ),
    ],
)
def test_limits_are_said_in_a_sentence(counts, said):
    assert list(Generation(128, *counts).describe()) == said


def test_cuts_are_in_the_report():
    import numpy as np

    predictions = (Prediction("?", "a b", "", "a", "max_new_tokens", True), Prediction("?", "a", "", "a"))
    plain = sum_up(predictions, (np.ones((2, 3)),) * 2, EvaluationSection(max_new_tokens=1)).to_json()
    assert plain["generation"] == {
        "max_new_tokens": 1,
        "num_answers": 2,
        "num_cut": 1,
        "num_out_of_positions": 0,
        "num_long_references": 1,
    }
    assert plain["notes"] == (
        "1 of 2 answers were cut at max_new_tokens (1), and 1 reference is longer: raise evaluation.max_new_tokens.",
    )
