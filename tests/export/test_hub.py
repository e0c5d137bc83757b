"""Publishing with the real client against a Hub on this machine: what goes, what does not, and what failures leave."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import running_hub
from safetensors.torch import load_file, save_file
from tiny_models import CASES, make_tuned
from transformers import AutoTokenizer

from lora_ft.errors import RunFailed, UserError
from lora_ft.export import hub as hub_room
from lora_ft.export.hub import push_folder
from lora_ft.export.merge import merge_adapter
from lora_ft.export.save import save_adapter
from lora_ft.export.upload import collect_adapter, collect_merged
from lora_ft.export.verify import verify_folder

NAME = "org/tuned"
BASE_ID = "org/base"


@pytest.fixture
def hub(monkeypatch):
    """A Hub, and a client that talks to it: the endpoint and offline mode are read from these constants per request."""
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield found


@pytest.fixture
def merged(plain, tmp_path):
    """A merged folder."""
    merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    return tmp_path / "merged"


def test_an_adapter_goes_to_a_private_repository_in_one_commit(hub, copied):
    report = push_folder(copied, NAME, base_id=BASE_ID)
    repository = hub.repositories[NAME]
    assert repository.private
    assert report.private
    assert len(repository.commits) == 2, "the empty repository's, and ours"
    assert report.commit == repository.commits[-1]
    assert report.url == f"{hub.url}/{NAME}"
    assert set(repository.files) == {path.name for path in copied.iterdir()}
    assert repository.files["adapter_model.safetensors"] == (copied / "adapter_model.safetensors").read_bytes()


def test_only_files_on_the_list_go(hub, copied):
    """Failure mode 48: a planted .env and training data went along."""
    planted = {
        ".env": "PASSWORD=x",
        "train.jsonl": "{}",
        "training_args.bin": "pickle",
        "optimizer.pt": "x",
        "adapter_model.bin": "pickle",
        "notes.md": "private",
        "evil.py": "import os",
        "sub/config.json": "{}",
    }
    for name, text in planted.items():
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text(text)
    (copied / "LICENSE").symlink_to("/etc/passwd")
    report = push_folder(copied, NAME, base_id=BASE_ID)
    assert not set(hub.repositories[NAME].files) & {*planted, "LICENSE"}
    assert set(report.left_out) == {*planted, "LICENSE"}


def test_what_arrives_names_the_public_base_and_verifies(hub, plain, copied, tmp_path):
    push_folder(copied, NAME, base_id=BASE_ID)
    download = tmp_path / "download"
    download.mkdir()
    for name, content in hub.repositories[NAME].files.items():
        (download / name).write_bytes(content)
        assert str(plain.base.folder).encode() not in content, "no way on the trainer's machine in any file"
    assert json.loads((download / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_ID
    assert verify_folder(download, quick=True, base=str(plain.base.folder)).ok
    card = (download / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\nbase_model_relation: adapter\n")
    assert 'PeftModel.from_pretrained(model, "org/tuned")' in card
    assert "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules tuned=org/tuned" in card


def test_a_merged_model_goes_with_its_report(hub, merged):
    (merged / "consolidated.safetensors").write_bytes(b"x")
    report = push_folder(merged, NAME, merged=True, base_id=BASE_ID, license="apache-2.0")
    files = hub.repositories[NAME].files
    assert {"model.safetensors", "config.json", "merge_report.json", "Modelfile", "tokenizer.json"} <= set(files)
    assert report.left_out == ("consolidated.safetensors",)
    assert json.loads(files["merge_report.json"])["base"] == BASE_ID
    assert b"license: apache-2.0" in files["README.md"]


def test_of_a_run_the_adapter_goes_or_the_merged_model(hub, plain, merged):
    run = merged.parent
    (run / "adapter").symlink_to(plain.adapter)
    push_folder(run, NAME, base_id=BASE_ID)
    push_folder(run, "org/merged", merged=True, base_id=BASE_ID)
    assert "adapter_config.json" in hub.repositories[NAME].files
    assert "model.safetensors" in hub.repositories["org/merged"].files


def test_a_base_on_this_machine_must_be_declared(hub, copied):
    with pytest.raises(UserError, match="known by a name on this machine only"):
        push_folder(copied, NAME)
    assert hub.requests == []


def test_what_does_not_verify_is_not_published(hub, copied):
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="must verify"):
        push_folder(copied, NAME, base_id=BASE_ID)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf_" + "a" * 34, "API_KEY"),
        ("-----BEGIN RSA PRIVATE KEY-----\nx\n-----END RSA PRIVATE KEY-----", "PRIVATE_KEY"),
        ("correct-horse-battery", r"\$SERVICE_PASSWORD"),
    ],
    ids=["token", "private key", "value of a variable"],
)
def test_a_secret_in_any_file_stops_the_push_and_is_not_repeated(hub, copied, monkeypatch, text, kind):
    monkeypatch.setenv("SERVICE_PASSWORD", "correct-horse-battery")
    (copied / "LICENSE").write_text(f"Free. {text}")
    with pytest.raises(UserError, match=f"LICENSE: .*{kind}") as refused:
        push_folder(copied, NAME, base_id=BASE_ID)
    assert text not in str(refused.value)
    assert hub.requests == []


def test_a_public_repository_is_not_pushed_to_by_accident(hub, copied):
    push_folder(copied, NAME, base_id=BASE_ID, public=True)
    assert not hub.repositories[NAME].private
    with pytest.raises(UserError, match="public already"):
        push_folder(copied, NAME, base_id=BASE_ID)


def test_the_same_again_changes_nothing(hub, copied):
    first = push_folder(copied, NAME, base_id=BASE_ID)
    again = push_folder(copied, NAME, base_id=BASE_ID)
    assert again.already_there
    assert again.commit == first.commit
    assert len(hub.repositories[NAME].commits) == 2


def test_weights_of_an_earlier_push_are_replaced_not_mixed(hub, merged):
    push_folder(merged, NAME, merged=True, base_id=BASE_ID)
    stale = hub.repositories[NAME].files
    stale["model-00001-of-00002.safetensors"] = b"old"
    stale["model.safetensors.index.json"] = b"{}"
    stale["my-notes.md"] = b"kept"
    push_folder(merged, NAME, merged=True, base_id=BASE_ID)
    files = hub.repositories[NAME].files
    assert "model-00001-of-00002.safetensors" not in files
    assert "model.safetensors.index.json" not in files
    assert files["my-notes.md"] == b"kept"


STEPS = {
    "create": r"POST /api/repos/create",
    "look": r"GET /api/models/org/tuned",
    "card": r"POST /api/validate-yaml",
    "preupload": r"POST .*/preupload/main",
    "batch": r"POST .*objects/batch",
    "upload": r"PUT /lfs/.*",
    "commit": r"POST .*/commit/main",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", [429, 500, None], ids=["429", "500", "cut"])
def test_a_failure_that_passes_is_passed_over(hub, copied, step, state):
    hub.fail(STEPS[step], state, times=2)
    push_folder(copied, NAME, base_id=BASE_ID)
    repository = hub.repositories[NAME]
    assert len(repository.commits) == 2
    assert set(repository.files) == {path.name for path in copied.iterdir()}


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_that_stays_leaves_nothing_half_published(hub, copied, step):
    hub.fail(STEPS[step], 500, times=1000)
    with pytest.raises(RunFailed, match="Nothing was published"):
        push_folder(copied, NAME, base_id=BASE_ID)
    assert all(repository.files == {} for repository in hub.repositories.values())
    hub.failures.clear()
    push_folder(copied, NAME, base_id=BASE_ID)
    assert set(hub.repositories[NAME].files) == {path.name for path in copied.iterdir()}


def test_what_was_uploaded_is_not_sent_twice(hub, copied):
    hub.fail(STEPS["commit"], 500, times=1000)
    with pytest.raises(RunFailed):
        push_folder(copied, NAME, base_id=BASE_ID)
    hub.failures.clear()
    hub.requests.clear()
    push_folder(copied, NAME, base_id=BASE_ID)
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, copied):
    hub.fail(STEPS["commit"], None, after=True)
    report = push_folder(copied, NAME, base_id=BASE_ID)
    assert report.already_there
    assert len(hub.repositories[NAME].commits) == 2


def test_somebody_elses_commit_in_between_is_kept(hub, copied, monkeypatch):
    """409 and 412: we look again, and commit on top of what is there now."""
    missing = hub_room.missing_operations

    def meanwhile(upload, there):
        repository = hub.repositories[NAME]
        if len(repository.commits) == 1:
            repository.commits.append("1" * 40)
            repository.files["their.md"] = b"theirs"
        return missing(upload, there)

    monkeypatch.setattr(hub_room, "missing_operations", meanwhile)
    push_folder(copied, NAME, base_id=BASE_ID)
    assert hub.repositories[NAME].files["their.md"] == b"theirs"
    assert len(hub.repositories[NAME].commits) == 3


@pytest.mark.parametrize(("token", "advice"), [("hf_wrong", "not valid"), ("hf_reader", "may not write")])
def test_a_token_that_may_not_is_refused_without_retries(hub, copied, monkeypatch, token, advice):
    """Failure mode 48: 401 and 403 end non-zero."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=advice) as refused:
        push_folder(copied, NAME, base_id=BASE_ID)
    assert refused.value.exit_code == 2
    assert token not in str(refused.value)
    assert len(hub.requests) <= 2


