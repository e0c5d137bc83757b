"""Gives the readers of recipes and data what nobody should write, and checks that they say so in a sentence.

    python scripts/fuzz.py --cases 100000

A recipe or a data file becomes values or one `UserError`; anything else, a case of more than ten seconds, or memory
beyond a gigabyte is a fault. Cases are drawn by hypothesis from a fixed seed, so they are the same each time.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lora_ft.data.sources import Usage, find_source, read_examples
from lora_ft.errors import Fault, UserError
from lora_ft.recipe import dump_recipe, load_recipe
from lora_ft.sections import SourceSection

MAX_SECONDS, MAX_BYTES = 10.0, 2**30

RECIPE: dict[str, Any] = {
    "output_dir": "run",
    "model": {"base": "builtin:wren", "dtype": "float32"},
    "quantization": {"load_in_4bit": True},
    "lora": {"r": 4, "target_modules": "all-linear"},
    "data": {"sources": [{"path": "builtin:halden/train.jsonl"}], "split": {"test": 0.1}, "max_length": 64},
    "training": {"learning_rate": 1e-3, "max_steps": 3, "eval_strategy": "no"},
    "guards": {"skip_non_finite": 1},
    "evaluation": {"generate": 2},
    "export": {"merge": True},
}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS: list[dict[str, Any]] = [
    {"messages": MESSAGES},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": "a", "completion": "b"},
    {"question": "a", "answer": "b", "context": "c"},
    {"text": "a", "label": "b"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "tools": [{"name": "f"}]},
]
NASTY = [
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"\n", b"\r", b"\t"),
    *(bytes([byte]) for byte in b"\"'\\,:-{}[]&*"),
    *(b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system", b"!!binary x", b"---", b"...", b"? ", b"| "),
    *(b"%YAML 9", b"null", b"~", b".nan", b"-.inf", b"1e999", b"NaN", b"1" * 5000, b"2001-13-45", b"0o9", b"1:2:3"),
    *(b"[" * 400, b'{"a":' * 3000, b"- " * 2000, b"x" * 70_000),
]
"""Pieces that readers stumble over."""
SUFFIXES = [".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".csv.xz"]
KEYS = ["training.seed", "data.sources.0.path", "data.sources.9", "lora", "", "²", "a.b.c"]
WORDS = ["[" * 400, "1" * 5000, "{a: "]

scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["loss", "auto", "../x", ""]),
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def bent(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with pieces put in, taken out and doubled."""
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(whole))), draw(st.integers(0, 12))
        piece = draw(st.sampled_from(NASTY) | st.binary(max_size=4) | st.just(whole[place : place + length]))
        whole = whole[:place] + piece + whole[place + draw(st.sampled_from([0, length])) :]
    return whole


@st.composite
def replaced(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts, keys among them, made another."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {**value, draw(st.text(max_size=6)): draw(values)}
        return {**value, key: draw(replaced(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(replaced(value[index])), *value[index + 1 :]]
    return draw(values)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """The text of a recipe, and overrides."""
    value = draw(st.just(RECIPE) | replaced(RECIPE))
    whole = yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    text = draw(st.just(whole) | bent(whole) | st.binary(max_size=60))
    keys, words = (st.sampled_from(some) | st.text(max_size=9) for some in (KEYS, WORDS))
    override = st.tuples(keys, st.sampled_from(["=", "", "=="]), words)
    return text, ["".join(draw(override)) for _ in range(draw(st.integers(0, 2)))]


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's suffix and bytes."""
    suffix = draw(st.sampled_from(SUFFIXES))
    rows = [draw(replaced(draw(st.sampled_from(ROWS)))) for _ in range(draw(st.integers(1, 3)))]
    if "csv" in suffix or "tsv" in suffix:
        mark = "," if "csv" in suffix else "\t"
        whole = "\n".join([mark.join(["text", "label"]), *(mark.join(["a", json.dumps(row)]) for row in rows)])
    elif suffix == ".json":
        whole = json.dumps(rows, indent=draw(st.sampled_from([None, 1])))
    else:
        whole = "\n".join(map(json.dumps, rows))
    encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-16", "utf-8-sig", "latin-1"]))
    raw = whole.encode(encoding, "replace")
    return suffix, draw(st.just(raw) | bent(raw) | st.binary(max_size=60))


class Seen:
    """What became of the cases."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest_seconds = 0.0

    def time(self, started: float) -> None:
        """Takes in how long a case took."""
        seconds = time.perf_counter() - started
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        assert seconds < MAX_SECONDS, f"{seconds:.0f} s"


def read_recipe(folder: Path, seen: Seen, text: bytes, overrides: list[str]) -> None:
    """Reads a recipe; one that is accepted reads back from what would be stored."""
    path, started = folder / "recipe.yaml", time.perf_counter()
    path.write_bytes(text)
    try:
        recipe = load_recipe(path, overrides)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        load_recipe(path)
        seen.counts["recipes accepted"] += 1
    except UserError as error:
        assert error.faults and all(fault.rule for fault in error.faults)
        seen.counts["recipes refused"] += 1
    seen.time(started)


def read_data(folder: Path, seen: Seen, suffix: str, raw: bytes) -> None:
    """Reads a data file to its end, each row as an Example or a Fault."""
    path, started = folder / f"rows{suffix}", time.perf_counter()
    path.write_bytes(raw)
    try:
        source = find_source(SourceSection(str(path)))
        for found in read_examples(source, "auto", True, Usage()):
            seen.counts["rows at fault" if isinstance(found, Fault) else "rows read"] += 1
            str(found) if isinstance(found, Fault) else found.to_json()
        seen.counts["files read"] += 1
    except UserError as error:
        assert error.faults and all(fault.rule for fault in error.faults)
        seen.counts["files refused"] += 1
    seen.time(started)


def fuzz(num_cases: int, first_seed: int = 0) -> Seen:
    """Half of the cases on recipes, half on data files; raises at the first that is not as it should be."""
    seen = Seen()
    options = settings(
        max_examples=max(1, num_cases // 2),
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        folder = Path(name)

        @options
        @seed(first_seed)
        @given(recipes())
        def on_recipes(case: tuple[bytes, list[str]]) -> None:
            read_recipe(folder, seen, *case)

        @options
        @seed(first_seed)
        @given(data_files())
        def on_data(case: tuple[str, bytes]) -> None:
            read_data(folder, seen, *case)

        on_recipes()
        on_data()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first thousand; each thousand has its own")
    options = parser.parse_args()
    started, counts, slowest = time.monotonic(), Counter[str](), 0.0
    for block in range(0, options.cases, 1000):  # hypothesis remembers its cases, and a block is forgotten
        seen = fuzz(min(1000, options.cases - block), options.seed + block)
        counts += seen.counts
        slowest = max(slowest, seen.slowest_seconds)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak_bytes < MAX_BYTES, f"{peak_bytes / 2**30:.1f} GiB of memory"
    figures = {**counts, "slowest_seconds": round(slowest, 2), "peak_mib": peak_bytes >> 20}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
