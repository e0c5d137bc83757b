"""Tiny models of every architecture and adapters of every kind, tuned by noise instead of training."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    T5Config,
)

from lora_ft.export.save import save_adapter
from lora_ft.fingerprint import BaseIdentity, identify_base

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, pad_token_id=0),
    "llama_biased": LlamaConfig(**SHAPE, pad_token_id=0, attention_bias=True, mlp_bias=True),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1),
    "gemma": GemmaConfig(**SHAPE, head_dim=16),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, head_dim=16, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "gpt_oss": GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4),
    "t5": T5Config(vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TASKS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Case:
    """A kind of adapter on a kind of model."""

    model: str
    """Key of `CONFIGS`."""
    lora: dict[str, Any]
    """Fields of `peft.LoraConfig`, over r=4, lora_alpha=6."""
    task: str = "CAUSAL_LM"
    """PEFT's task type."""
    num_embeddings: int | None = None
    """Rows the embeddings are resized to before training."""
    untied: bool = False
    """Whether the merged model must have weights of its own where the base shares one."""


@dataclass(frozen=True)
class Tuned:
    """A saved adapter, the model it was saved from, and its base."""

    model: PeftModel
    """The live model, in evaluation mode."""
    base: BaseIdentity
    """Its base on disk."""
    adapter: Path
    """The saved adapter."""
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """A batch it can be run on."""

    def logits(self) -> torch.Tensor:
        """What the live model says."""
        with torch.no_grad():
            return self.model(**self.inputs).logits


ALL = {"target_modules": "all-linear"}
QUERY = {"target_modules": ["q_proj"]}
CASES = {
    "lora": Case("llama", ALL),
    "rslora": Case("llama", {**ALL, "use_rslora": True, "r": 6}),
    "patterns": Case(
        "llama",
        {**ALL, "rank_pattern": {"q_proj": 3, "layers.1.*down_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    ),
    "some_layers": Case("llama", {**QUERY, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "dora": Case("llama", {**ALL, "use_dora": True}),
    "lora_bias": Case("llama_biased", {**ALL, "lora_bias": True}),
    "bias_all": Case("llama_biased", {**ALL, "bias": "all"}),
    "bias_lora_only": Case("llama_biased", {**QUERY, "bias": "lora_only"}),
    "orthogonal": Case("llama", {**QUERY, "init_lora_weights": "orthogonal"}),
    "gpt2": Case("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2_dora": Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2_lora_bias": Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
    "gpt2_head": Case("gpt2", {"target_modules": ["c_attn", "lm_head"]}, untied=True),
    "gpt2_positions": Case("gpt2", {"target_modules": ["wte", "wpe"]}, untied=True),
    "embeddings": Case("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied_embeddings": Case("gemma", {"target_modules": ["q_proj", "embed_tokens"]}, untied=True),
    "tied_embeddings_dora": Case("gemma", {"target_modules": ["embed_tokens"], "use_dora": True}, untied=True),
    "tied_head": Case("gemma", {"target_modules": ["q_proj", "lm_head"]}, untied=True),
    "tied_both": Case("gemma", {"target_modules": ["lm_head", "embed_tokens"]}, untied=True),
    "kept_tied": Case("gemma", {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
    "saved_modules": Case("llama", {**QUERY, "modules_to_save": ["lm_head", "norm"]}),
    "saved_tied": Case("gemma", {**QUERY, "modules_to_save": ["embed_tokens"]}, untied=True),
    "saved_kept_tied": Case("gemma", {**QUERY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens": Case("llama", {**QUERY, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [5]}}),
    "tokens_tied": Case("gemma", {**QUERY, "trainable_token_indices": [3, 7]}),
    "tokens_and_head": Case(
        "gemma", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 7]}, untied=True
    ),
    "resized": Case("llama", QUERY, num_embeddings=330),
    "resized_saved": Case("llama", {**QUERY, "modules_to_save": ["lm_head", "embed_tokens"]}, num_embeddings=330),
    "resized_lora": Case("llama", {"target_modules": ["embed_tokens", "lm_head"]}, num_embeddings=330),
    "resized_tokens_tied": Case("gemma", {**QUERY, "trainable_token_indices": [320, 321]}, num_embeddings=330),
    "mixtral_experts": Case("mixtral", {**QUERY, "target_parameters": EXPERTS}),
    "qwen3_experts": Case("qwen3_moe", {**QUERY, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "gpt_oss_experts": Case("gpt_oss", {**QUERY, "target_parameters": EXPERTS}),
    "classifier": Case("llama", ALL, task="SEQ_CLS"),
    "classifier_dora": Case("llama", {**ALL, "use_dora": True}, task="SEQ_CLS"),
    "t5": Case("t5", {"target_modules": ["q", "v", "wo"]}, task="SEQ_2_SEQ_LM"),
    "t5_head": Case("t5", {"target_modules": ["q", "lm_head"]}, task="SEQ_2_SEQ_LM", untied=True),
}
"""Every kind of adapter that is merged."""


def make_base(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random model of `CONFIGS`, saved to `folder`."""
    torch.manual_seed(0)
    cls = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    cls.from_config(CONFIGS[name], dtype=dtype).save_pretrained(folder, **options)
    return folder


def add_adapter(model: PreTrainedModel, lora: dict[str, Any], task: str = "CAUSAL_LM", noise: float = 0.1) -> PeftModel:
    """`model` with a new adapter whose every trainable weight was moved a little, as training would."""
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": task, **lora}))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter += noise * torch.randn_like(parameter)
    return tuned.eval()


def make_tuned(case: Case, folder: Path, tokenizer: Any = None, **options: Any) -> Tuned:
    """Base and saved adapter of one case, with two prompts recorded."""
    base = make_base(case.model, folder / "base")
    labels = {"num_labels": 3} if case.task == "SEQ_CLS" else {}
    model = TASKS[case.task].from_pretrained(base, **labels, **options)
    if case.num_embeddings:
        model.resize_token_embeddings(case.num_embeddings, mean_resizing=False)
    tuned = add_adapter(model, case.lora, case.task)
    ids = torch.randint(2, 250, (2, 9))
    ids[0, :2] = torch.tensor([3, 7])
    if case.num_embeddings:
        ids[1, :2] = torch.tensor([320, 329])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if case.task == "SEQ_2_SEQ_LM" else {})}
    identity = identify_base(str(base), base)
    save_adapter(tuned, tokenizer, folder / "adapter", base=identity, samples=ids.tolist())
    return Tuned(tuned, identity, folder / "adapter", inputs)
