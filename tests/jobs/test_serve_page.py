"""The service's page in a real browser."""

import pytest
from PIL import Image

from jobs.serve_requests import Limits
from tests.jobs.browser import browsing, chromium
from tests.jobs.services import running

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium: neither CHROMIUM nor PATH names one"
)

WIDTH, HEIGHT = 200, 100
FOUND = [
    {"label": "circle", "category_id": 1, "score": 0.91, "box": [10.0, 10.0, 60.0, 60.0]},
    {"label": "<b>star</b>", "category_id": 4, "score": 0.62, "box": [100.0, 20.0, 190.0, 90.0]},
    {"label": "circle", "category_id": 1, "score": 0.2, "box": [0.0, 0.0, 200.0, 100.0]},
]


async def detect(data, threshold, most):
    if data == b"not an image":
        return {"error": "not an image: expected JPEG, PNG, WebP, GIF, BMP or TIFF"}
    damage = {"damage": "Corrupt JPEG data"} if data.endswith(b"damaged") else {}
    kept = [one for one in FOUND if one["score"] >= threshold]
    return {"width": WIDTH, "height": HEIGHT, "detections": kept, **damage, "batch": 1}


@pytest.fixture(scope="module")
def service():
    with running(detect, Limits(megabytes=1)) as one:
        yield one


@pytest.fixture(scope="module")
def tab():
    with browsing(chromium()) as page:
        yield page


@pytest.fixture
def page(tab, service):
    tab.scheme("light")
    tab.size(1100, 800)
    tab.open(f"http://127.0.0.1:{service.port}/", "model !== null")
    return tab


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "street.png"
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 60)).save(file)
    return file


def shown_boxes(page) -> list[list[float]]:
    """(x0, y0, x1, y1) in the image's pixels of what is drawn, as the browser laid it out."""
    return page.run(
        """(() => {
          const image = document.getElementById("image").getBoundingClientRect();
          const scale = image.width / WIDTH;
          return found.filter((d) => !d.box.hidden).map(({box}) => {
            const r = box.getBoundingClientRect();
            return [r.left - image.left, r.top - image.top, r.right - image.left,
                    r.bottom - image.top].map((x) => x / scale);
          });
        })()""".replace("WIDTH", str(WIDTH))
    )


def rows(page) -> list[str]:
    return page.run(
        """[...document.querySelectorAll("#list li")].filter((row) => !row.hidden)
        .map((row) => row.querySelector("b").textContent + " " +
             row.querySelector("i").textContent)"""
    )


def seen(page) -> None:
    page.wait("document.querySelectorAll('.box').length === 3 && image.naturalWidth > 0")


@pytest.mark.parametrize("way", ["chosen", "dropped", "pasted"])
@pytest.mark.parametrize("width", [1100, 375])
def test_boxes_are_drawn_where_the_answer_says(page, service, picture, way, width):
    page.size(width, 800)
    if way == "chosen":
        page.choose("#file", picture)
    elif way == "dropped":
        page.drop(width / 2, 400, picture)
    else:
        page.run(
            """new Promise((done) => {
              const canvas = document.createElement("canvas");
              [canvas.width, canvas.height] = [WIDTH, HEIGHT];
              canvas.toBlob(done);
            }).then((blob) => {
              const data = new DataTransfer();
              data.items.add(new File([blob], "pasted.png", {type: "image/png"}));
              document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
            })""".replace("WIDTH", str(WIDTH)).replace("HEIGHT", str(HEIGHT))
        )
    seen(page)
    answer = service.post(picture.read_bytes()).json["images"][0]["detections"]
    drawn = shown_boxes(page)
    assert len(drawn) == len(answer) == 2  # the third scores too little
    for box, one in zip(drawn, answer, strict=True):
        assert box == pytest.approx(one["box"], abs=0.6)
    # A name is text, whatever it looks like.
    assert rows(page) == ["circle 0.91", "<b>star</b> 0.62"]
    # Nothing is wider than the window.
    assert page.run("document.documentElement.scrollWidth") <= width


