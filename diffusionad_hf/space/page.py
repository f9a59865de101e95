"""The inspection page: what is on it, what its controls call, and the server that shows it."""

import asyncio
import html
import importlib.util
import threading
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import BlocksConfig
from gradio.processing_utils import save_base64_to_cache
from starlette.middleware import Middleware

from .actions import FEWEST_CALIBRATION_IMAGES
from .addresses import fetch, is_address
from .endpoints import Endpoints, one_line_errors, several_files
from .feedback_page import mark_result, mark_rows
from .handlers import EMPTY, NO_MODEL, Handlers, message, threshold_update
from .intake import LIMITS, Refusal, admit
from .models import Models, Product, about, products
from .pieces import address, pictures_css, product_words
from .results import Results
from .teach import Teacher, is_on
from .teach_page import teach_endpoints, teach_tab
from .traffic import FULL, QUICK, FairQueue, Guard, bytes_in, charged
from .views import OPACITY, thumbnail

STYLE = Path(__file__).with_name("style.css")

# Moving a control draws again at once: the last position wins, and nothing blinks.
LIVE = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
LIVE |= {"concurrency_limit": 2, "concurrency_id": QUICK}
# Full-size pictures take much memory: one at a time.
DOWNLOADS = {"concurrency_limit": 1, "concurrency_id": "download", "api_visibility": "private", "preprocess": False}
# Uploads stay files: gradio would decode them first, and put the server's paths into its messages.
RUN = {"preprocess": False, "api_visibility": "private"}
INSPECTING = {"concurrency_limit": 3, "concurrency_id": "inspect"}
BATCHES = {"concurrency_limit": 2, "concurrency_id": "batch"}
SAVE = "(file) => Object.assign(document.createElement('a'), {href: file.url, download: file.orig_name}).click()"

