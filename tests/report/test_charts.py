"""Charts: their points stand where their axes say, and their text is escaped."""

from xml.etree import ElementTree as ET

import numpy as np
import pytest

from dpkd.report.charts import confusion_chart, interval_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def axis(root: ET.Element, anchor: str, coordinate: str) -> tuple[list[float], list[float]]:
    """The places and values of the labels of an axis."""
    labels = [text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == anchor]
    numbers = [(float(label.get(coordinate, "")), str(label.text).replace(",", "")) for label in labels]
    known = sorted((place, float(value)) for place, value in numbers if value.replace(".", "").strip("-+e").isnumeric())
    return [place for place, _ in known], [value for _, value in known]


@pytest.mark.parametrize(
    "values", [(0.5, 0.9, 0.7), (-3e5, 2e6, 0.0), (-2e-4, -1e-4, -1.2e-4), (5.0, 5.0, 5.0), (0.0, 0.0, 0.0)]
)
def test_points_of_lines_stand_where_the_axes_say(values: tuple[float, ...]) -> None:
    steps = (10, 400, 1700)
    chart = line_chart({"a": [(x, y, 0.0) for x, y in zip(steps, values, strict=True)]}, title="t", x_title="step")
    root = ET.fromstring(chart)
    circles = [(float(each.get("cx", "")), float(each.get("cy", ""))) for each in root.iter(f"{SVG}circle")]
    x_places, x_values = axis(root, "middle", "x")
    y_places, y_values = axis(root, "end", "y")
    assert len(y_values) <= 7
    assert min(y_values) <= min(values)
    assert max(y_values) >= max(values)
    for (x, y), step, value in zip(circles, steps, values, strict=True):
        assert np.interp(x, x_places, x_values) == pytest.approx(step, abs=5)
        read = np.interp(y + 4, y_places, y_values)  # the text of a tick is 4 units below its line
        assert read == pytest.approx(value, abs=0.01 * (max(y_values) - min(y_values)))


def test_intervals_reach_from_end_to_end_and_gains_have_signs() -> None:
    root = ET.fromstring(interval_chart({"a": (2.0, 1.0), "b": (-1.0, 0.0)}, title="t", gains=True))
    places, values = axis(root, "middle", "x")
    drawn = [str(path.get("d")) for path in root.iter(f"{SVG}path") if path.get("class") is None]
    ends = [[float(part) for part in (path[1:].split(",")[0], path.rpartition("H")[2])] for path in drawn]
    assert np.interp(ends[0], places, values) == pytest.approx([1.0, 3.0], abs=0.02)
    assert np.interp(ends[1], places, values) == pytest.approx([-1.0, -1.0], abs=0.02)
    assert 0 in values
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"+2.0 ± 1.0", "-1.0"} <= set(texts)


def test_cells_of_confusions_are_shares_of_their_rows() -> None:
    root = ET.fromstring(confusion_chart(["a", "b"], [[3, 1], [0, 0]], title="t"))
    cells = [float(str(cell.get("fill-opacity"))) for cell in root.iter(f"{SVG}rect") if cell.get("fill-opacity")]
    assert cells == [0.75, 0.25, 0, 0]
    assert {"75", "25", "a 1", "b 2"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_text_of_charts_is_escaped() -> None:
    name = '<script>alert("1")</script>&'
    charts = [
        line_chart({name: [(0, 1, 0)]}, title=name, x_title=name),
        interval_chart({name: (1, 0)}, title=name, gains=False),
        confusion_chart([name[:12]], [[1]], title=name),
    ]
    for chart in charts:
        assert "<script" not in chart
        assert name in [text.text for text in ET.fromstring(chart).iter(f"{SVG}text")]
