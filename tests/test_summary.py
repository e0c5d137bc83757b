"""What a run says to a person, with names of any kind."""

import io

from rich.console import Console

from lora_ft.summary import print_classes


def said(labels, confusion) -> str:
    stream = io.StringIO()
    splits = {"test": {"accuracy": 0.5, "num_rows": 4}}
    evaluation = {"labels": labels, "confusion": confusion, "splits": splits}
    print_classes(evaluation, Console(file=stream, width=80))
    return stream.getvalue()


def test_labels_that_look_like_markup_are_shown():
    text = said(["[spam]", "[/ham]"], [[1, 2], [0, 1]])
    assert "[spam]" in text and "[/ham]" in text


def test_of_many_classes_the_most_frequent_confusions_are_shown():
    labels = [f"class-{number}" for number in range(200)]
    confusion = [[0] * 200 for _ in labels]
    confusion[3][4], confusion[7][7], confusion[150][2] = 5, 90, 9
    lines = [line for line in said(labels, confusion).splitlines() if "class-" in line]
    assert [line.replace("│", " ").split() for line in lines] == [
        ["9", "class-150", "class-2"],
        ["5", "class-3", "class-4"],
    ]
