"""The report says what the run's files say, needs nothing from outside, and survives whatever is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folder import history, metrics, norms, save, write_run

from flatwater.errors import DataError
from flatwater.recipes.ocr.report import compare, write
from flatwater.recipes.ocr.results import History, Metrics, Sample, load
from flatwater.recipes.ocr.results import save as save_record

FILES = [
    "metrics.json",
    "history.json",
    "norms.json",
    "fold.json",
    "verification.json",
    "samples/samples.json",
    "config.yaml",
]


VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The page's text and addresses; checks that tags close as they opened."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset") and value]
        self.ids += [values["id"]] if values.get("id") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a <run>", layers=2)


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    path = write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_it_is_one_page_that_needs_nothing(page: Page, folder: Path) -> None:
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", source)
    # xmlns declarations name a namespace; nothing is fetched from there.
    assert set(re.findall(r'\S*="?https?://[^" ]+', source)) <= {
        'xmlns="http://www.w3.org/2000/svg',
        'xmlns:xlink="http://www.w3.org/1999/xlink',
    }
    assert "default-src 'none'" in source


def test_it_says_what_the_files_say(page: Page) -> None:
    for words in (
        "98.12%",  # rounded down
        "93.43%",
        "1,204 distinct characters, 2,000 test lines",
        "8 min 18 s",
        "12 of 12 comparisons",
        "1 of 3 without a mistake",
        "backbone.stage0.1.bn",
        "batch norm, 64 channels. At step 1,500:",
        "ONNX Runtime",
        "4.3·10⁻⁶",
        "2 norm layers went into the convolution before them ; 1 stayed",
        "so folding would change both",
        "paddlepaddle 3.3.1",
        "width: 64 # <script>",  # text, not a tag
    ):
        assert words.replace(" ;", ";") in page.text.replace(" ;", ";")
    assert "Not in this report" not in page.text


def test_every_layer_has_its_four_pictures(folder: Path) -> None:
    source = (folder / "report.html").read_text(encoding="utf-8")
    for layer in ("backbone.stage0.0.bn", "backbone.stage0.1.bn"):
        for words in ("before normalization", "after normalization", "running mean", "running variance"):
            assert len(re.findall(rf'<svg role="img" aria-label="{re.escape(layer)} {words}', source)) == 1


def test_pictures_take_their_colours_from_the_page(folder: Path) -> None:
    source = (folder / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r"<svg role.*?</svg>", source, flags=re.DOTALL)
    assert len(pictures) == 3 + 1 + 2 * 4
    for picture in pictures:
        assert not re.search(r"#[0-9a-f]{6}\b", picture)
        assert "var(--" in picture


def test_anchors_lead_somewhere(page: Page) -> None:
    targets = [address[1:] for address in page.addresses if address.startswith("#")]
    assert targets
    assert set(targets) <= set(page.ids)
    own = [one for one in page.ids if not re.match(r"f[0-9a-f]{8}-", one)]
    assert len(own) == len(set(own))


def test_the_same_run_gives_the_same_page(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    assert write(folder).read_bytes() == before


# config.yaml is shown as it is, whatever it holds.
DAMAGES = [(name, how) for name in FILES for how in ("missing", "not json", "wrong shape")][:-2]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_what_is_missing_or_damaged_is_said_in_its_place(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_run(tmp_path / "run", layers=1)
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_text("{" if damage == "not json" else '{"layers": 3, "rows": 3, "train": 3, "folded": 3}')
    text = Page(write(folder).read_text(encoding="utf-8")).text
    assert f"Not in this report: {name}: " in text
    assert str(tmp_path) not in text


def test_an_empty_folder_gives_a_page_of_gaps(tmp_path: Path) -> None:
    text = Page(write(tmp_path).read_text(encoding="utf-8")).text
    for name in FILES:
        assert f"Not in this report: {name}" in text


def test_a_run_that_was_interrupted_early(tmp_path: Path) -> None:
    """One training step, no evaluation, a layer never sampled, a diverged one, an image that is gone."""
    folder = write_run(tmp_path / "run", layers=2)
    generator = np.random.default_rng(0)
    save(folder / "history.json", {"train": history(generator)["train"][:1], "evaluations": []})
    record = norms(generator, 2)
    record["layers"][0]["samples"] = []
    sample = record["layers"][1]["samples"][-1]
    nothing = dict.fromkeys(("mean", "std", "low", "high")) | {"quantiles": [None] * 7, "counts": [0] * 48}
    sample["before"] |= nothing | {"non_finite": 4000}
    sample["running_mean"] = [None] * 5
    record["layers"][1]["samples"] = [sample]
    record["unobserved"] = {"neck.norm": "it runs inside a static program"}
    save(folder / "norms.json", record)
    (folder / "samples" / "1.png").unlink()
    text = Page(write(folder).read_text(encoding="utf-8")).text
    for words in ("has no evaluation yet", "NaN or infinite", "1.png is not in samples/", "neck.norm (it runs inside"):
        assert words in text


def test_a_failed_verification_is_loud(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=1)
    row = {"form": "ONNX Runtime", "batch": 2, "max_abs": float("inf"), "max_rel": None, "passed": False, "note": "bn3"}
    save(folder / "verification.json", {"passed": False, "rows": [row]})
    text = Page(write(folder).read_text(encoding="utf-8")).text
    for words in ("0 of 1 comparisons", "✗ Some form does not compute", "✗ fail bn3", " inf "):
        assert words in text


def test_images_come_from_the_samples_folder_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=1)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    save(folder / "samples" / "samples.json", [{"file": "../../secret.png", "truth": "字", "read": "字"}])
    source = write(folder).read_text(encoding="utf-8")
    assert "data:image" not in re.sub(r"img-src data:", "", source)


def test_text_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=1)
    nasty = '<img src=x onerror="alert(1)">'
    save(folder / "samples" / "samples.json", [{"file": "0.png", "truth": nasty, "read": nasty[1:], "font": nasty}])
    save(folder / "metrics.json", metrics() | {"environment": {nasty: nasty}})
    record = norms(np.random.default_rng(0), 1)
    record["layers"][0]["path"] = nasty
    save(folder / "norms.json", record)
    assert "<img src=x" not in write(folder).read_text(encoding="utf-8")


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the folder of a run"):
        write(tmp_path / "nowhere")


@given(st.text("平水行舟归一", max_size=8), st.text("平水行舟归一", max_size=8))
def test_compare_loses_no_character(truth: str, read: str) -> None:
    of_truth, of_read = compare(truth, read)
    assert "".join(span.text for span in of_truth) == truth
    assert "".join(span.text for span in of_read) == read
    same = ["".join(span.text for span in side if span.kind == "same") for side in (of_truth, of_read)]
    assert same[0] == same[1]
    assert (truth == read) == all(span.kind == "same" for span in of_truth + of_read)


def test_compare_marks_each_kind_of_mistake() -> None:
    assert compare("批量归一化", "批里归一") == (
        [("same", "批"), ("wrong", "量"), ("same", "归一"), ("missing", "化")],
        [("same", "批"), ("wrong", "里"), ("same", "归一")],
    )
    assert compare("人工", "人人工")[1].count(("extra", "人")) == 1


def test_records_are_read_back_as_written(tmp_path: Path) -> None:
    written = Metrics.model_validate(metrics())
    save_record(tmp_path / "metrics.json", written)
    assert load(tmp_path / "metrics.json", Metrics) == written
    lines = [Sample(file="0.png", truth="平水", read="平水")]
    save_record(tmp_path / "samples.json", lines)
    assert load(tmp_path / "samples.json", list[Sample]) == lines
    assert "平水" in (tmp_path / "samples.json").read_text(encoding="utf-8")


def test_a_wrong_record_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps({"train": [{"step": 1, "loss": "high"}]}))
    with pytest.raises(DataError, match=r"history\.json: train\.0\.loss: .*number"):
        load(tmp_path / "history.json", History)
