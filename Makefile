# The README's commands. Each does its own set-up: Python 3.10 or newer and make are all that has to be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-any-cpu style quality docs results gpu space wheel clean

demo: $(VENV)/.core  ## Inspect the bundled examples with the embedded model.
	$(BIN)/diffusionad demo

test: $(VENV)/.all  ## Run all tests.
	$(BIN)/python -m pytest

# OpenVINO asks the processor itself, beside its limited oneDNN, and then finds no kernels for float16 and int8: that is of
# the imitation, not of such processors.
test-any-cpu: $(VENV)/.all  ## Run all tests as on a processor without AVX-512.
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest \
		--deselect 'tests/export/test_exporting.py::test_a_unet_of_patches_that_predicts_images[openvino-fp16-0.005]' \
		--deselect 'tests/export/test_exporting.py::test_int8_is_close_and_spares_the_segmenter[openvino]'

style: $(VENV)/.all  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.all  ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Silences an advertisement that the theme prints.
docs: $(VENV)/.all  ## Build the documentation into site/; warnings and broken links are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

results: $(VENV)/.all  ## List the commands that rebuild the tables; each says with --help what it takes.
	$(BIN)/python -m benchmarks --help

gpu: $(VENV)/.all  ## Measure what only a GPU can: make gpu DATA=DIR OUT=DIR, in hours; see benchmarks/README.md.
	@test -n "$(OUT)" -a -d "$(DATA)/mvtec_ad/bottle" -a -d "$(DATA)/mvtec_ad/screw" || \
		{ echo "make gpu DATA=DIR OUT=DIR: DIR/mvtec_ad/bottle and DIR/mvtec_ad/screw must be there."; exit 2; }
	mkdir -p "$(OUT)"
	$(BIN)/python -m benchmarks training --device cuda --presets perceptual small paper --batch-sizes 8 32 \
		--dtypes float32 bfloat16 --layouts contiguous channels_last --json "$(OUT)/training.json"
	$(BIN)/python -m benchmarks inference --device cuda --presets perceptual small paper --batch-sizes 1 16 64 \
		--dtypes float32 bfloat16 --json "$(OUT)/inference.json"
	for preset in perceptual fast paper; do $(BIN)/python -m benchmarks real --data "$(DATA)" --preset $$preset \
		--categories mvtec_ad/bottle mvtec_ad/screw --output-dir "$(OUT)/$$preset" --json "$(OUT)/$$preset.json" || exit; done

space: $(VENV)/.all  ## Serve the web demo.
	$(BIN)/python space/app.py

wheel: $(VENV)/.all  ## Build wheel and sdist into dist/.
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) outputs dist site

# Torch goes first and pinned: whatever is installed after it finds it there and leaves it alone.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	touch $@

$(VENV)/.all: $(VENV)/.core
	$(INSTALL) --editable ".[train,space,openvino,ray,docs,dev]"
	touch $@
