"""Loss, gradients and figures against the full logits of the model itself, cross-entropy in float32."""

import gc
from contextlib import nullcontext

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_ft.data.collate import Collator
from lora_ft.errors import UserError
from lora_ft.model import machine
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_base, load_tokenizer
from lora_ft.sections import ModelSection
from lora_ft.training import head
from lora_ft.training.loss import add_scoring, score_batch
from lora_ft.training.trainer import build_arguments, build_trainer

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUIET = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "logging_steps": 1, "seed": 7}
IN_ORDER = {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.5},
    "hyperclovax": {"logits_scaling": 3.0},
    "gpt_neox": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "output_router_logits": True,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},  # goes round its own backbone, to the decoder in it
}


def build_model(kind="llama", dtype=torch.float32, **settings):
    config = AutoConfig.for_model(kind.split()[0], **{**SHAPE, **KINDS[kind], **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that logits differ, and a wrong scale or cap shows
            parameter.data.normal_(0, 0.2)
    return model.requires_grad_(False)


def make_batch(layout="padded"):
    """Rows of 11, 7 and 9 tokens with the first four unsupervised, padded, or packed with restarting positions."""
    ids = [[(3 + row * 17 + place * 5) % 300 + 3 for place in range(length)] for row, length in enumerate((11, 7, 9))]
    rows = [{"input_ids": tokens, "labels": [-100] * 4 + tokens[4:]} for tokens in ids]
    if layout == "packed":
        rows = [{name: [x for row in rows for x in row[name]] for name in rows[0]} | {"seq_lengths": [11, 7, 9]}]
    return Collator(0)(rows)


def reference(model, batch):
    """Sum of the losses, tokens right, and tokens, from all the logits at once."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    loss = torch.nn.functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
    return loss, int((logits.argmax(-1) == targets)[chosen].sum()), int(chosen.sum())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare(model, batch, tolerance):
    """The scoring forward against `reference`: loss, every gradient, tokens right and counted."""
    add_scoring(model)
    scores = model(**batch, score=True)
    ours = gradients(model, scores.loss.sum())
    loss, num_correct, num_tokens = reference(model, batch)
    theirs = gradients(model, loss)
    assert scores.loss.sum().item() == pytest.approx(loss.item(), rel=tolerance)
    assert (int(scores.is_top1.sum()), scores.loss.numel()) == (num_correct, num_tokens)
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 10 * tolerance * gradient.norm(), name


def with_adapter(model, **lora):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", "init_lora_weights": False, **lora}))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_make_logits(kind):
    compare(with_adapter(build_model(kind)), make_batch(), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 20]},
    ],
    ids=["frozen head", "adapter on the head", "trained head", "trained tokens"],
)
@pytest.mark.parametrize("kind", ["llama", "llama tied"])
def test_heads_frozen_trained_and_tied(kind, lora, layout, dtype):
    """Failure mode 23: what is on the head trains."""
    if kind == "llama tied" and "modules_to_save" in lora:
        pytest.skip("PEFT unties a head that is trained whole")
    compare(
        with_adapter(build_model(kind, dtype), **lora), make_batch(layout), 1e-5 if dtype == torch.float32 else 8e-3
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("head_lora", [False, True])
def test_quantised_base(tiny_base, layout, head_lora):
    section = ModelSection(base=str(tiny_base), dtype="float32", attn_implementation="sdpa")
    base = load_base(find_base(section.base), section, {**NF4, "bnb_4bit_compute_dtype": "float32"})
    targets = ["q_proj", "down_proj", *(["lm_head"] if head_lora else [])]
    model = attach_adapter(base, {**LORA, "target_modules": targets, "init_lora_weights": False})
    compare(model, make_batch(layout), tolerance=1e-5)


def test_autocast_of_a_float32_base_computes_in_bfloat16():
    model, batch = with_adapter(build_model()), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, batch, tolerance=8e-3)


def test_chunks_and_blocks_change_nothing(monkeypatch):
    monkeypatch.setattr(head, "BLOCK_BYTES", 1)
    monkeypatch.setattr(machine, "NUM_LOGITS", 1)
    monkeypatch.setattr(machine, "FEWEST_LOGITS_ROWS", 2)
    monkeypatch.setattr(head, "choose_head_columns", lambda *_: 3)
    compare(with_adapter(build_model("gemma2")), make_batch(), tolerance=1e-5)
    compare(with_adapter(build_model(), target_modules=["lm_head"]), make_batch(), tolerance=1e-5)


def test_logits_are_never_whole(monkeypatch):
    """Failure mode 23: the largest tensor made while scoring 256 tokens is one chunk of 64."""
    monkeypatch.setattr(machine, "NUM_LOGITS", 1)
    monkeypatch.setattr(machine, "FEWEST_LOGITS_ROWS", 64)
    model = with_adapter(build_model(vocab_size=5000))
    ids = torch.arange(3, 260)[None]
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    add_scoring(model)
    with Watch():
        model(input_ids=ids, labels=ids, score=True).loss.sum().backward()
    assert max(sizes) <= 64 * 5000 < 256 * 5000


def test_entropy_only_when_asked_for():
    model, batch = with_adapter(build_model("gemma2")), make_batch()
    add_scoring(model)
    assert model(**batch, score=True).entropy is None
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    expected = torch.distributions.Categorical(logits=logits[batch["labels"][:, 1:] != -100]).entropy()
    assert torch.allclose(model(**batch, score=True, with_entropy=True).entropy, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoe", "mixtral"])
def test_experts_are_balanced_as_the_model_itself_does(kind):
    model, batch = build_model(kind), make_batch()
    add_scoring(model)
    assert torch.allclose(model(**batch, score=True).aux_loss, model(**batch).aux_loss)


def test_a_batch_without_supervised_tokens_has_zero_gradients():
    for lora in ({}, {"target_modules": ["lm_head"]}):
        model, batch = with_adapter(build_model(), **lora), make_batch()
        add_scoring(model)
        loss = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}, score=True).loss.sum()
        assert loss.item() == 0.0
        assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_an_unknown_scaling_of_logits_is_found_out():
    """A key nobody has heard of: the model's own logits are taken instead of a wrong loss."""
    model = build_model()
    model.lm_head.register_forward_hook(lambda module, inputs, out: out)  # the head stays as it is …
    forward = model.forward

    def scaled(*args, **kwargs):  # … and this architecture does something new with it
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.1
        return outputs

    model.forward = scaled
    compare(with_adapter(model), make_batch(), tolerance=1e-5)


def test_scoring_leaves_generation_and_plain_calls_alone():
    model, batch = build_model(), make_batch()
    before = model(**batch).loss
    add_scoring(model)
    add_scoring(model)
    assert torch.equal(model(**batch).loss, before)
    assert model.generate(batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_score_batch_needs_no_trainer():
    """A plain model and one with an adapter, from a notebook; no gradients are kept."""
    for model in (build_model(), with_adapter(build_model())):
        batch = make_batch("packed")
        with torch.no_grad():
            score = score_batch(model, batch)
            loss, num_correct, num_tokens = reference(model, batch)
        assert score.loss_sum == pytest.approx(loss.item(), rel=1e-5)
        assert (score.num_correct, score.num_tokens) == (num_correct, num_tokens)


# --- the trainer ---------------------------------------------------------------------------------------------------


def make_rows(count=24, column=None):
    rows = []
    for index in range(count):
        ids = [(3 + index * 7 + place * 5) % 300 + 3 for place in range(14 - index % 5)]
        rows.append({"input_ids": ids, "labels": [-100] * (2 + index % 4) + ids[2 + index % 4 :]})
        if column:
            rows[-1][column] = [5, len(ids) - 5]
    return datasets.Dataset.from_list(rows)


def make_trainer(tiny_base, folder, rows=None, validation=None, lora=None, **training):
    section = ModelSection(base=str(tiny_base), dtype="float32", attn_implementation="sdpa")
    base = find_base(section.base)
    model = attach_adapter(load_base(base, section), {**LORA, **(lora or {})})
    arguments = build_arguments({**QUIET, **IN_ORDER, **training}, folder)
    rows = make_rows() if rows is None else rows
    return build_trainer(model, load_tokenizer(base.folder, section), rows, validation, arguments, quiet=True)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("column", [None, "seq_lengths"], ids=["rows", "packed"])
@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["all-linear", "head"])
def test_the_split_of_a_batch_changes_nothing(tiny_base, tmp_path, lora, column):
    """Failure mode 19: 8 x 1, 1 x 8 and 2 x 4."""
    losses, accuracies = [], []
    for batch, accumulation in [(8, 1), (1, 8), (2, 4)]:
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tiny_base, tmp_path, make_rows(column=column), lora=lora, learning_rate=1e-2, **split)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        accuracies.append(logged(trainer, "mean_token_accuracy"))
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert accuracies[0] == accuracies[1] == accuracies[2]


def test_joined_rows_train_as_padded_ones_do(tiny_base, tmp_path):
    losses = []
    for joined in (True, False):
        trainer = make_trainer(tiny_base, tmp_path, per_device_train_batch_size=8, learning_rate=1e-2)
        if not joined:
            trainer.data_collator = Collator(0)
        assert ("attention_mask" in trainer.data_collator([trainer.train_dataset[0]])) is not joined
        trainer.train()
        losses.append([*logged(trainer, "loss"), *logged(trainer, "num_tokens")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_noise_on_embeddings_does_not_shrink_with_the_rows_of_a_batch(tiny_base, tmp_path):
    """NEFTune divides it by the root of a batch's width, which joining rows would make many times as large."""
    batches = [
        make_trainer(tiny_base, tmp_path, per_device_train_batch_size=8, **noise).data_collator(list(make_rows(8)))
        for noise in ({}, {"neftune_noise_alpha": 5.0})
    ]
    assert [len(batch["input_ids"]) for batch in batches] == [1, 8]


def test_experts_that_nothing_balances_are_refused(tmp_path):
    """Doge has a function of its own kind; by default TRL would balance with a share of 0.001."""
    from tests.conftest import make_tokenizer

    config = AutoConfig.for_model("doge", **SHAPE, is_moe=True, num_experts=16, num_experts_per_tok=2, head_dim=16)
    options = {"target_modules": ["q_proj"]}
    for coefficient, is_refused in ((None, True), (0.0, False)):
        model = attach_adapter(AutoModelForCausalLM.from_config(config).requires_grad_(False), {**LORA, **options})
        arguments = build_arguments({**QUIET, "router_aux_loss_coef": coefficient}, tmp_path)
        refused = pytest.raises(UserError, match="router_aux_loss_coef") if is_refused else nullcontext()
        with refused:
            build_trainer(model, make_tokenizer(), make_rows(), None, arguments, quiet=True)


def test_figures_are_means_over_tokens(tiny_base, tmp_path):
    """Failure mode 20: over the logging window, and over the whole of a validation set in batches of any size."""
    trainer = make_trainer(
        tiny_base, tmp_path, validation=make_rows(7), logging_steps=3, per_device_train_batch_size=8, learning_rate=1e-9
    )
    trainer.train()
    model = trainer.model.eval()
    batches = [Collator(0)([trainer.train_dataset[i] for i in range(24)]), Collator(0)(list(trainer.eval_dataset))]
    scores = [score_batch(model, batch) for batch in batches]
    assert logged(trainer, "mean_token_accuracy") == pytest.approx([scores[0].num_correct / scores[0].num_tokens])
    assert logged(trainer, "num_tokens") == [int(batches[0]["attention_mask"].sum())]
    for size in (2, 7):
        trainer.args.per_device_eval_batch_size = size
        figures = trainer.evaluate()
        assert figures["eval_loss"] == pytest.approx(scores[1].loss_sum / scores[1].num_tokens, rel=1e-5)
        assert figures["eval_mean_token_accuracy"] == scores[1].num_correct / scores[1].num_tokens
        assert "eval_entropy" not in figures


def test_the_token_counter_continues_after_a_resume(tiny_base, tmp_path):
    """Failure mode 20."""
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 3}
    whole = make_trainer(tiny_base, tmp_path, **options)
    whole.train()
    again = make_trainer(tiny_base, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(again, "num_tokens")[-1] == logged(whole, "num_tokens")[-1]


def test_memory_of_evaluation_does_not_grow_with_its_rows(tiny_base, tmp_path, monkeypatch):
    """Failure mode 22: nothing of a batch is kept after it."""
    trainer = make_trainer(tiny_base, tmp_path, validation=make_rows(12), per_device_eval_batch_size=2)
    alive, step = [], trainer.prediction_step

    def count(*args, **kwargs):
        alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "prediction_step", count)
    trainer.evaluate()
    assert len(alive) == 6 and alive[-1] - alive[2] < 500


def test_dft_weighs_tokens_by_their_probability(tiny_base, tmp_path):
    trainer = make_trainer(tiny_base, tmp_path, loss_type="dft", per_device_train_batch_size=24)
    batch = trainer.data_collator(list(trainer.train_dataset))
    add_scoring(trainer.model)
    nll = trainer.model(**batch, score=True).loss
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(
        (nll * (-nll).exp()).mean().item(), rel=1e-5
    )


def test_label_smoothing_is_refused(tiny_base, tmp_path):
    with pytest.raises(UserError, match="label_smoothing_factor"):
        make_trainer(tiny_base, tmp_path, label_smoothing_factor=0.1)


def test_layers_that_carry_a_state_along_the_row_are_found_out():
    """Failure mode 14."""
    from lora_ft.training.attention import keeps_documents_apart

    config = AutoConfig.for_model("lfm2", **{**SHAPE, "layer_types": ["conv", "full_attention"]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not keeps_documents_apart(model) and keeps_documents_apart(build_model())
