"""Plots show the numbers they are given; every kind renders, and bad numbers are refused."""

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colors
from matplotlib.text import Text

from lmops_jax.reporting import plots


def _pixels(figure, dpi=plots.DPI):
  return matplotlib.image.imread(io.BytesIO(plots.png(figure, dpi=dpi)))[..., :3]


def _lines(axes, colour):
  return [line for line in axes.lines if colors.same_color(line.get_color(), colour)]


def test_png_is_twice_the_page_width_and_reproducible():
  def draw():
    return plots.curves(
      {"a": [plots.Run([0, 1, 2], [3, 2, 1])]}, x_label="step", y_label="loss"
    )

  first, second = plots.png(draw()), plots.png(draw())
  assert first == second
  assert matplotlib.image.imread(io.BytesIO(first)).shape[1] == 1440


def test_curves_draw_the_mean_and_the_band_of_the_runs():
  steps = [0, 100, 200]
  runs = [plots.Run(steps, [8.0, 6.0, 5.0]), plots.Run(steps, [8.2, 6.4, 5.4])]
  styles = plots.looks(["pds", "random"], emphasis=["pds"])
  figure = plots.curves(
    {"pds": runs, "random": [plots.Run(steps, [8.0, 7.0, 6.0])]}, x_label="step", y_label="loss",
    styles=styles, reference=(6.0, "random's final loss"), crossings={"pds": 117.0},
  )
  axes = figure.axes[0]
  line = next(line for line in _lines(axes, styles["pds"].colour) if len(line.get_xdata()) == 3)
  np.testing.assert_allclose(line.get_ydata(), [8.1, 6.2, 5.2])
  band = axes.collections[0].get_paths()[0].vertices
  assert band[:, 1].min() == 5.0 and band[:, 1].max() == 8.2
  texts = {text.get_text() for text in axes.texts}
  assert {"pds", "random", "random's final loss", "117"} <= texts


def test_a_crossing_is_labelled_unless_an_earlier_label_stands_there():
  runs = {name: [plots.Run([0, 400], [8.0, 5.0])] for name in "abc"}
  figure = plots.curves(runs, x_label="steps", y_label="loss", reference=(6.0, "chance"),
                        crossings={"a": 228.0, "b": 239.0, "c": 270.0})
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert "228" in texts and "239" not in texts and "270" in texts


@pytest.mark.filterwarnings("error")
def test_a_reference_away_from_the_curves_is_in_view():
  figure = plots.curves({"a": [plots.Run([1, 4], [0.2, 0.2])]}, x_label="x", y_label="y",
                        log_x=True, reference=(0.5, "chance"))
  low, high = figure.axes[0].get_ylim()
  assert low < 0.2 and high > 0.5


def test_focus_fits_the_axis_to_the_later_part():
  runs = {"a": [plots.Run([0, 10, 20], [100.0, 2.0, 1.0])]}
  full = plots.curves(runs, x_label="x", y_label="y").axes[0].get_ylim()
  late = plots.curves(runs, x_label="x", y_label="y", focus_from=5).axes[0].get_ylim()
  assert full[1] > 100 and late[1] < 2.2