def test_the_slider_filters_without_asking_again(page, service, picture):
    page.choose("#file", picture)
    seen(page)
    before = requests(service)
    for least, count in ((0.05, 3), (0.5, 2), (0.7, 1), (0.95, 0)):
        page.run(
            f"threshold.value = {least}; threshold.dispatchEvent(new Event('input', "
            "{bubbles: true}))"
        )
        assert len(shown_boxes(page)) == len(rows(page)) == count
        assert page.run("document.getElementById('status').textContent").startswith(f"{count} ")
    assert requests(service) == before > 0


def requests(service) -> float:
    sample = 'detector_requests_total{path="/detect",status="200"} '
    text = service.service.metrics.text().decode()
    return sum(float(x.removeprefix(sample)) for x in text.splitlines() if x.startswith(sample))


def test_pointing_and_the_keyboard_light_a_box_and_its_row(page, picture):
    page.choose("#file", picture)
    seen(page)
    lit = "found.map((d) => [d.box, d.row].every((e) => e.classList.contains('lit')))"
    x, y = page.run("(r => [r.left + 5, r.top + 5])(found[0].box.getBoundingClientRect())")
    page.move(x, y)
    page.wait(f"{lit}[0]")
    assert page.run(lit) == [True, False, False]
    x, y = page.run("(r => [r.left + 5, r.top + 5])(found[1].row.getBoundingClientRect())")
    page.move(x, y)
    page.wait(f"{lit}[1]")
    page.move(1, 1)
    page.wait(f"!{lit}.includes(true)")
    # From the start of the page: the file, the slider, the rows.
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(4):
        page.key("Tab", 9)
        reached.append(page.run("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["file", "threshold", "LI", "LI"]
    assert page.run(lit) == [False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.jpg", b"not an image", "Not an image: expected JPEG, PNG, WebP, GIF, BMP or TIFF."),
        ("notes.txt", b"not an image", "Not an image: expected JPEG, PNG, WebP, GIF, BMP or TIFF."),
        ("large.jpg", b"1" * 1_200_000, "The file has 1.2 MB, and 1 MB are taken."),
        ("empty.jpg", b"", "The body is empty: expected the bytes of an image file."),
    ],
)
def test_errors_are_sentences(page, tmp_path, picture, name, content, said):
    (tmp_path / name).write_bytes(content)
    page.choose("#file", picture)
    seen(page)
    page.choose("#file", tmp_path / name)
    page.wait("!error.hidden")
    assert page.run("error.textContent") == said
    assert page.run("figure.hidden")  # it was of another file
    page.choose("#file", picture)  # and a good one mends it
    seen(page)
    assert page.run("error.hidden")


def test_damage_is_told_beside_what_is_found(page, tmp_path, picture):
    (tmp_path / "damaged.png").write_bytes(picture.read_bytes() + b"damaged")
    page.choose("#file", tmp_path / "damaged.png")
    seen(page)
    assert not page.run("error.hidden")
    told = "The file is damaged, and what is found in it may be wrong."
    assert page.run("error.textContent") == told
    page.choose("#file", picture)
    page.wait("error.hidden")
    seen(page)


def test_a_service_that_is_gone_is_told(tab, picture):
    with running(detect) as one:
        tab.open(f"http://127.0.0.1:{one.port}/", "model !== null")
    tab.choose("#file", picture)
    tab.wait("!error.hidden")
    assert tab.run("error.textContent") == "The service does not answer; is it still running?"


def test_dark_and_light_differ_and_text_can_be_read(page, picture):
    page.choose("#file", picture)
    seen(page)
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        ground, ink, quiet = (
            luminance(page.run(f"getComputedStyle({element}).{name}"))
            for element, name in (
                ("document.body", "backgroundColor"),
                ("document.body", "color"),
                ("document.getElementById('about')", "color"),
            )
        )
        assert (ground > 0.5) == (scheme == "light")
        assert contrast(ground, ink) > 7
        assert contrast(ground, quiet) > 4.5  # WCAG AA


def luminance(colour: str) -> float:
    values = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
