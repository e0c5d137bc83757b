"""A conversation in the terminal with a tuned model, and with its base beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError


def chat(
    folder: Path, *, with_base: bool, max_new_tokens: int, trust_remote_code: bool = False, quiet: bool = False
) -> list[dict[str, str]]:
    """Reads lines from stdin and answers each, as it is written unless `quiet`; returns what was said, turn by turn.

    `/new` forgets what was said, `/quit` or the end of input leaves.

    Raises:
        UserError: `folder` is no run, adapter or merged model, or its tokenizer has no chat template; or a conversation
            is longer than the base can read.
    """
    model, tokenizer, has_adapter = _load(folder, trust_remote_code)
    if tokenizer.chat_template is None:
        rule = "Its tokenizer has no chat template, so there is no way to put a question."
        raise UserError(str(folder), None, rule, "Train with data.chat_template.")
    if with_base and not has_adapter:
        raise UserError(str(folder), "--base", "A merged model has no base apart.", "Name the run or its adapter.")
    speakers = {"base": False, "tuned": True} if with_base else {"tuned": True}
    histories: dict[str, list[dict[str, str]]] = {name: [] for name in speakers}
    said: list[dict[str, str]] = []
    if not quiet:
        print("Ask something; /new starts over, /quit leaves.")
    for line in _read_lines(quiet):
        if line == "/new":
            histories = {name: [] for name in speakers}
            continue
        turn = {"user": line}
        for name, adapter_on in speakers.items():
            histories[name].append({"role": "user", "content": line})
            turn[name] = _answer(model, tokenizer, histories[name], adapter_on, max_new_tokens, name, quiet)
            histories[name].append({"role": "assistant", "content": turn[name]})
        said.append(turn)
    return said


def _load(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Any, bool]:
    """Model and tokenizer, and whether the model carries an adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from lora_ft.export.adapter import CONFIG_NAME, find_adapter, open_adapter, refuse_changed, unfinished_run
    from lora_ft.export.base import base_of_adapter
    from lora_ft.export.companions import GENERATION_NAME
    from lora_ft.export.reload import load_tuned
    from lora_ft.model.machine import place_untrained

    adapter = find_adapter(folder)
    if (adapter / CONFIG_NAME).is_file():
        opened = open_adapter(adapter, trust_remote_code)
        refuse_changed(adapter)
        if opened.config.task_type not in (None, "CAUSAL_LM"):
            rule = "It was trained for another task than to go on with a conversation."
            raise UserError(str(adapter), opened.config.task_type, rule, "Use transformers.pipeline on merged/.")
        if opened.manifest is None:
            raise UserError(str(adapter), None, "Another tool saved this adapter.", "Merge it first: lora-ft merge")
        model = load_tuned(opened, base_of_adapter(opened), opened.manifest.arithmetic)
        if (adapter / GENERATION_NAME).is_file():
            model.get_base_model().generation_config = GenerationConfig.from_pretrained(adapter)  # stops as in training
        return model, AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code), True
    if (folder / "run.json").is_file():
        raise unfinished_run(folder)
    if not (folder / "config.json").is_file():
        raise UserError(str(folder), None, "This is no run, adapter or merged model.", "Name one of these.")
    trust = {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=place_untrained(), **trust)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **trust), False


def _read_lines(quiet: bool) -> Iterator[str]:
    """What the user says, line by line, until `/quit` or the end of input; empty lines are skipped.

    Raises:
        UserError: a line is not UTF-8.
    """
    while True:
        try:
            line = input("" if quiet else "\nyou    ").strip()
            line.encode()  # or undecodable bytes would pass, where Python lets them through (PYTHONUTF8)
        except EOFError:
            return
        except UnicodeError as error:
            rule = f"What is said must be UTF-8 ({error})."
            raise UserError("stdin", None, rule, "Convert it: iconv -f latin1 -t utf-8, say.") from None
        if line == "/quit":
            return
        if line:
            yield line


def _answer(
    model: Any,
    tokenizer: Any,
    history: list[dict[str, str]],
    adapter_on: bool,
    max_new_tokens: int,
    speaker: str,
    quiet: bool,
) -> str:
    import torch
    from transformers import TextStreamer

    from lora_ft.evaluation.compare import limit_answer
    from lora_ft.model.profile import count_positions

    inputs = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    width, positions = inputs["input_ids"].shape[1], count_positions(model)
    limit = limit_answer(max_new_tokens, positions, width)
    if limit < 1:
        rule = f"The base learned {positions} positions, which leaves no room for an answer."
        raise UserError("stdin", f"a conversation of {width} tokens", rule, "Say /new to start over, or say less.")
    streamer = None if quiet else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not quiet:
        print(f"{speaker:6} ", end="", flush=True)
    with torch.no_grad(), contextlib.nullcontext() if adapter_on else model.disable_adapter():
        written = model.generate(
            **inputs,
            max_new_tokens=limit,
            do_sample=False,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(written[0, width:], skip_special_tokens=True)).strip()