# gradio's colours that are too pale to be read by everyone.
PALE = (
    "body_text_color_subdued",
    "block_info_text_color",
    "block_label_text_color",
    "block_title_text_color",
    "input_placeholder_color",
)
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    radius_size="md",
    # Of the fonts that travel with gradio; its default weight, 600, comes without Latin letters.
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"],
).set(
    **dict.fromkeys(PALE, "*neutral_600"),
    **{f"{name}_dark": "*neutral_300" for name in PALE},
    slider_color="*primary_600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)

slider = partial(gr.Slider, buttons=[])
upload = partial(gr.File, height=180)


# gradio itself says nothing where there is no camera.
CAMERA = """document.addEventListener('click', async event => {
    if (!event.target.closest('#photo')) return;
    const wanted = event.target.closest('[aria-label="Capture from camera"]');
    const devices = wanted ? await navigator.mediaDevices?.enumerateDevices() ?? [] : [];
    element.firstElementChild.hidden = !wanted || devices.some(device => device.kind === 'videoinput');
})"""


def examples_of(products: Sequence[Product], on: Handlers, photo: gr.Image) -> list[gr.Column]:
    """The photos to try each product on, of which those of the chosen one are shown."""
    columns = []
    for i, product in enumerate(products):
        with gr.Column(visible=i == 0 and bool(product.examples), elem_classes="examples") as column:
            if product.examples:
                found = gr.Examples(
                    [str(example.path) for example in product.examples],
                    photo,
                    example_labels=[
                        f"{'✓' if example.is_good else '✕'} {example.label}" for example in product.examples
                    ],
                    elem_id=f"examples-{i}",
                    label=f"Try {product.title}: good and defective",
                    examples_per_page=len(product.examples),
                    preprocess=False,
                )
                on.example_photos |= dict.fromkeys(
                    (sample[0]["path"] for sample in found.dataset.samples), product.name
                )
            if product.source:
                gr.HTML(f"<p>Photos: {html.escape(product.source)}</p>", elem_classes="source")
        columns.append(column)
    return columns


def inspect_tab(
    on: Handlers,
    tab: gr.Tab,
    category: gr.Radio,
    own: gr.State,
    taught: gr.State,
    of_batch: Sequence[gr.components.Component],
    products: Sequence[Product],
    opening: "Opening",
) -> tuple:
    """The tab for one photo; returns the controls that belong to a category, with those `of_batch`, and what draws the
    result again."""
    key = gr.Textbox(visible=False, elem_id="key")
    is_open = opening.pictures != ""
    with gr.Row(elem_classes="stack"):
        with gr.Column(scale=4, min_width=280, elem_id="give"):
            sources = ["upload", "clipboard", "webcam"]
            photo = gr.Image(label="Photo", type="filepath", sources=sources, height=300, buttons=[], elem_id="photo")
            no_camera = "This device offers no camera here. Upload a photo instead."
            gr.HTML(f"<div hidden>{message(no_camera)}</div>", js_on_load=CAMERA, elem_id="camera")
            examples = examples_of(products, on, photo)
            normal = gr.HTML(opening.normal, elem_id="normal")
        with gr.Column(scale=6, min_width=300, elem_id="get"):
            verdict = gr.HTML(opening.verdict, elem_id="verdict")
            with gr.Column(visible=is_open, elem_id="result") as result:
                pictures = gr.HTML(opening.pictures, elem_id="pictures")
                with gr.Column(elem_id="scores"):
                    threshold = slider(
                        0, 1, opening.threshold, step=0.001, label="Threshold", info=opening.info, elem_id="threshold"
                    )
                    scale = gr.HTML(opening.scale, elem_id="scale")
                    back = gr.Button("Back to the calibrated threshold", size="sm", elem_id="threshold-back")
                regions = gr.HTML(opening.regions, elem_id="regions")
    with gr.Column(visible=is_open, elem_id="details") as details:
        kinds = {"overlay": "Overlay", "mask": "Mask", "map": "16-bit map", "json": "JSON", "report": "Report page"}
        with gr.Row(elem_id="downloads"):
            buttons = {
                kind: gr.Button(f"↓ {label}", size="sm", elem_id=f"download-{kind}", min_width=110)
                for kind, label in kinds.items()
            }
        file = gr.File(visible=False)
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            rate = slider(0.1, 50, 5, step=0.1, label="False-alarm rate (%)", elem_id="rate")
            opacity = slider(0, 1, OPACITY, step=0.05, label="Opacity", elem_id="opacity")
        # No numbers: gradio's field for them shows 0, and sends it, where there is none.
        number = partial(gr.Textbox, placeholder="the model's", max_lines=1, min_width=120)
        sides = [("the model's", ""), *((f"{side} px", side) for side in (64, 128, 192, 256, 384, 512))]
        with gr.Row():
            advanced = [
                number(label="Seed", elem_id="seed"),
                slider(1, 16, 1, step=1, label="Noise draws to average", elem_id="draws"),
                number(label="Small timestep", elem_id="small-timestep"),
                number(label="Big timestep", elem_id="big-timestep"),
                gr.Dropdown(sides, label="Resolution", value="", elem_id="resolution"),
            ]
        again = gr.Button("Inspect again", variant="primary", elem_id="again")

    with result:
        mark_result(on, key, [threshold, rate, own])
    drawn = [threshold, opacity, rate, own]
    run = dict(inputs=[photo, category, key, *drawn, *advanced], show_progress_on=[verdict], **INSPECTING, **RUN)
    run["api_name"] = "photo"  # the name of `on.inspect` is that of the endpoint
    run["outputs"] = [verdict, key, result, details, pictures, scale, regions, normal, photo]
    run["trigger_mode"] = "always_last"  # or a product chosen meanwhile would keep the other one's verdict
    photo.change(on.photo, **run)
    again.click(on.inspect, **run)
    redrawn = [verdict, pictures, scale, regions]
    redraw = dict(fn=on.threshold, inputs=[key, *drawn], outputs=redrawn, **LIVE)
    threshold.input(**redraw)
    opacity.input(**redraw)
    rate.input(on.rate, [category, rate, own], threshold, **LIVE).then(**redraw)
    controls = [threshold, rate, *of_batch]
    back.click(on.category, [category, own], controls, **LIVE).then(**redraw)
    chosen = [category.input, taught.change]
    gr.on(chosen, on.category, [category, own], controls, **LIVE).then(on.inspect, **run)
    gr.on(chosen, on.examples, category, examples, **LIVE)
    # Controls miss what they are set to while another tab is shown, as that in which a product is taught.
    missed = gr.State(False)
    taught.change(lambda: True, None, missed, api_visibility="private")
    tab.select(on.missed, [missed, category, own], controls, **LIVE).then(
        on.redraw_missed, [missed, key, *drawn], [missed, *redrawn], **LIVE
    )
    tab.select(on.examples, category, examples, **LIVE)
    for kind, button in buttons.items():
        made = button.click(on.download(kind), [key, *drawn], file, **DOWNLOADS)
        made.success(None, file, None, js=SAVE)
    return controls, redraw, run


ROWS = """element.addEventListener('click', event => {
    const row = event.target.closest('tbody tr'), button = row?.querySelector('[data-row]');
    if (!button) return;
    element.querySelectorAll('tr').forEach(r => r.ariaSelected = r === row);
    trigger('select', {row: +button.dataset.row});
})"""


def batch_tab(
    on: Handlers,
    tab: gr.Tab,
    category: gr.Radio,
    own: gr.State,
    threshold: gr.Slider,
    by_hand: gr.State,
) -> None:
    """The tab for many photos. `by_hand` is what a visitor moved the threshold to: the slider itself misses what is
    set while another tab is shown."""
    files = upload(label=f"Photos or zip archives, up to {LIMITS.files}", file_count="multiple", elem_id="batch-files")
    threshold.render()
    back = gr.Button("Back to the calibrated threshold", size="sm", elem_id="batch-threshold-back")
    back.click(on.batch_threshold, [category, own, gr.State(None)], threshold, **LIVE)
    back.click(lambda: None, None, by_hand, **LIVE)
    tab.select(on.batch_threshold, [category, own, by_hand], threshold, **LIVE)
    threshold.input(lambda value: value, threshold, by_hand, **LIVE)
    with gr.Row():
        start = gr.Button("Inspect all", variant="primary", elem_id="batch-start")
        stop = gr.Button("Stop", elem_id="batch-stop")
    summary = gr.HTML(elem_id="batch-summary")
    opened = gr.State(None)
    with gr.Column(visible=False) as result:
        with gr.Row():
            table_file = gr.DownloadButton("↓ CSV", size="sm", elem_id="batch-csv")
            archive = gr.DownloadButton("↓ Everything (zip)", size="sm", elem_id="batch-zip")
        with gr.Row(elem_classes="stack"):
            table = gr.HTML(js_on_load=ROWS, elem_id="batch-table")
            detail = gr.HTML(elem_id="batch-detail")
    outputs = [summary, result, table, detail, opened, table_file, archive]
    running = start.click(on.batch, [files, category, by_hand, own], outputs, show_progress="hidden", **BATCHES, **RUN)
    stop.click(lambda: message("Stopped.", "note"), None, summary, cancels=running, api_visibility="private")
    with result:
        mark_rows(on, table, opened)
    table.select(on.batch_row, opened, detail, **LIVE)


def calibrate_tab(
    on: Handlers, page: gr.Blocks, category: gr.Dropdown, own: gr.State, controls: list, redraw: dict
) -> None:
    state = gr.HTML(elem_id="calibration")
    with gr.Row(elem_classes="stack"):
        with gr.Column(min_width=280):
            wanted = f"Photos of normal parts, {FEWEST_CALIBRATION_IMAGES} or more"
            files = upload(label=wanted, file_count="multiple", elem_id="normal-files")
            rate = slider(0.1, 20, 5, step=0.1, label="False-alarm rate (%)", elem_id="calibration-rate")
            start = gr.Button("Calibrate", variant="primary", elem_id="calibrate-start")
        with gr.Column(min_width=280):
            load_file = upload(label="Or load a calibration file", file_types=[".json"], elem_id="calibration-file")
            save = gr.DownloadButton("↓ Calibration file", visible=False, elem_id="calibration-save")
            forget = gr.Button("Back to the model's own", elem_id="calibration-forget")
    inputs, outputs = [files, category, rate, own], [state, own, save]
    for changed in (
        start.click(on.recalibrate, inputs, outputs, show_progress="hidden", **BATCHES, **RUN),
        load_file.upload(on.calibration_file, [load_file, category, own], [state, own], **RUN),
        forget.click(on.forget_calibration, [category, own], outputs, **LIVE),
    ):
        # Those of the product that is chosen by now, which may be another one.
        changed.then(on.category, [category, own], controls, **LIVE).then(**redraw)
    gr.on([page.load, category.change], on.show_calibration, [category, own], state, **LIVE)


def named_endpoints(endpoints: Endpoints) -> None:
    """The API, with components that only state its types."""
    names = endpoints.models.names
    with gr.Column(visible=False):
        image = gr.Image(label="image", type="filepath", image_mode=None)
        files = several_files()
        category = gr.Dropdown(names, value=names[0] if names else None, label="category")
        threshold = gr.Number(label="threshold", value=None)
        calibration = gr.File(label="calibration_file")
        draws = gr.Number(label="num_noises", value=1, precision=0)
        rate = gr.Number(label="false_alarm_rate", value=0.05)
        training = gr.Textbox(label="training", value=None)
        record, records, summary = gr.JSON(label="record"), gr.JSON(label="records"), gr.JSON(label="summary")
        overlay = gr.Image(label="overlay", type="filepath")
        table, archive, saved = gr.File(label="table"), gr.File(label="archive"), gr.File(label="calibration_file")
        caller = gr.Button()
    for function, inputs, outputs, queue in (
        (endpoints.inspect, [image, category, threshold, calibration, draws, training], [record, overlay], INSPECTING),
        (
            endpoints.inspect_batch,
            [files, category, threshold, calibration, training],
            [records, table, archive],
            BATCHES,
        ),
        (endpoints.calibrate, [files, category, rate], [summary, saved], BATCHES),
    ):
        caller.click(function, inputs, outputs, api_name=function.__name__, preprocess=False, **queue)


class _SessionConfig(BlocksConfig):
    """What a session keeps of the page: not how each component looks, which only deep links ask for."""

    @staticmethod
    def config_for_block(*_: Any, **__: Any) -> dict[str, Any]:
        return {}


class _PageConfig(BlocksConfig):
    """
    Gives each session a [`_SessionConfig`]: gradio's takes 15 ms, in which the server answers nobody, and half a
    megabyte, of every call that comes without a session.
    """

    def __copy__(self) -> BlocksConfig:
        copied = super().__copy__()
        copied.__class__ = _SessionConfig
        return copied


class Page(gr.Blocks):
    """A page that admits every value of every call itself, before gradio or a handler looks at it."""

    def __init__(self, uploads: Path, **kwargs: Any):
        super().__init__(**kwargs)
        self.default_config.__class__ = _PageConfig
        self.uploads = uploads

    async def preprocess_data(
        self, block_fn: Any, inputs: Sequence[Any], state: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with one_line_errors():
            # What is left out at the end is what the function has by default.
            if block_fn.fn is not None:  # None where an event runs in the browser only
                missing = list(signature(block_fn.fn).parameters.values())[len(inputs) : len(block_fn.inputs)]
                if all(parameter.default is not parameter.empty for parameter in missing):
                    inputs = [*inputs, *(parameter.default for parameter in missing)]
            if len(inputs) != len(block_fn.inputs):
                raise Refusal(f"This call takes {len(block_fn.inputs)} values, not {len(inputs)}.")
            inputs = [await self._admit(*pair) for pair in zip(block_fn.inputs, inputs, strict=True)]
        return await super().preprocess_data(block_fn, inputs, state, *args, **kwargs)

    async def _admit(self, component: Any, value: Any) -> Any:
        if component.stateful:  # kept here; what a caller says of it is not read
            return None
        if isinstance(component, gr.Dataset) and not (type(value) is int and 0 <= value < len(component.samples)):
            raise Refusal("There is no such example.")
        is_file = isinstance(component, (gr.Image, gr.File))
        if is_file:
            many = getattr(component, "file_count", "single") != "single"
            if isinstance(value, list) and not many:
                raise Refusal("Only one file is taken here.")
            listed = value if isinstance(value, list) else [value]
            # Of several files, assistants send the bare texts.
            listed = [{"path": item} if many and isinstance(item, str) else item for item in listed]
            if sum(isinstance(item, dict) and is_address(item.get("path")) for item in listed) > LIMITS.addresses:
                raise Refusal(f"More than {LIMITS.addresses} addresses; upload the files instead.")
            if len(listed) <= LIMITS.files:
                listed = [await self._fetched(item) for item in listed if item is not None]
            value = listed if many else next(iter(listed), None)
        return admit(value, self.uploads, is_file)

    async def _fetched(self, file: Any) -> Any:
        if isinstance(file, dict) and str(file.get("path"))[:5] == "data:":
            return await asyncio.to_thread(self._written, file["path"])
        if not isinstance(file, dict) or not is_address(file.get("path")):
            return file
        path, name = await fetch(file["path"], self.uploads)
        return {"path": str(path), "orig_name": name}

    def _written(self, data: str) -> dict[str, str]:
        if bytes_in(self.uploads) > LIMITS.stored_bytes - LIMITS.spared_bytes:  # as for who uploaded much
            raise Refusal(FULL)
        try:
            return {"path": save_base64_to_cache(data, str(self.uploads))}
        except Exception as error:  # what it stumbles over in a text that is none
            raise Refusal("An address that begins with data: must hold a file, base64-encoded.") from error

    def queue(self, **kwargs: Any) -> "Page":
        super().queue(max_size=LIMITS.waiting, api_open=False, **kwargs)
        self._queue = FairQueue(
            live_updates=True,
            concurrency_count=self.max_threads,
            update_intervals=1,
            max_size=LIMITS.waiting,
            blocks=self,
        )
        for event in self.fns.values():
            event.fn = event.fn and charged(event.fn)
        return self


@dataclass(frozen=True)
class Opening:
    """What the page shows before a visitor has done anything: the result of an example, if there is one."""

    verdict: str = EMPTY
    pictures: str = ""
    scale: str = ""
    regions: str = ""
    normal: str = ""
    threshold: float = 0.5
    info: str | None = None

    @classmethod
    def of(cls, on: Handlers) -> "Opening":
        if not on.models.names:
            return cls(message(NO_MODEL))
        model = on.models.models[on.models.names[0]]
        if not Path(model.source).is_dir():  # it is fetched in the background, and shown when it is there
            return cls()
        try:
            calibration = on.models.get(model.name).calibration
        except Refusal as error:
            return cls(message(error))
        control = threshold_update(calibration)
        found = cls(threshold=control["value"], info=control["info"])
        on.opening = on.example(model.name)
        if on.opening is None:
            return found
        verdict, _, _, _, pictures, scale, regions, normal = on.result(on.opening, "", calibration)
        return replace(found, verdict=verdict, pictures=pictures, scale=scale, regions=regions, normal=normal)


HEADER = """<h1>Is this part defective, and where?</h1>
<p>Give one photo: a model that has learnt from good parts alone says whether yours is normal, shows what is not, and
tells how sure that is.</p>"""


def build(results: Results, models: Models, teacher: Teacher | None = None) -> Page:
    offered = products(models)
    on, names = Handlers(results, models, offered), models.names
    pictures = [[address(results.serve(thumbnail(e.path))) for e in product.examples] for product in offered]
    with Page(results.uploads, title="DiffusionAD inspection") as page:
        own, taught = gr.State({}), gr.State("")
        gr.HTML(HEADER + pictures_css(pictures), elem_id="title")
        category = gr.Radio(
            [(product_words(product), product.name) for product in offered],
            value=names[0] if names else None,
            label="Product",
            elem_id="category",
            visible=bool(names),
        )
        with gr.Tab("Inspect", elem_id="tab-inspect") as tab:
            batch_threshold = slider(0, 1, 0.5, step=0.001, label="Threshold", elem_id="batch-threshold", render=False)
            opening = Opening.of(on)
            of_batch = batch_threshold, gr.State(None)
            controls, redraw, run = inspect_tab(on, tab, category, own, taught, of_batch, offered, opening)
        with gr.Tab("Batch", elem_id="tab-batch") as tab:
            batch_tab(on, tab, category, own, *of_batch)
        with gr.Tab("Calibrate", elem_id="tab-calibrate"):
            calibrate_tab(on, page, category, own, controls, redraw)
        if teacher:
            with gr.Tab("Teach", elem_id="tab-teach"):
                teach_tab(teacher, page, category, taught)
        with gr.Tab("About", elem_id="tab-about"):
            text = gr.Markdown(elem_id="about")
            gr.HTML(
                "<p>A model knows one kind of part, photographed as it was trained: another camera or light needs a "
                "calibration of its own. Results are deleted when you leave the page, photos an hour after their last "
                "use at the latest.</p>",
                elem_id="about-all",
            )
        named_endpoints(Endpoints(results, models))
        if teacher:
            teach_endpoints(teacher)
        page.load(on.category, [category, own], controls, **LIVE).then(on.start, **{**run, "show_progress": "hidden"})
        gr.on([page.load, category.change], on.about, category, text, **LIVE)
        page.unload(on.leave)
    return page.queue()


def serve(folder: Path, sources: str) -> None:
    """Serves the page until the process ends, with a folder for all that is kept."""
    results, models = Results(folder), Models(sources)
    teacher = Teacher(results, models) if is_on() else None
    page = build(results, models, teacher)
    results.keep_what_is_there()
    results.sweep_forever()
    # Loads the first model, so that the first photo does not wait for it.
    threading.Thread(target=about, args=(models, next(iter(models.names), "")), daemon=True).start()
    with closing(teacher) if teacher else nullcontext():
        page.launch(
            theme=THEME,
            css_paths=STYLE,
            max_file_size=LIMITS.upload_bytes,
            state_session_capacity=LIMITS.sessions,
            app_kwargs={"middleware": [Middleware(Guard, uploads=results.uploads)]},
            enable_monitoring=False,
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            # Hugging Face installs it; elsewhere it is optional, see README.md.
            mcp_server=importlib.util.find_spec("mcp") is not None,
        )