def test_files_that_the_hub_drops_are_noticed(hub, copied):
    """A .gitignore in the repository makes the Hub drop files without a word."""
    push_folder(copied, NAME, base_id=BASE_ID)
    repository = hub.repositories[NAME]
    repository.ignored = ("adapter_model.safetensors",)
    del repository.files["adapter_model.safetensors"]
    with pytest.raises(RunFailed, match=r"does not hold adapter_model\.safetensors"):
        push_folder(copied, NAME, base_id=BASE_ID)


@pytest.mark.parametrize("name", ["tuned", "org/tuned/x", "org/ tuned"])
def test_a_repository_is_named_in_two_parts(hub, copied, name):
    with pytest.raises(UserError, match="ORG/NAME"):
        push_folder(copied, name, base_id=BASE_ID)


def test_without_a_token_nothing_is_sent(hub, copied, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="token with write access"):
        push_folder(copied, NAME, base_id=BASE_ID)
    assert hub.requests == []


def test_in_a_process_of_its_own_the_token_shows_nowhere(hub, copied, tmp_path):
    """The client reads endpoint and token from the environment; neither output nor files have the token."""
    code = (
        "import sys; from pathlib import Path; from lora_ft.export.hub import push_folder;"
        f"print(push_folder(Path(sys.argv[1]), '{NAME}', base_id='{BASE_ID}'))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_VERBOSITY": "debug", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(copied)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "already_there=False" in result.stdout
    assert "hf_writer" not in result.stdout + result.stderr
    written = [path for folder in (tmp_path, copied) for path in Path(folder).rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_writer" in path.read_bytes()]
    assert not [content for content in hub.repositories[NAME].files.values() if b"hf_writer" in content]


def cut_into(folder, names):
    """The weights of a model spread over files of these names."""
    weights = sorted(load_file(folder / "model.safetensors").items())
    share = -(-len(weights) // len(names))
    files = {name: dict(weights[index * share : (index + 1) * share]) for index, name in enumerate(names)}
    for name, part in files.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {key: name for name, part in files.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_go_by_whatever_name_the_index_gives_them(plain, tmp_path):
    """A merged model keeps the names of its base's files, which need not be those that transformers writes."""
    base = shutil.copytree(plain.base.folder, tmp_path / "base")
    names = [f"model-0000{number}-of-000002[1].safetensors" for number in (1, 2)]
    cut_into(base, names)
    merge_adapter(plain.adapter, tmp_path / "merged", base=str(base), prove=False)
    assert set(names) <= set(collect_merged(tmp_path / "merged", NAME, BASE_ID, None).files)
    (tmp_path / "merged" / names[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is missing"):
        collect_merged(tmp_path / "merged", NAME, BASE_ID, None)
    (tmp_path / "merged" / names[1]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link is not followed"):
        collect_merged(tmp_path / "merged", NAME, BASE_ID, None)


def test_weights_that_are_a_link_are_not_left_out_silently(hub, copied, tmp_path):
    (copied / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (copied / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link is not followed"):
        push_folder(copied, NAME, base_id=BASE_ID)
    assert hub.requests == []


def test_no_row_is_published_as_token_ids(hub, plain, tmp_path):
    """The samples' prompts are rows of the user's: they stay here, and what arrives verifies without them."""
    run = tmp_path / "run"
    shutil.copytree(plain.adapter, run / "adapter")
    merge_adapter(run / "adapter", run / "merged")
    for merged, record in ((False, "lora_ft.json"), (True, "merge_report.json")):
        name = "org/merged" if merged else NAME
        push_folder(run, name, merged=merged, base_id=BASE_ID)
        download = tmp_path / record
        download.mkdir()
        for file, content in hub.repositories[name].files.items():
            (download / file).write_bytes(content)
        assert json.loads((download / record).read_text())["samples"] == []
        report = verify_folder(download, base=str(plain.base.folder))
        assert report.ok and report.findings[-1].detail == "none recorded" and not report.findings[-1].is_checked
        local = run / ("merged" if merged else "adapter")
        assert json.loads((local / record).read_text())["samples"], "what lies here can still be asked"


def test_named_templates_arrive(plain, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(plain.adapter)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}" + tokenizer.chat_template}
    save_adapter(plain.model, tokenizer, tmp_path / "adapter", base=plain.base)
    (tmp_path / "adapter" / "additional_chat_templates" / "deeper").mkdir()
    (tmp_path / "adapter" / "additional_chat_templates" / "deeper" / "x.jinja").write_text("private")
    upload = collect_adapter(tmp_path / "adapter", NAME, BASE_ID, None)
    assert upload.left_out == ("additional_chat_templates/deeper/x.jinja",)
    for name, content in upload.files.items():
        target = tmp_path / "download" / name
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert verify_folder(tmp_path / "download", quick=True, base=str(plain.base.folder)).ok
    assert set(AutoTokenizer.from_pretrained(tmp_path / "download").chat_template) == {"default", "tool_use"}


def test_the_card_of_another_tools_classifier_loads_a_classifier(tmp_path):
    tuned = make_tuned(CASES["classifier"], tmp_path)
    (tuned.adapter / "lora_ft.json").unlink()
    card = collect_adapter(tuned.adapter, NAME, BASE_ID, None).files["README.md"].decode()
    assert "pipeline_tag: text-classification" in card
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=3)' in card
