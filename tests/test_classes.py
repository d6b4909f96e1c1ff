"""Classes by id, by name and by WordNet id."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdance.data.class_names import ClassNames, imagenet, numbered
from bitdance.runtime.errors import UserError

KNOWN = {0: "tench", 134: "crane", 207: "golden retriever", 388: "giant panda", 517: "crane", 985: "daisy"}


def message(names: ClassNames, query: object) -> str:
    with pytest.raises(UserError) as caught:
        names.find(query)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed(text: str) -> list[int]:
    """The ids in a message about an ambiguous name."""
    return [int(i) for i in re.findall(r"(?:: |; )(\d+)", text)]


def test_imagenet_is_in_the_standard_order() -> None:
    names = imagenet()
    assert len(names) == 1000
    assert {i: names.label(i) for i in KNOWN} == KNOWN
    assert names.label(999) == "toilet tissue"
    assert names.wordnet_ids is not None and names.definitions is not None
    assert list(names.wordnet_ids) == sorted(set(names.wordnet_ids))
    assert "bird" in names.definitions[134] and "lift" in names.definitions[517]
    assert all(name == name.strip() and name for row in names.names for name in row)
    assert names.names[388] == ("giant panda", "panda", "panda bear", "coon bear", "Ailuropoda melanoleuca")
    assert names.find(np.int64(207)) == 207
    for index in (-1, 1000):
        with pytest.raises(UserError, match=f"class {index} does not exist: the model has classes 0 to 999"):
            names.label(index)


@pytest.mark.parametrize(
    "query",
    [207, "207", "207 ", " 207\n", "0207", "golden retriever", "Golden_Retriever", " GOLDEN-retriever ", "n02099601",
     "N02099601", "golden  retriever", "golden\u2010retriever", "golden\u00a0retriever", "ｇｏｌｄｅｎ retriever"],
)  # fmt: skip
def test_spellings_of_a_class(query: str | int) -> None:
    assert imagenet().find(query) == 207


def test_unique_synonyms() -> None:
    names = imagenet()
    assert names.find("Tinca tinca") == 0
    assert names.find("panda bear") == 388
    assert names.find("red panda") == 387
    assert names.find("judge’s robe") == names.find("judge's robe")
    assert names.find("tree-frog") == names.find("tree frog") == 31  # two names of one class are not ambiguous
    assert names.find("maillot, tank suit") == 639  # a whole row means its class, though "maillot" is two


@pytest.mark.parametrize("query", [1000, "1000", -1, "-1", " -1 ", "99999999999999999999"])
def test_id_out_of_range(query: str | int) -> None:
    text = message(imagenet(), query)
    assert text == f"class {int(query)} does not exist: the model has classes 0 to 999."


@pytest.mark.parametrize("query", ["9" * 10_000, 10**10_000, -(10**10_000), "-" + "1" * 5000], ids="abcd")
def test_huge_ids_are_refused_in_a_short_sentence(query: str | int) -> None:
    assert len(message(imagenet(), query)) < 150


@pytest.mark.parametrize("query", ["", " ", "\t", "-", "_ _", True, False, None, 207.0, b"207", np.bool_(True)])
def test_what_is_no_class(query: object) -> None:
    assert message(imagenet(), query).endswith("is not a class: give an id, a name or a WordNet id.")


@pytest.mark.parametrize(
    "query", ["²", "٢", "1e2", "+5", "0-9", "1，2", "金毛", "😀", "a\nb", "\udcff", "\0", "n00000000"]
)
def test_strange_strings_are_unknown_names(query: str) -> None:
    text = message(imagenet(), query)
    assert text.startswith(f"there is no class {query!r}: ")
    text.encode()  # can be printed
    with pytest.raises(UserError):
        imagenet().find_all([query])


def test_an_unknown_name_suggests_the_nearest() -> None:
    text = message(imagenet(), "goldn retriver")
    assert text.startswith("there is no class 'goldn retriver': did you mean golden retriever (207)")
    assert 1 <= len(re.findall(r"\(\d+\)", text)) <= 3
    assert "(0)" in message(imagenet(), "Tinca tinka")
    assert "crane (134), crane (517)" in message(imagenet(), "cranee")
    assert message(imagenet(), "qqqqqqqqq").endswith(": give a name or an id, 0 to 999.")
    assert "did you mean great grey owl" in message(imagenet(), "owl").replace("gray", "grey")  # whole words first
    names = ClassNames.from_labels(["long-named red apple of the north", "appla", "pineapple"])
    assert message(names, "apple").startswith("there is no class 'apple': did you mean long-named red apple")
    names = ClassNames.from_labels(["birds", "dogs (mine)"])
    assert message(names, "dog") == "there is no class 'dog': did you mean dogs (mine) (1)?"
    assert message(names, "cat") == "there is no class 'cat': give one of birds (0), dogs (mine) (1)."
    names = ClassNames.from_labels(["snapple", "appla"])  # a part of a word is not the word
    assert "did you mean snapple (0)" in message(names, "napple")


def test_an_ambiguous_name_lists_its_classes() -> None:
    crane = message(imagenet(), "Crane")
    assert crane.startswith("'Crane' means 2 classes, give the id of one: 134 (large long-necked wading bird")
    assert listed(crane) == [134, 517]
    crawfish = message(imagenet(), "crawfish")
    assert listed(crawfish) == [123, 124]
    assert "spiny lobster" in crawfish and "crawdad" in crawfish
    assert "lobster, crawfish" not in crawfish  # only its other names are listed
    for query, classes in (("missile", [657, 744]), ("maillot", [638, 639]), ("panda", [387, 388])):
        assert listed(message(imagenet(), query)) == classes  # a label does not hide another class of that name


def test_find_all() -> None:
    names = imagenet()
    assert names.find_all(["all"]) == names.find_all(["ALL "]) == list(range(1000))
    assert names.find_all(["207", "golden retriever", "n01440764"]) == [207, 207, 0]
    assert names.find_all(["207,daisy, tench,"]) == [207, 985, 0]
    assert names.find_all("daisy, 3") == [985, 3]
    assert names.find_all([1, 2]) == [1, 2]
    assert names.find_all([]) == []
    assert names.find_all(["maillot, tank suit", "tench, Tinca tinca"]) == [639, 0]
    for wrong in ["207,crane", ",", "", "1000", "daisy,nosuchname", "-1,2"]:
        with pytest.raises(UserError):
            names.find_all([wrong])
    names = ClassNames.from_labels(["red", "blue", "red, blue"])  # a label with a comma is not split
    assert names.find_all(["red, blue"]) == [2] and names.find_all(["red,blue"]) == [0, 1]
    with pytest.raises(UserError, match="means 2 classes, give the id of one: 1; 2"):
        ClassNames.from_labels(["a", "a,b", "A,b"]).find_all(["a,b"])


def test_labels_that_are_wordnet_ids_get_names() -> None:
    names = ClassNames.from_labels(["n02099601", "n02012849", "n01440764"])
    assert [names.label(i) for i in range(3)] == ["golden retriever", "crane", "tench"]
    assert names.wordnet_ids == ("n02099601", "n02012849", "n01440764")
    assert names.find("crane") == 1  # the machine is not one of these
    assert names.find("n01440764") == 2
    assert ClassNames.from_labels(imagenet().wordnet_ids or ()) == imagenet()
    for labels in (["n02099601", "cat"], ["n02099601", "n99999999"]):
        plain = ClassNames.from_labels(labels)
        assert plain.names == tuple((label,) for label in labels) and not plain.wordnet_ids
        assert plain.find(labels[1]) == 1
    names = ClassNames.from_labels(("airplane", "car"))
    assert len(names) == 2 and names.find("Airplane") == 0 and names.label(1) == "car"
    assert ClassNames.from_labels(["1", "0"]).find("1") == 1  # digits are an id
    with pytest.raises(UserError, match="at least one class"):
        ClassNames.from_labels([])


def test_numbered() -> None:
    names = numbered(10)
    assert len(names) == 10 and names.label(3) == "class 3"
    assert names.find("class 3") == names.find("Class_3") == names.find("3") == 3
    assert message(names, "golden retriever").endswith("class 8 (8), class 9 (9).")
    with pytest.raises(UserError):
        numbered(0)
    assert imagenet() is imagenet() and names == numbered(10) and hash(names) == hash(numbered(10))
    assert pickle.loads(pickle.dumps(names)) == names


@given(st.integers(0, 999), st.data())
def test_every_name_of_imagenet_leads_back(index: int, data: st.DataObject) -> None:
    names = imagenet()
    assert names.wordnet_ids is not None
    assert names.find(index) == names.find(str(index)) == names.find(names.wordnet_ids[index]) == index
    name = data.draw(st.sampled_from(names.names[index]))
    for query in (name, name.upper(), name.replace(" ", "_"), f" {name} "):
        try:
            assert names.find(query) == index
        except UserError as error:
            assert index in listed(str(error))


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6))
def test_every_label_leads_back(labels: list[str]) -> None:
    names = ClassNames.from_labels(labels)
    for i, label in enumerate(labels):
        assert names.label(i) == label and names.find(i) == names.find(f"{i}") == i
        try:
            assert labels[names.find(label)] == label or label.strip().lstrip("-").isdigit()
        except UserError as error:
            text = str(error)
            assert i in listed(text) or "is not a class" in text or "does not exist" in text


@given(st.text(max_size=12))
def test_any_text_is_a_class_or_a_one_line_error(query: str) -> None:
    names = numbered(5)
    try:
        assert 0 <= names.find(query) < 5
        assert all(0 <= i < 5 for i in names.find_all([query]))
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 300


def test_the_module_is_light() -> None:
    heavy = {"torch", "numpy", "difflib"}
    code = f"import sys, bitdance.data.class_names as c; c.imagenet(); print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
