"""The inspection page: what is on it, what its controls call, and the server that shows it."""

import importlib.util
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .actions import FEWEST_CALIBRATION_IMAGES
from .addresses import fetch, is_address
from .endpoints import Endpoints, one_line_errors
from .handlers import EMPTY, NO_MODEL, Handlers, message
from .intake import LIMITS, Refusal, admit
from .models import Models, about
from .reports import COLUMNS
from .results import Results
from .traffic import QUICK, FairQueue, Guard, charged
from .views import OPACITY

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
SHOWN = {"type": "filepath", "interactive": False}


def inspect_tab(
    on: Handlers, category: gr.Dropdown, own: gr.State, batch_threshold: gr.Slider, examples: Path
) -> tuple:
    """The tab for one photo; returns the controls that belong to a category and what draws the result again."""
    key = gr.Textbox(visible=False, elem_id="key")
    with gr.Row(elem_classes="stack"):
        with gr.Column(scale=4, min_width=280):
            sources = ["upload", "clipboard", "webcam"]
            photo = gr.Image(label="Photo", type="filepath", sources=sources, height=400, buttons=[], elem_id="photo")
            if files := sorted(str(file) for pattern in ("*.png", "*.jpg") for file in examples.glob(pattern)):
                labels = [Path(file).stem.replace("-", " ") for file in files]
                gr.Examples(
                    files, photo, example_labels=labels, elem_id="examples", label="Examples", preprocess=False
                )
        with gr.Column(scale=6, min_width=300):
            verdict = gr.HTML(EMPTY if on.models.names else message(NO_MODEL), elem_id="verdict")
            with gr.Column(visible=False, elem_id="result") as result:
                pictures = gr.ImageSlider(
                    label="Photo and anomaly map", max_height=460, slider_position=2, **SHOWN, elem_id="pictures"
                )
                threshold = slider(0, 1, 0.5, step=0.001, label="Threshold", elem_id="threshold")
                back = gr.Button("Back to the calibrated threshold", size="sm", elem_id="threshold-back")
                regions = gr.Radio([], label="Regions", elem_id="regions")
    with gr.Column(visible=False, elem_id="details") as details:
        normal = gr.Image(label="As it should look", height=340, buttons=["fullscreen"], **SHOWN, elem_id="normal")
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

    outputs = [verdict, key, result, details, pictures, normal, regions]
    drawn = [threshold, opacity, rate, own]
    inputs = [photo, category, *drawn, *advanced]
    run = dict(fn=on.photo, inputs=inputs, outputs=outputs, show_progress_on=[verdict], **INSPECTING, **RUN)
    photo.change(**run)
    again.click(**run)
    redraw = dict(fn=on.threshold, inputs=[key, *drawn], outputs=[verdict, pictures, regions], **LIVE)
    threshold.input(**redraw)
    opacity.input(**redraw)
    regions.input(on.region, [key, *drawn, regions], pictures, **LIVE)
    rate.input(on.rate, [category, rate, own], threshold, **LIVE).then(**redraw)
    controls = [threshold, rate, batch_threshold]
    back.click(on.category, [category, own], controls, **LIVE).then(**redraw)
    category.input(on.category, [category, own], controls, **LIVE).then(**run)
    for kind, button in buttons.items():
        made = button.click(on.download(kind), [key, *drawn], file, **DOWNLOADS)
        made.success(None, file, None, js=SAVE)
    return controls, redraw


def batch_tab(on: Handlers, tab: gr.Tab, category: gr.Dropdown, own: gr.State, threshold: gr.Slider) -> None:
    files = upload(label=f"Photos or zip archives, up to {LIMITS.files}", file_count="multiple", elem_id="batch-files")
    threshold.render()
    # What a visitor moved it to; the slider itself misses what is set while another tab is shown.
    by_hand = gr.State(None)
    tab.select(on.batch_threshold, [category, own, by_hand], threshold, **LIVE)
    threshold.input(lambda value: value, threshold, by_hand, **LIVE)
    category.input(lambda: None, None, by_hand, **LIVE)
    with gr.Row():
        start = gr.Button("Inspect all", variant="primary", elem_id="batch-start")
        stop = gr.Button("Stop", elem_id="batch-stop")
    summary = gr.HTML(elem_id="batch-summary")
    with gr.Column(visible=False) as result:
        with gr.Row():
            table_file = gr.DownloadButton("↓ CSV", size="sm", elem_id="batch-csv")
            archive = gr.DownloadButton("↓ Everything (zip)", size="sm", elem_id="batch-zip")
        title = "Highest score first"
        table = gr.Dataframe(
            headers=COLUMNS, interactive=False, wrap=True, label=title, buttons=[], elem_id="batch-table"
        )
        gallery = gr.Gallery(label="Overlays", columns=4, object_fit="contain", buttons=[], elem_id="batch-gallery")
    outputs = [summary, result, table, gallery, table_file, archive]
    running = start.click(on.batch, [files, category, by_hand, own], outputs, show_progress="hidden", **BATCHES, **RUN)
    stop.click(lambda: message("Stopped.", "note"), None, summary, cancels=running, api_visibility="private")


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
    inputs, outputs = [files, category, rate, own], [state, own, save, *controls]
    start.click(on.recalibrate, inputs, outputs, show_progress="hidden", **BATCHES, **RUN).then(**redraw)
    load_file.upload(on.calibration_file, [load_file, category, own], [state, own, *controls], **RUN).then(**redraw)
    forget.click(on.forget_calibration, [category, own], [state, own, save, *controls], **LIVE).then(**redraw)
    gr.on([page.load, category.change], on.show_calibration, [category, own], state, **LIVE)