def test_end_labels_do_not_overlap():
  names = [f"method_{i}" for i in range(9)]
  figure = plots.curves(
    {name: [plots.Run([0, 1], [2.0, 1.0 + 1e-4 * i])] for i, name in enumerate(names)},
    x_label="x", y_label="y",
  )
  figure.draw_without_rendering()
  boxes = sorted(
    (Text.get_window_extent(t) for t in figure.axes[0].texts if t.get_text() in names),
    key=lambda box: box.y0,
  )
  assert len(boxes) == 9
  assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:]))
  assert all(0 <= box.y0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_paths_keep_the_order_of_their_points_and_leave_out_what_no_axis_holds():
  runs = [plots.Run([3.0, 2.0, 1.0, 0.5], [1.0, np.inf, -1.0, 4.0]),
          plots.Run([9.0, 8.0], [1.0, 2.0])]
  figure = plots.paths({"a": runs}, x_label="x", y_label="y", log_y=True, falling_x=True)
  axes = figure.axes[0]
  first, second = (line for line in axes.lines if len(line.get_xdata()) == 2)
  np.testing.assert_array_equal(first.get_xdata(), [3.0, 0.5])
  np.testing.assert_array_equal(second.get_ydata(), [1.0, 2.0])
  assert second.get_alpha() < 1 and axes.get_xlim()[0] > axes.get_xlim()[1]
  with pytest.raises(ValueError, match="at least one series"):
    plots.paths({}, x_label="x", y_label="y")
  with pytest.raises(ValueError, match="no point that can be drawn"):
    plots.paths({"a": [plots.Run([1.0], [-1.0])]}, x_label="x", y_label="y", log_y=True)


def test_looks_tell_every_series_apart_and_stay_the_same():
  names = [f"m{i}" for i in range(9)]
  styles = plots.looks(names, emphasis=["m0"])
  assert len({(look.colour, look.dashes) for look in styles.values()}) == 9
  assert styles["m0"].width > styles["m1"].width
  assert plots.looks(names[:3], emphasis=["m0"])["m2"] == styles["m2"]


def test_bars_have_their_lengths_and_order():
  figure = plots.grouped_bars(
    {"corpus": {"prose": 0.2, "code": 0.8}, "pds": {"prose": 0.7, "table": 0.3}}, x_label="share"
  )
  axes = figure.axes[0]
  assert [tick.get_text() for tick in axes.get_yticklabels()] == ["code", "prose", "table"]
  widths = [[bar.get_width() for bar in group] for group in axes.containers]
  assert widths == [[0.8, 0.2, 0.0], [0.0, 0.7, 0.3]]
  assert {"80.0%", "70.0%", "30.0%"} <= {text.get_text() for text in axes.texts}


def test_what_was_not_measured_has_no_bar():
  bars = {"causal": {"all": 0.6, "frozen": None}, "prefix": {"all": 0.5, "frozen": 0.4}}
  axes = plots.grouped_bars(bars, x_label="share", order=["frozen", "all"]).axes[0]
  assert [[(bar.get_width(), round(bar.get_y() + bar.get_height() / 2, 6)) for bar in group]
          for group in axes.containers] == [[(0.6, 0.8)], [(0.4, 0.2), (0.5, 1.2)]]
  assert [text.get_text() for text in axes.texts] == ["60.0%", "40.0%", "50.0%"]


def test_histogram_counts_every_value_once():
  values = np.concatenate([np.random.default_rng(0).normal(size=5000), [50.0, -60.0]])
  figure = plots.histogram({"all": values}, x_label="score", bins=40, clip_quantile=0.01)
  axes = figure.axes[0]
  heights = axes.patches[-1].get_data().values
  assert heights.sum() == 5002
  low, high = axes.get_xlim()
  assert -3 < low < high < 3
  beyond = np.count_nonzero((values < low) | (values > high))
  assert f"include {beyond:,} values beyond" in axes.get_xlabel()


def test_histogram_of_equal_values_and_stacked_parts():
  axes = plots.histogram({"a": np.full(10, 2.0)}, x_label="x").axes[0]
  assert axes.patches[-1].get_data().values.sum() == 10
  axes = plots.histogram({"a": [1, 2], "b": [1, 1]}, x_label="x", bins=2, stacked=True).axes[0]
  assert axes.patches[1].get_data().values.tolist() == [3, 1]  # b on top of a


def test_scatter_switches_to_density_and_keeps_every_point():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 5000))
  few = plots.scatter(x[:100], y[:100], x_label="x", y_label="y", note="Spearman 0.01").axes[0]
  assert few.collections[0].get_offsets().shape == (100, 2)
  assert "Spearman 0.01" in {text.get_text() for text in few.texts}
  many = plots.scatter(x, y, x_label="x", y_label="y", identity=True)
  assert many.axes[0].collections[0].get_array().sum() == 5000
  assert len(many.axes) == 2  # with a colour bar


def test_clouds_draw_every_group_and_its_marks():
  groups = {"a": np.array([[0.0, 1.0], [2.0, 3.0]]), "b": np.array([[4.0, 5.0]])}
  figure = plots.clouds(groups, {"b": np.array([[6.0, 7.0], [8.0, 9.0]])})
  found = [c.get_offsets() for c in figure.axes[0].collections]
  assert [len(points) for points in found] == [2, 0, 1, 2]
  np.testing.assert_array_equal(found[3], [[6, 7], [8, 9]])
  assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
  with pytest.raises(ValueError, match="marks of c need points"):
    plots.clouds(groups, {"c": np.zeros((1, 2))})
  with pytest.raises(ValueError, match="group a has points that are not finite"):
    plots.clouds({"a": np.array([[np.nan, 0]])}, {})


