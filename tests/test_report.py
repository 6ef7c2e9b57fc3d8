import base64
import dataclasses
import html.parser
import io
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

from jaxprune import report
from jaxprune.models import LayerDims, LlamaConfig

DENSE = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(3, 2, 48),) * 4)
PRUNED = dataclasses.replace(DENSE, layers=(LayerDims(3, 2, 48), LayerDims(2, 2, 24), LayerDims(0, 0, 16), LayerDims(1, 2, 0)))
STAGES = dict(
    dense=dict(perplexity={"1024": 21.16, "128": 53.0}, bytes=269_000_000, accuracy=0.51, tokens=32768),
    pruned=dict(perplexity={"1024": 35.9, "128": float("inf")}, bytes=226_000_000, accuracy=0.44, tokens=32768),
    recovered=dict(perplexity={"1024": 28.5}),
)


def scored(low=0.5, high=2.0, letters="kf"):
    rng = np.random.default_rng(0)
    sizes = dict(k=3, f=400, d=32)
    scores = tuple({a: rng.uniform(low, high, sizes[a]).astype(np.float32) for a in letters} for _ in range(4))
    keep = tuple({a: np.sort(np.argsort(x)[x.size // 3 :]) for a, x in layer.items()} for layer in scores)
    return scores, keep


def png(figure) -> np.ndarray:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    data.seek(0)
    return matplotlib.image.imread(data, format="png")


def texts(figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(Text))


@pytest.fixture
def drawn(monkeypatch) -> list[Text]:
    """The texts that were drawn, tick labels inside the axes included."""
    found, draw = [], Text.draw

    def recording(self, *args, **options):
        if self.get_visible() and self.get_text().strip() and self not in found:
            found.append(self)
        return draw(self, *args, **options)

    monkeypatch.setattr(Text, "draw", recording)
    return found


FIGURES = dict(
    widths=lambda: report.widths_figure(DENSE, PRUNED),
    narrower=lambda: report.widths_figure(DENSE, dataclasses.replace(DENSE, d=24)),
    deep=lambda: report.widths_figure(
        dataclasses.replace(DENSE, layers=(LayerDims(8, 4, 14336),) * 80),
        dataclasses.replace(DENSE, layers=(LayerDims(6, 3, 11000),) * 80),
    ),
    scores=lambda: report.scores_figure(*scored()),
    negative=lambda: report.scores_figure(*scored(-1, 1)),
    zero=lambda: report.scores_figure(*scored(0, 0)),
    residual=lambda: report.scores_figure(*scored(letters="d")),
    before_after=lambda: report.before_after_figure(STAGES),
    loss=lambda: report.loss_figure(3 - np.arange(100) / 100, validation={0: 3.1, 50: 2.6, 100: 2.1}),
    short_loss=lambda: report.loss_figure(np.array([3.0])),
)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_something_and_their_texts_do_not_collide(name, drawn):
    figure = FIGURES[name]()
    image = png(figure)
    assert image.shape[0] > 300 and image.shape[1] > 350
    assert 0.001 < (image[..., :3] < 0.9).any(-1).mean() < 0.9
    boxes = [text.get_window_extent() for text in drawn]
    assert len(boxes) > 5
    assert all(figure.bbox.padded(1).containsx(x) for box in boxes for x in (box.x0, box.x1))
    names = [text.get_text() for text in drawn]
    collide = [
        (names[i], names[j]) for i in range(len(boxes)) for j in range(i) if boxes[i].padded(-1).overlaps(boxes[j].padded(-1))
    ]
    assert not collide


def test_bars_are_the_widths():
    figure = report.widths_figure(DENSE, PRUNED)
    heights = [[bar.get_height() for bar in ax.containers[0]] for ax in figure.axes]
    assert heights == [[3, 2, 0, 1], [48, 24, 16, 0]]
    assert "KV groups: 6 of 12 kept (50.0%)" in texts(figure) and "all removed" in texts(figure)
    assert "all removed" not in texts(report.widths_figure(DENSE, DENSE))
    assert len(FIGURES["deep"]().axes) == 3
    with pytest.raises(ValueError, match="4 dense and 3 pruned layers"):
        report.widths_figure(DENSE, dataclasses.replace(DENSE, layers=DENSE.layers[:3]))


def test_points_are_the_units_and_the_line_is_the_cut():
    scores, keep = scored()
    for ax, letter in zip(report.scores_figure(scores, keep).axes, "kf", strict=True):
        kept, removed, cut = ax.collections
        drawn = {name: np.round(x.get_offsets()[:, 0]) for name, x in (("kept", kept), ("removed", removed))}
        for i in range(4):
            x, stays = scores[i][letter], np.isin(np.arange(scores[i][letter].size), keep[i][letter])
            shown = kept.get_offsets()[drawn["kept"] == i, 1], removed.get_offsets()[drawn["removed"] == i, 1]
            assert set(shown[0].tolist()) <= set(x[stays].tolist()) and set(shown[1].tolist()) <= set(x[~stays].tolist())
            assert sum(map(len, shown)) == min(x.size, 256)
            assert cut.get_segments()[i][0][1] == pytest.approx(x[stays].min())
        assert ax.get_yscale() == "log"
    assert report.scores_figure(*scored(-1, 1)).axes[0].get_yscale() == "symlog"


def test_units_that_the_plan_does_not_name_are_kept():
    scores, _ = scored()
    figure = report.scores_figure(scores, ({},) * 4)
    assert all(len(ax.collections[1].get_offsets()) == 0 for ax in figure.axes)
    with pytest.raises(ValueError, match="4 layers and units .*, plan of 3 layers"):
        report.scores_figure(scores, ({},) * 3)


def test_panels_are_what_was_measured_twice():
    figure = report.before_after_figure(STAGES)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "perplexity, 1024",
        "perplexity, 128",
        "size (MB)",
        "accuracy (%)",
    ]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [21.16, 35.9, 28.5]
    assert "226.0" in texts(figure) and "44.0" in texts(figure)
    with pytest.raises(ValueError, match="no number was measured in two"):
        report.before_after_figure(dict(dense=dict(bytes=1)))


def test_the_running_mean_follows_the_loss():
    losses = np.random.default_rng(0).normal(size=50)
    figure = report.loss_figure(losses, smooth=10)
    batch, mean = figure.axes[0].lines
    np.testing.assert_allclose(batch.get_ydata(), losses)
    np.testing.assert_allclose(mean.get_ydata()[-1], losses[-10:].mean())
    with pytest.raises(ValueError, match="no steps given"):
        report.loss_figure(np.zeros(0))


def test_drawing_changes_no_global_state():
    before = dict(matplotlib.rcParams)
    FIGURES["widths"]()
    assert dict(matplotlib.rcParams) == before


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; collects text and tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def results(**more):
    return dict(
        command="jaxprune run smollm2 --out demo",
        seed=7,
        calibration=dict(source="builtin", sha256="f0737e", samples=10),
        versions=dict(jax="0.10.2"),
        notes=["ratio 0.2000 asked, 0.2071 reached"],
        stages=STAGES,
        verify=dict(exact=True, difference=3.1e-5, kept=[f"run_{i}/q" for i in range(9)]),
        layers=report.layer_rows(DENSE, PRUNED),
        prompt="1 < 2 &",
        samples=dict(dense="<script>alert(1)</script>", pruned="</pre><b>bold</b>"),
    ) | dict(more)


def test_the_page_says_what_was_run_and_measured(tmp_path):
    path = report.write_report(tmp_path / "report", results(), dict(widths=FIGURES["widths"](), loss=FIGURES["loss"]()))
    page = Page(path.read_text(encoding="utf-8"))
    words = re.sub(r"\s+", " ", page.text)
    for part in (
        "jaxprune run smollm2", "seed7", "source builtin; sha256 f0737e; samples 10", "jax 0.10.2", "0.2071 reached",
        "21.16", "35.90+69.7 %", "226.0-16.0 %", "44.0-7.0 points", "inf", "3.1e-05", "q and 3 more", "24 of 48", "1 < 2 &",
    ):  # fmt: skip
        assert part in words, part
    assert sorted(p.name for p in path.parent.iterdir()) == ["loss.png", "report.html", "widths.png"]


def test_the_page_needs_no_other_file(tmp_path):
    path = report.write_report(tmp_path, results(), dict(widths=FIGURES["widths"]()))
    page = Page(path.read_text(encoding="utf-8"))
    sources = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert base64.b64decode(sources[0].split(",")[1]) == (tmp_path / "widths.png").read_bytes()
    assert not {"script", "link"} & {tag for tag, _ in page.tags} and "url(" not in path.read_text(encoding="utf-8")


def test_generated_text_is_shown_and_not_run(tmp_path):
    page = Page(report.write_report(tmp_path, results()).read_text(encoding="utf-8"))
    assert "<script>alert(1)</script>" in page.text and "</pre><b>bold</b>" in page.text
    assert not {"script", "b", "img"} & {tag for tag, _ in page.tags}


@pytest.mark.parametrize("missing", ["stages", "verify", "layers", "prompt", "samples", "notes", "calibration"])
def test_what_is_missing_is_left_out(tmp_path, missing):
    some = {name: value for name, value in results().items() if name != missing}
    words = Page(report.write_report(tmp_path / "some", some).read_text(encoding="utf-8")).text
    everything = Page(report.write_report(tmp_path / "all", results()).read_text(encoding="utf-8")).text
    headings = dict(
        stages="Before and after",
        verify="Verification",
        layers="Layers",
        prompt="Prompt:",
        samples="Generated text",
        notes="Notes",
        calibration="calibration",
    )
    assert headings[missing] in everything and headings[missing] not in words and "None" not in words


def test_an_empty_report_and_a_failed_proof(tmp_path):
    assert Page(report.write_report(tmp_path / "a", {}).read_text(encoding="utf-8")).text.strip()
    text = report.write_report(tmp_path / "b", results(verify=dict(exact=False))).read_text(encoding="utf-8")
    assert 'class="bad"' in text and "does not match" in text and 'class="good"' not in text
