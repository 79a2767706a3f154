"""The report is one file that needs nothing else, and says what was found."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mmpt.evals.exhibits import evenly
from mmpt.evals.findings import Findings, find, text_table
from mmpt.evals.report import write_report
from mmpt.evals.report_curves import Curve, draw, read_curves, round_ticks, short
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from tests.evals.test_suite import TOWERS, WITH_CLS, configured


class Page(HTMLParser):
    """Checks that tags are balanced and collects what they refer to."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polyline", "image", "use"})

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.references, self.ids, self.text = [], [], set(), ""
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.add(value)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, str]:
    evals, data = configured(folder)
    run_dir = tmp_path_factory.mktemp("run")
    records = [{"step": i, "loss": 5.0 - i / 10, "learning_rate": i * 1e-5} for i in range(1, 30)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "recipe.yaml").write_text("run:\n  dir: <here & there>\n")
    method, untrained = FILIPConfig(TOWERS).build().eval(), FILIPConfig(TOWERS).build().eval()
    findings = find(evals, data, TOWERS.inputs(), method, untrained, "cpu")
    path = write_report(run_dir, "A <title>", "About & so on.", findings, evals, data, TOWERS.inputs(), method, "cpu")
    assert path == run_dir / "report.html"
    return findings, path.read_text()


def test_it_refers_to_nothing_outside_itself(made: tuple[Findings, str]):
    page = Page(made[1])
    assert page.references
    for reference in page.references:
        assert reference.startswith("data:image/") or reference[1:] in page.ids, reference[:60]
    without_pictures = re.sub(r'"data:image/[a-z]+;base64,[^"]+"', "", made[1])
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", without_pictures)


def test_it_holds_the_tables_the_curves_and_the_pictures(made: tuple[Findings, str]):
    findings, html = made
    page = Page(html)
    for words in (
        *("A <title>", "About & so on.", "<here & there>", "bag of words + colour histogram", "untrained", "chance"),
        *("Word-patch hit rate", "Caption beats its twin", "Loss", "Learning rate", "area share"),
    ):
        assert words in page.text, words
    for name in ("image_to_text_R@5", "text_to_image_R@10"):
        assert f"{100 * findings.trained['eval/scenes/held_out/' + name]:.1f}" in page.text
        assert f"{100 * findings.bag_of_words['eval/scenes/held_out/' + name]:.1f}" in page.text
    assert (
        html.count('class="query card"') == 18 and html.count('class="match"') > 40 and html.count('class="box"') > 12
    )
    assert html.count("<polyline") == 2
    for special in ("startoftext", "endoftext"):
        assert special not in page.text


def test_the_console_table_has_every_number(made: tuple[Findings, str], folder: Path):
    findings = made[0]
    table = text_table(findings, configured(folder)[0])
    assert re.search(r"trained +\d", table) and "chance" in table
    for name, value in findings.trained.items():
        assert (f"{value:.3f}" if "_R@" not in name else f"{100 * value:.1f}") in table
    assert f"{findings.text_only['eval/scenes/held_out/twin_i2t']:.3f}" in table


def test_a_method_of_one_vector_has_a_report_without_word_maps(folder: Path, tmp_path: Path):
    evals, data = configured(folder)
    method = CLIPConfig(WITH_CLS).build().eval()
    findings = find(evals, data, TOWERS.inputs(), method, method, "cpu")
    html = write_report(tmp_path, "t", "a", findings, evals, data, TOWERS.inputs(), method, "cpu").read_text()
    assert 'class="match"' not in html and "Caption beats its twin" in html and "<polyline" not in html


def test_curves_leave_out_what_is_not_a_number_and_name_a_broken_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_curves(path) == []
    path.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0, "eval/a/x_R@1": 0.5}\n'
    )
    assert read_curves(path) == [Curve("Loss", [(1.0, 2.0), (3.0, 1.0)])]
    path.write_text('{"step": 1}\nbroken\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not"):
        read_curves(path)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-3.0, 5.0], [1e-6, 2e-6], [1e7, 3.0]])
def test_any_curve_can_be_drawn(values: list[float]):
    svg = draw(Curve("c", [(float(i), value) for i, value in enumerate(values)]))
    points = re.search(r'points="([^"]+)"', svg)
    assert points
    for point in points.group(1).split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 320 and 0 <= y <= 170


def test_ticks_and_numbers_are_round():
    assert round_ticks(0.0, 0.93, 4) == pytest.approx([0.0, 0.5, 1.0])
    assert round_ticks(12.0, 88.0, 4) == pytest.approx([0, 20, 40, 60, 80, 100])
    assert [short(v) for v in (0, 0.0003, 12.345, 20000, 2.5e6)] == ["0", "3.0e-4", "12.3", "20k", "2.5M"]
    assert evenly(10, 3) == [1, 5, 8] and evenly(2, 5) == [0, 1] and torch.tensor(evenly(512, 6)).unique().numel() == 6