def test_heatmap_with_labels_writes_the_values():
  values = np.array([[0.1, 0.9], [0.5, np.nan]])
  axes = plots.heatmap(
    values, row_labels=["pds", "random"], column_labels=["code", "prose"], annotate=".0%"
  ).axes[0]
  assert [text.get_text() for text in axes.texts] == ["10%", "90%", "50%"]
  texts = {text.get_text(): text.get_color() for text in axes.texts}
  assert texts["90%"] == "white" != texts["10%"]


def test_heatmap_averages_what_has_more_rows_than_dots():
  values = np.zeros((6_000, 2000))
  values[::2] = 1.0  # stripes that would alias into all 0 or all 1
  image = plots.heatmap(values, x_label="step", y_label="example").axes[0].images[0]
  shown = np.asarray(image.get_array())
  assert shown.shape[0] < 1000 and shown.shape[1] < 1500
  assert np.all((shown > 0.4) & (shown < 0.6))
  assert shown.mean() == pytest.approx(0.5, abs=1e-3)
  assert image.get_extent() == [0, 2000, 6_000, 0]  # still counted in examples and steps


def test_heatmap_diverges_from_its_centre():
  image = plots.heatmap([[0.5, 1.0, 3.0]], centre=1.0).axes[0].images[0]
  assert image.norm.vmin == -1.0 and image.norm.vmax == 3.0
  assert image.cmap(image.norm(1.0))[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)


def test_fits_are_solid_where_measured_and_dashed_beyond():
  x = np.geomspace(1e8, 1e12, 41)
  curve = plots.Run(x, 4 * x**-0.02)
  fit = plots.Fit(plots.Run([1e9, 1e10], [3.0, 2.9]), curve, band=(x * 0 + 2, x * 0 + 3))
  axes = plots.fits({"PDS": fit}, x_label="parameters", y_label="loss").axes[0]
  dashed, solid = axes.lines
  assert len(dashed.get_xdata()) == 41
  assert solid.get_xdata().min() == pytest.approx(1e9)
  assert solid.get_xdata().max() == pytest.approx(1e10)


def test_drawing_leaves_matplotlib_as_it_was():
  before = dict(matplotlib.rcParams)
  plots.png(plots.scatter([1, 2], [3, 4], x_label="x", y_label="y"))
  assert dict(matplotlib.rcParams) == before


def test_the_picture_is_not_blank():
  pixels = _pixels(plots.heatmap([[0.0, 1.0]], annotate=".1f"), dpi=60)
  assert 0.05 < (pixels.min(-1) < 0.9).mean() < 0.95


@pytest.mark.parametrize(
  "draw, message",
  [
    (lambda: plots.curves({}, x_label="x", y_label="y"), "at least one series"),
    (lambda: plots.curves({"a": []}, x_label="x", y_label="y"), "'a' has no run"),
    (
      lambda: plots.curves({"a": [plots.Run([0, 1], [1, np.nan])]}, x_label="x", y_label="y"),
      "not finite",
    ),
    (
      lambda: plots.curves(
        {"a": [plots.Run([0, 1], [1, 2]), plots.Run([0, 2], [1, 2])]}, x_label="x", y_label="y"
      ),
      "runs of 'a' were measured at different",
    ),
    (lambda: plots.curves({"a": [plots.Run([0, 1], [1])]}, x_label="x", y_label="y"), "one length"),
    (lambda: plots.grouped_bars({}, x_label="x"), "at least one series"),
    (lambda: plots.grouped_bars({"a": {"b": -1}}, x_label="x"), "'b' of 'a' is -1"),
    (lambda: plots.histogram({"a": []}, x_label="x"), "at least one value"),
    (lambda: plots.histogram({"a": [1, np.inf]}, x_label="x"), "finite"),
    (lambda: plots.scatter([1], [1, 2], x_label="x", y_label="y"), "as many finite x as y"),
    (lambda: plots.heatmap([1, 2]), "matrix"),
    (lambda: plots.heatmap([[1, 2]], row_labels=["a", "b"]), "1 rows has 2 row labels"),
    (lambda: plots.fits({}, x_label="x", y_label="y"), "at least one series"),
  ],
)
def test_numbers_that_cannot_be_drawn(draw, message):
  with pytest.raises(ValueError, match=message):
    draw()


def test_a_series_without_a_look_is_grey():
  styles = plots.looks(["pds"])
  bars = {"corpus": {"a": 1}, "pds": {"a": 2}}
  axes = plots.grouped_bars(bars, x_label="x", styles=styles).axes[0]
  grey, blue = (group[0].get_facecolor() for group in axes.containers)
  assert colors.same_color(grey, plots.NEUTRAL.colour)
  assert colors.same_color(blue, styles["pds"].colour)