def named_endpoints(endpoints: Endpoints) -> None:
    """The API, with components that only state its types."""
    names = endpoints.models.names
    with gr.Column(visible=False):
        image = gr.Image(label="image", type="filepath", image_mode=None)
        files = gr.File(label="files", file_count="multiple")
        category = gr.Dropdown(names, value=names[0] if names else None, label="category")
        threshold = gr.Number(label="threshold", value=None)
        calibration = gr.File(label="calibration_file")
        draws = gr.Number(label="num_noises", value=1, precision=0)
        rate = gr.Number(label="false_alarm_rate", value=0.05)
        record, records, summary = gr.JSON(label="record"), gr.JSON(label="records"), gr.JSON(label="summary")
        overlay = gr.Image(label="overlay", type="filepath")
        table, archive, saved = gr.File(label="table"), gr.File(label="archive"), gr.File(label="calibration_file")
        caller = gr.Button()
    for function, inputs, outputs, queue in (
        (endpoints.inspect, [image, category, threshold, calibration, draws], [record, overlay], INSPECTING),
        (endpoints.inspect_batch, [files, category, threshold, calibration], [records, table, archive], BATCHES),
        (endpoints.calibrate, [files, category, rate], [summary, saved], BATCHES),
    ):
        caller.click(function, inputs, outputs, api_name=function.__name__, preprocess=False, **queue)


class Page(gr.Blocks):
    """A page that admits every value of every call itself, before gradio or a handler looks at it."""

    def __init__(self, uploads: Path, **kwargs: Any):
        super().__init__(**kwargs)
        self.uploads = uploads

    async def preprocess_data(self, block_fn: Any, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        with one_line_errors():
            if len(inputs) != len(block_fn.inputs):
                raise Refusal(f"This call takes {len(block_fn.inputs)} values, not {len(inputs)}.")
            inputs = [await self._admit(*pair) for pair in zip(block_fn.inputs, inputs, strict=True)]
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

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
            if sum(isinstance(item, dict) and is_address(item.get("path")) for item in listed) > LIMITS.addresses:
                raise Refusal(f"More than {LIMITS.addresses} addresses; upload the files instead.")
            if len(listed) <= LIMITS.files:
                listed = [await self._fetched(item) for item in listed if item is not None]
            value = listed if many else next(iter(listed), None)
        return admit(value, self.uploads, is_file)

    async def _fetched(self, file: Any) -> Any:
        if not isinstance(file, dict) or not is_address(file.get("path")):
            return file
        path, name = await fetch(file["path"], self.uploads)
        return {"path": str(path), "orig_name": name}

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


def build(results: Results, models: Models, examples: Path) -> Page:
    on, names = Handlers(results, models), models.names
    with Page(results.uploads, title="DiffusionAD inspection") as page:
        own = gr.State({})
        with gr.Row(elem_id="header"):
            gr.HTML("<h1>Inspection</h1>", elem_id="title")
            first = names[0] if names else None
            category = gr.Dropdown(names, value=first, label="Category", elem_id="category", min_width=220)
        with gr.Tab("Inspect", elem_id="tab-inspect"):
            batch_threshold = slider(0, 1, 0.5, step=0.001, label="Threshold", elem_id="batch-threshold", render=False)
            controls, redraw = inspect_tab(on, category, own, batch_threshold, examples)
        with gr.Tab("Batch", elem_id="tab-batch") as tab:
            batch_tab(on, tab, category, own, batch_threshold)
        with gr.Tab("Calibrate", elem_id="tab-calibrate"):
            calibrate_tab(on, page, category, own, controls, redraw)
        with gr.Tab("About", elem_id="tab-about"):
            text = gr.Markdown(elem_id="about")
            gr.HTML(
                "<p>A model knows one kind of part, photographed as it was trained: another camera or light needs a "
                "calibration of its own. Results are deleted when you leave the page, photos an hour after their last "
                "use at the latest.</p>",
                elem_id="about-all",
            )
        named_endpoints(Endpoints(results, models))
        page.load(on.category, [category, own], controls, **LIVE).then(**redraw)
        gr.on([page.load, category.change], on.about, category, text, **LIVE)
        page.unload(on.leave)
    return page.queue()


def serve(folder: Path, sources: str, examples: Path) -> None:
    """Serves the page until the process ends, with a folder for all that is kept and one of photos to try."""
    results, models = Results(folder), Models(sources)
    page = build(results, models, examples)
    results.keep_what_is_there()
    results.sweep_forever()
    # Loads the first model, so that the first photo does not wait for it.
    threading.Thread(target=about, args=(models, next(iter(models.names), "")), daemon=True).start()
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
